"""One request's state at its beginning."""

from __future__ import annotations

from engine.schedule.request import RequestState
from engine.wire import SamplingParams, Submit


def test_a_request_starts_with_nothing_computed_and_leaves_the_message_alone():
    submit = Submit(5, 1, [1, 2, 3], SamplingParams(max_tokens=4), priority=2)
    request = RequestState(9, (1, 3), submit, 10.0)
    assert (request.num_computed_tokens, request.high_water, request.scheduled_at) == (0, 0, 0.0)
    request.begin(11.0)
    request.token_ids.append(8)
    assert submit.prompt_token_ids == [1, 2, 3]
    assert (request.token_ids, request.num_prompt_tokens, request.scheduled_at) == ([1, 2, 3, 8], 3, 11.0)


def test_the_sequences_of_one_request_differ_in_id_and_seed_and_share_the_prompt_until_they_begin():
    submit = Submit(5, 1, [1, 2, 3], SamplingParams(max_tokens=4, seed=2**63 - 1), n=2)
    first, second = (RequestState(9 + index, (1, 3), submit, 10.0, index) for index in range(2))
    assert (first.request_id, second.request_id) == (5, 6)
    assert (first.sampling.seed, second.sampling.seed) == (2**63 - 1, -(2**63))
    assert first.token_ids is second.token_ids, "a prompt of 8,190 tokens with n = 128 would else be held 128 times"
    first.begin(11.0)
    first.token_ids.append(8)
    assert second.token_ids == [1, 2, 3]


def test_the_runner_sees_the_lists_of_the_request_itself():
    request = RequestState(9, (1, 3), Submit(5, 1, [1], SamplingParams(max_tokens=4)), 10.0)
    request.begin(11.0)
    request.token_ids.append(8)
    request.block_table.append(4)
    assert request.scheduled.token_ids == [1, 8]
    assert request.scheduled.block_table == [4]
    assert request.scheduled.num_prompt_tokens == 1


def test_order_is_priority_then_arrival():
    def order(sequence_id: int, priority: int) -> tuple[int, int]:
        return RequestState(sequence_id, (0, 1), Submit(0, 1, [1], SamplingParams(max_tokens=1), priority), 0.0).order

    assert sorted([order(1, 0), order(2, 0), order(3, -1)]) == [order(3, -1), order(1, 0), order(2, 0)]
