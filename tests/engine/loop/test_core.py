"""The engine without sockets: who gets which output, what is refused and how, and in which order it is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.config import SchedulerConfig
from engine.schedule.batch import Batch, SampledToken
from engine.wire import (
    Finish,
    Output,
    Outputs,
    SamplingParams,
    Start,
    Submit,
    TokenLogprobs,
    decode_from_engine,
    encode,
)
from tests.engine.workload import MAX_MODEL_LEN, VOCAB_SIZE, Engine, Job, Setup
from tests.fakes import fake_output

SUBMIT = Submit(1, 1, [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.fixture
def engine() -> Engine:
    return Engine(Setup())


def only(sent: dict[Any, Outputs], server: tuple[int, int]) -> Output:
    (output,) = sent[server].outputs
    return output


def test_each_api_server_gets_its_own_tokens_only(engine):
    for server in ((0, 1), (1, 1), (1, 2)):
        engine.core.submit(server, replace(SUBMIT, prompt_token_ids=[*server, 5]), 1.0)
    sent = engine.step()
    assert set(sent) == {(0, 1), (1, 1), (1, 2)}
    for server in sent:
        assert only(sent, server).token_ids == fake_output([*server, 5], 1, VOCAB_SIZE)
    assert engine.value("wholebatch:tokens_sent_total", api_server="0") == 1
    assert engine.value("wholebatch:tokens_sent_total", api_server="1") == 2, "by index, over incarnations"


def test_outputs_carry_the_incarnation_the_instant_and_the_index_of_their_token(engine):
    engine.core.submit((0, 1), SUBMIT, 1.0)
    for index in range(4):
        sent = engine.step()
        output = only(sent, (0, 1))
        assert (sent[0, 1].engine_incarnation, sent[0, 1].at) == (1, engine.clock())
        assert (output.first_index, len(output.token_ids)) == (index, 1)
        assert (output.finish is None) == (index < 3)
        assert decode_from_engine(encode(sent[0, 1])) == sent[0, 1]
    assert engine.step() == {}


def test_the_first_token_comes_with_the_life_of_the_sequence_so_far_and_the_last_with_its_end(engine):
    engine.core.submit((0, 1), SUBMIT, engine.clock())
    arrived = engine.clock()
    outputs = []
    for _ in range(4):
        sent = engine.step()
        outputs.append(only(sent, (0, 1)))
        if len(outputs) == 1:
            first_token_at = sent[0, 1].at
    start = outputs[0].start
    assert start is not None
    assert start == Start(arrived, start.scheduled_at, 0, 0)
    assert arrived < start.scheduled_at <= first_token_at
    assert [output.start for output in outputs[1:]] == [None] * 3
    assert [output.finish for output in outputs] == [None] * 3 + [Finish("length", None, None)]


def test_the_first_token_after_each_preemption_tells_of_it():
    engine = Engine(Setup(block_size=1, num_blocks=MAX_MODEL_LEN, enable_prefix_caching=False))
    told: list[tuple[int, int, int]] = []  # (request id, index of the token, preemptions)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    for request_id in range(3):
        submit = Submit(request_id, 1, list(range(8)), sampling)
        engine.core.submit((0, 1), submit, engine.clock())
    while engine.core.has_work:
        for outputs in engine.step().values():
            told += [(o.request_id, o.first_index, o.start.num_preemptions) for o in outputs.outputs if o.start]
    assert {(request_id, 0) for request_id in range(3)} == {(r, n) for r, index, n in told if index == 0}
    by_request = [[n for r, _, n in told if r == request_id] for request_id in range(3)]
    assert all(numbers == sorted(set(numbers)) for numbers in by_request), "told once each"
    assert sum(numbers[-1] for numbers in by_request) == engine.value("vllm:num_preemptions_total") > 0


@pytest.mark.parametrize(
    ("submit", "complaint"),
    [
        (replace(SUBMIT, prompt_token_ids=[]), "empty"),
        (replace(SUBMIT, prompt_token_ids=[VOCAB_SIZE]), f"token {VOCAB_SIZE}"),
        (replace(SUBMIT, prompt_token_ids=[1] * MAX_MODEL_LEN), f"context of {MAX_MODEL_LEN}"),
        (replace(SUBMIT, engine_incarnation=7), "engine incarnation 7"),
    ],
)
def test_what_cannot_run_is_answered_by_an_error_and_counted_as_accepted_and_finished(engine, submit, complaint):
    engine.core.submit((2, 1), submit, 1.0)
    assert engine.core.has_work
    output = only(engine.step(), (2, 1))
    assert output.finish is not None
    assert (output.request_id, output.token_ids, output.finish.reason) == (1, [], "error")
    assert complaint in str(output.finish.message)
    assert engine.value("wholebatch:sequences_accepted_total") == 1
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="error") == 1
    assert engine.seen == [], "an error is no iteration"
    assert not engine.core.has_work


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(engine):
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.core.submit((0, 1), SUBMIT, 1.0)
    rows = engine.core.step()[0, 1].outputs
    assert [row.finish.message if row.finish else None for row in rows] == ["request id 1 is in use", None]
    for _ in range(3):
        rows = engine.core.step()[0, 1].outputs
    assert rows[0].first_index == 3
    assert rows[0].finish is not None
    assert engine.value("wholebatch:sequences_accepted_total") == 2


def test_a_request_id_may_be_used_again_by_another_incarnation_or_later(engine):
    engine.core.submit((0, 1), replace(SUBMIT, sampling=SamplingParams(max_tokens=1)), 1.0)
    engine.core.submit((0, 2), SUBMIT, 1.0)
    engine.step()
    engine.core.submit((0, 1), SUBMIT, 1.0)
    assert only(engine.core.step(), (0, 1)).finish is None


def test_an_aborted_request_is_in_no_later_iteration_and_gives_no_output(engine):
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.core.submit((0, 1), replace(SUBMIT, request_id=2), 1.0)
    engine.step()
    engine.core.abort((0, 1), [1, 1, 99])
    assert engine.value("vllm:num_requests_running") == 1
    assert only(engine.step(), (0, 1)).request_id == 2
    assert engine.seen == [(3, 3), (1,)]
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="abort") == 1
    assert engine.runner.released == {0}


def test_nobody_aborts_what_is_not_his(engine):
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.core.abort((1, 1), [1])
    engine.core.abort((0, 2), [1])
    assert engine.value("vllm:num_requests_waiting") == 1
    assert only(engine.step(), (0, 1)).request_id == 1


def test_a_dropped_api_server_takes_its_requests_and_its_pending_errors_with_it(engine):
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.core.submit((0, 1), replace(SUBMIT, request_id=2, prompt_token_ids=[]), 1.0)
    engine.core.submit((1, 1), SUBMIT, 1.0)
    engine.core.drop_api_server((0, 1))
    engine.core.drop_api_server((3, 1))
    assert set(engine.step()) == {(1, 1)}
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="abort") == 1
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="error") == 1


def test_ended_sequences_are_released_by_the_runner_and_forgotten(engine):
    engine.run([Job(prompt=(1, 2), max_tokens=2), Job(prompt=(3,), max_tokens=1)])
    assert engine.runner.released == {0, 1}
    assert engine.core._by_request == {(0, 1): {}}
    engine.core.drop_api_server((0, 1))
    assert engine.core._by_request == {}


def test_stages_and_duration_come_from_the_clock(engine):
    run = engine.runner.run

    def slow(batch):
        engine.clock.advance(0.5)
        return run(batch)

    engine.runner.run = slow
    engine.core.iteration_log = lambda batch: engine.clock.advance(0.25)
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.step()
    assert engine.histogram("wholebatch:iteration_duration_seconds", phase="prefill") == (1, pytest.approx(0.75))
    assert engine.value("wholebatch:iteration_stage_seconds_total", stage="run") == pytest.approx(0.5)
    assert engine.value("wholebatch:iteration_stage_seconds_total", stage="schedule") == pytest.approx(0.25)


def test_log_probabilities_travel_with_their_token(engine):
    run = engine.runner.run
    found = TokenLogprobs(-0.5, 1, ((3, -0.5),))
    engine.runner.run = lambda batch: [SampledToken(token.token_id, found) for token in run(batch)]
    engine.core.submit((0, 1), SUBMIT, 1.0)
    assert only(engine.step(), (0, 1)).logprobs == [found]


def test_a_live_record_is_made_of_every_iteration_while_somebody_asks():
    engine = Engine(Setup(scheduler=SchedulerConfig(max_num_batched_tokens=2)))
    engine.core.submit((0, 1), SUBMIT, 1.0)
    engine.step()
    records: list[dict[str, Any]] = []
    engine.core.on_iteration = records.append
    engine.step()
    engine.step()
    assert [
        (r["phase"], r["num_prefill_tokens"], r["num_decode_tokens"], r["num_generated_tokens"]) for r in records
    ] == [
        ("prefill", 1, 0, 1),
        ("decode", 0, 1, 1),
    ]


def test_a_sequence_without_a_next_token_ends_by_error_and_its_neighbours_go_on(engine):
    run = engine.runner.run
    engine.runner.run = lambda batch: [
        SampledToken(-1, None, "no token can be sampled")
        if part.sequence_id == 0 and len(part.token_ids) > part.num_prompt_tokens
        else token
        for part, token in zip(batch.sequences, run(batch), strict=True)
    ]
    said: list[str] = []
    engine.core._on_sampling_fault = said.append
    for request_id in (1, 2):
        engine.core.submit((0, 1), replace(SUBMIT, request_id=request_id), 1.0)
    engine.step()
    broken, other = engine.core.step()[0, 1].outputs
    assert (broken.first_index, broken.token_ids, broken.finish) == (
        1,
        [],
        Finish("error", None, "no token can be sampled"),
    )
    assert (len(other.token_ids), other.finish) == (1, None)
    assert said == ["no token can be sampled"]
    assert engine.value("wholebatch:sampling_faults_total") == 1
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="error") == 1
    assert engine.value("vllm:generation_tokens_total") == 3
    assert engine.value("wholebatch:tokens_sent_total", api_server="0") == 3


def test_what_the_runner_caught_is_counted_and_said_once_and_ends_nobody(engine, caplog):
    run = engine.runner.run

    def run_and_catch(batch: Batch) -> Any:
        batch.caught.append(RuntimeError("not so many at once"))
        return run(batch)

    engine.runner.run = run_and_catch
    engine.core.submit((0, 1), SUBMIT, 1.0)
    outputs = [only(engine.step(), (0, 1)) for _ in range(4)]
    assert outputs[-1].finish == Finish("length", None, None)
    assert engine.value("wholebatch:bulkhead_errors_total", where="sampling") == 4
    assert caplog.text.count("not so many at once") == 1


def test_the_sequences_of_one_request_are_accepted_each_and_told_apart(engine):
    engine.core.submit((0, 1), replace(SUBMIT, n=3), 1.0)
    outputs = engine.step()[0, 1].outputs
    assert [output.request_id for output in outputs] == [1, 2, 3]
    assert [output.token_ids for output in outputs] == [fake_output([1, 2, 3], 1, VOCAB_SIZE)] * 3
    assert engine.value("wholebatch:sequences_accepted_total") == 3
    engine.core.submit((0, 1), replace(SUBMIT, request_id=3, n=2, prompt_token_ids=[5]), 1.0)
    (refused,) = [output for output in engine.core.step()[0, 1].outputs if output.finish is not None]
    assert (refused.request_id, refused.finish.message) == (3, "request id 3 is in use")
    assert engine.value("wholebatch:sequences_accepted_total") == 5


@pytest.mark.parametrize(
    ("first", "second", "num_cached"), [("a", "a", 8), ("a", "b", 0), ("a", None, 0), (None, "a", 0)]
)
def test_what_was_computed_under_one_salt_is_found_under_no_other(
    engine: Engine, first: str | None, second: str | None, num_cached: int
):
    for request_id, salt in enumerate((first, second)):
        submit = Submit(request_id, 1, list(range(10)), SamplingParams(max_tokens=1), cache_salt=salt)
        engine.core.submit((0, 1), submit, 1.0)
        start = only(engine.step(), (0, 1)).start
    assert start is not None
    assert start.num_cached_tokens == num_cached
    assert engine.value("vllm:prefix_cache_hits_total") == num_cached


def test_what_a_broken_sequence_has_computed_is_found_by_nobody(engine):
    """The next one with this prompt computes it anew, and does not meet what broke the first."""
    run, submit = engine.runner.run, Submit(1, 1, list(range(10)), SamplingParams(max_tokens=1))
    engine.runner.run = lambda batch: run(batch) and [SampledToken(-1, None, "not finite")]
    engine.core.submit((0, 1), submit, 1.0)
    assert only(engine.step(), (0, 1)).finish == Finish("error", None, "not finite")
    engine.runner.run = run
    engine.core.submit((0, 1), replace(submit, request_id=2), 1.0)
    start = only(engine.step(), (0, 1)).start
    assert start is not None
    assert start.num_cached_tokens == 0
    assert engine.pool.num_free == Setup().num_blocks
