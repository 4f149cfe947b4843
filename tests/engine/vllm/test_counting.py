"""What is counted of vLLM's batches: against a model of a scheduler that chunks, preempts, speculates and overlaps."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import IterationCounts
from engine.vllm.counting import MAX_IN_FLIGHT, BatchCounter


@dataclass
class FakeRequest:
    num_prompt_tokens: int
    num_computed_tokens: int = 0


@dataclass
class FakeOutput:
    num_scheduled_tokens: dict[str, int]
    finished_req_ids: set[str] = field(default_factory=set)


class Core:
    """Schedules as it is told, as vLLM does it: computed tokens are advanced before anybody is told of the batch."""

    def __init__(self, **prompts: int) -> None:
        self.requests = {name: FakeRequest(num) for name, num in prompts.items()}
        self.counter = BatchCounter()
        self.now = 0.0

    def schedule(self, finished: tuple[str, ...] = (), **tokens: int) -> tuple[FakeOutput, IterationCounts | None]:
        for name, num in tokens.items():
            self.requests[name].num_computed_tokens += num
        output = FakeOutput(tokens, set(finished))
        return output, self.counter.scheduled(output, self.requests, self.now, self.now)

    def counts(self, **tokens: int) -> IterationCounts:
        _, counts = self.schedule((), **tokens)
        assert counts is not None
        return counts

    def preempt(self, name: str) -> None:
        self.counter.preempted(name, self.requests[name].num_computed_tokens)
        self.requests[name].num_computed_tokens = 0


def parts(counts: IterationCounts) -> tuple[int, int, int, int]:
    return (
        counts.num_prefill_tokens,
        counts.num_decode_tokens,
        counts.num_prompt_tokens_computed,
        counts.num_recomputed_tokens,
    )


def test_a_prompt_in_chunks_is_prefill_to_its_last_position_and_what_follows_is_decode():
    core = Core(a=100)
    assert parts(core.counts(a=64)) == (64, 0, 64, 0)
    assert parts(core.counts(a=36)) == (36, 0, 36, 0)
    assert parts(core.counts(a=1)) == (0, 1, 0, 0)


def test_decodes_and_chunks_share_a_batch():
    core = Core(a=4, b=10)
    core.counts(a=4)
    counts = core.counts(a=1, b=10)
    assert (*parts(counts), counts.num_requests, counts.phase) == (10, 1, 10, 0, 2, "mixed")


def test_speculated_tokens_are_scheduled_as_decode():
    core = Core(a=4)
    core.counts(a=4)
    assert parts(core.counts(a=5)) == (0, 5, 0, 0)
    core.requests["a"].num_computed_tokens -= 3  # vLLM takes what was rejected back
    assert parts(core.counts(a=5)) == (0, 5, 0, 0)


def test_what_was_computed_before_a_preemption_is_recomputed_and_no_more():
    core = Core(a=10)
    core.counts(a=6)
    core.preempt("a")
    first = core.counts(a=4)
    assert (parts(first), first.num_preemptions) == ((4, 0, 0, 4), 1)
    second = core.counts(a=6)
    assert (parts(second), second.num_preemptions) == ((6, 0, 4, 2), 0)
    assert parts(core.counts(a=1)) == (0, 1, 0, 0)


def test_generated_tokens_are_recomputed_as_prefill():
    core = Core(a=3)
    core.counts(a=3)
    core.counts(a=1)
    core.counts(a=1)
    core.preempt("a")
    assert parts(core.counts(a=6)) == (5, 1, 0, 5)


def test_a_prefix_that_is_cached_is_not_computed():
    core = Core(a=10)
    core.requests["a"].num_computed_tokens = 8  # found in the prefix cache
    assert parts(core.counts(a=2)) == (2, 0, 2, 0)


def test_a_batch_without_tokens_is_none():
    core = Core(a=1)
    output, counts = core.schedule()
    assert counts is None
    assert core.counter.updated(output, 0, 1.0) is None


def test_overlapping_batches_are_told_apart_and_their_durations_do_not_overlap():
    core = Core(a=2)
    first, _ = core.schedule(a=2)
    core.now = 1.0
    second, _ = core.schedule(a=1)
    one = core.counter.updated(first, 1, 4.0)
    two = core.counter.updated(second, 1, 6.0)
    assert one is not None
    assert two is not None
    assert (one.counts.num_scheduled_tokens, two.counts.num_scheduled_tokens) == (2, 1)
    assert (one.duration_s, two.duration_s) == (4.0, 2.0)
    assert core.counter.updated(second, 1, 7.0) is None


def test_a_request_that_is_gone_leaves_nothing_behind():
    core = Core(a=4)
    core.counts(a=4)
    core.preempt("a")
    core.schedule(finished=("a",))
    core.requests["a"] = FakeRequest(4)
    assert parts(core.counts(a=4)) == (4, 0, 4, 0)


def test_batches_that_never_run_are_forgotten():
    core = Core(a=1)
    lost, _ = core.schedule(a=1)
    for _ in range(MAX_IN_FLIGHT):
        core.schedule(a=1)
    assert core.counter.updated(lost, 1, 1.0) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 7), st.booleans()), max_size=40))
def test_every_position_is_computed_for_the_first_time_once(steps: list[tuple[str, int, bool]]):
    core = Core(a=5, b=9, c=20)
    reached = dict.fromkeys("abc", 0)
    seen = {"scheduled": 0, "first": 0, "again": 0, "decode": 0}
    for name, num, is_preempted in steps:
        if is_preempted and core.requests[name].num_computed_tokens:
            core.preempt(name)
        counts = core.counts(**{name: num})
        end = core.requests[name].num_computed_tokens
        seen["scheduled"] += num
        seen["first"] += counts.num_prompt_tokens_computed
        seen["again"] += counts.num_recomputed_tokens
        seen["decode"] += counts.num_decode_tokens
        assert counts.num_scheduled_tokens == num
        reached[name] = max(reached[name], end)
    prompts = {name: request.num_prompt_tokens for name, request in core.requests.items()}
    assert seen["first"] == sum(min(reached[name], prompts[name]) for name in "abc")
    assert seen["decode"] == sum(max(0, reached[name] - prompts[name]) for name in "abc")
    assert seen["again"] == seen["scheduled"] - seen["first"] - seen["decode"]
