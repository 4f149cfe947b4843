"""Stand-ins for the world outside a pure core: time, and a network that does its worst."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine import wire
from engine.schedule.batch import Batch, SampledToken, ScheduledSequence
from engine.wire import Finish, SamplingParams, Start, Submit, TokenLogprobs
from frontend.context import RequestContext
from frontend.counters.group_commit import GroupCommit
from frontend.engines import Admission, Ask, Asked, Delta, InFlight, Limits
from metrics.bulkhead import Bulkhead

T = TypeVar("T")


class FakeClock:
    """A clock that moves when told to. Call it to read it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, f"time does not go back: {seconds}"
        self.now += seconds

    def skewed(self, offset: float, rate: float) -> Callable[[], float]:
        """Another process's clock: it started elsewhere and runs a little faster or slower than this one."""
        return lambda: offset + rate * self.now


class LossyChannel(Generic[T]):
    """Messages under way: each may be delivered in any order, late, twice, or never.

    `pick` chooses a message by any number, so that a test's strategy need not know how many there are; 0 is the
    oldest, -1 the newest. At most `capacity` are under way: the oldest are lost."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._under_way: list[T] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, message: T) -> None:
        self._under_way.append(message)
        del self._under_way[: -self._capacity]

    def deliver(self, pick: int = 0, *, again: bool = False) -> T:
        """Take one message out; `again` leaves it under way, to be delivered another time."""
        index = pick % len(self._under_way)
        return self._under_way[index] if again else self._under_way.pop(index)

    def lose(self, pick: int = 0) -> None:
        del self._under_way[pick % len(self._under_way)]


class FakeRunner:
    """A model without weights: a token is a hash of all tokens before it, through a KV cache as real as a model's.

    The hash of a position is made from its token and from what the cache holds at the position before, found through
    the block table. So batching, chunking, preemption and the prefix cache cannot change a token, unless a block was
    given away too early, shared wrongly or never written; `run` then fails.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._slots: list[int | None] = [None] * (num_blocks * block_size)
        self.batches: list[list[tuple[int, int, int]]] = []  # of each run: (sequence id, start, number of tokens)
        self.released: set[int] = set()

    def run(self, batch: Batch) -> list[SampledToken]:
        assert batch.sequences, "an iteration without work"
        ids = [part.sequence_id for part in batch.sequences]
        assert len(set(ids)) == len(ids), f"a sequence twice in one batch: {ids}"
        assert self.released.isdisjoint(ids), f"a sequence after its end: {ids}"
        self.batches.append([(part.sequence_id, part.start, part.num_tokens) for part in batch.sequences])
        hashes = [self._compute(part) for part in batch.sequences]
        return [
            SampledToken(value % self._vocab_size, None)
            for part, value in zip(batch.sequences, hashes, strict=True)
            if part.samples
        ]

    def _compute(self, part: ScheduledSequence) -> int:
        """Read the cache up to `start`, write it from there; the newest hash."""
        assert part.num_tokens > 0, f"sequence {part.sequence_id} is scheduled without a token"
        assert len(part.block_table) * self._block_size >= part.start + part.num_tokens, "a position without a block"
        value = 0
        for position in range(part.start + part.num_tokens):
            value = prefix_hash(value, part.token_ids[position])
            block, offset = divmod(position, self._block_size)
            slot = part.block_table[block] * self._block_size + offset
            if position < part.start:
                assert self._slots[slot] == value, f"position {position} of sequence {part.sequence_id} is not cached"
            else:
                self._slots[slot] = value
        return value

    def release(self, sequence_ids: Sequence[int]) -> None:
        assert self.released.isdisjoint(sequence_ids), f"released twice: {sequence_ids}"
        self.released.update(sequence_ids)


def prefix_hash(previous: int, token_id: int) -> int:
    """The hash of a prefix from that of the prefix without its last token (0 for the empty one)."""
    return (previous * 1_000_003 + token_id + 1) % (2**61 - 1)


def fake_output(prompt_token_ids: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """What a FakeRunner's sequence generates, worked out without any engine."""
    value, output = 0, []
    for token_id in prompt_token_ids:
        value = prefix_hash(value, token_id)
    for _ in range(num_tokens):
        output.append(value % vocab_size)
        value = prefix_hash(value, output[-1])
    return output


# --- the engines, as the OpenAI routes see them ---


def fake_delta(
    index: int,
    token_ids: list[int],
    logprobs: list[TokenLogprobs] | None = None,
    finish: Finish | None = None,
    start: Start | None = None,
) -> Delta:
    """New tokens of one sequence, and nothing else about it unless it is given."""
    return Delta(index, token_ids, logprobs, finish, start)


def fake_asked(
    *, num_prompt_tokens: int = 1, sampling: SamplingParams | None = None, n: int = 1, arrived_at: float = 0.0
) -> Asked:
    """What a client asked for, its context made up."""
    context = RequestContext(
        operation="text_completion", model="a-model", response_id="cmpl-1", arrived_at=arrived_at, trace_headers={}
    )
    return Asked(
        context=context,
        num_prompt_tokens=num_prompt_tokens,
        sampling=sampling or SamplingParams(max_tokens=100),
        n=n,
    )


def no_admission() -> Admission:
    """Whoever comes is admitted."""
    return Admission(
        Limits(),
        own=lambda: InFlight(0, 0),
        others=lambda: InFlight(0, 0),
        announce=lambda more: None,
        on_rejected=lambda limit: None,
    )


def fake_group(commit: Callable[[], None]) -> GroupCommit:
    """A group commit whose faults nobody counts."""
    return GroupCommit(commit, Bulkhead(lambda where: None, logging.getLogger(__name__)))


def fake_start(*, num_cached_tokens: int = 0) -> Start:
    """An engine's first word on a sequence, times left out."""
    return Start(0.0, 0.0, num_cached_tokens, 0)


def fake_finish(reason: str, *, message: str | None = None) -> Finish:
    """An engine's last word on a sequence."""
    return Finish(reason, None, message)


class FakeGeneration:
    """Plays a script, one list of deltas a wake-up; an exception in it is raised, and None waits for ever.

    `log` gets every call in order; several may share one, so that the order of counting, committing and writing is
    seen. `counts` sums the tokens that were accounted for.
    """

    def __init__(self, script: Sequence[Sequence[Delta] | Exception | None], log: list[str] | None = None) -> None:
        self.script = list(script)  # what is still to come
        self._has_news = False
        self.log: list[str] = [] if log is None else log
        self.counts: Counter[str] = Counter()
        self.is_finished = False
        self.closed = asyncio.Event()

    def listen(self, on_news: Callable[[], None]) -> None:
        self._on_news = on_news
        self._next_soon()

    def take(self) -> Sequence[Delta]:
        if not self._has_news:
            return []
        self._has_news = False
        deltas = self.script.pop(0)
        if isinstance(deltas, Exception):
            raise deltas
        self._next_soon()
        assert deltas is not None
        return deltas

    def _next_soon(self) -> None:
        if self.script and self.script[0] is not None:
            asyncio.get_running_loop().call_soon(self._arrive)

    def _arrive(self) -> None:
        self._has_news = True
        self._on_news()

    def stop(self, index: int) -> None:
        self.log.append(f"stop {index}")

    def delivered(self, num_tokens: int) -> None:
        self.counts["delivered"] += num_tokens
        self.log.append("count")

    def undelivered(self, num_tokens: int, reason: str) -> None:
        self.counts[reason] += num_tokens

    def finish(self) -> None:
        assert not self.is_finished, "finished twice"
        assert not self.closed.is_set(), "finished after it was closed"
        self.is_finished = True
        self.log.append("finish")

    def close(self) -> None:
        if not self.closed.is_set():
            self.log.append("close")
        self.closed.set()


@dataclass
class FakeAsk:
    """What was submitted, and the generation that plays for it."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    n: int
    priority: int
    cache_salt: str | None
    context: RequestContext
    generation: FakeGeneration


Script = Sequence[Sequence[Delta] | Exception | None]  # what a generation plays


class FakeClients:
    """Plays the next script for each request that is submitted; an exception in place of a script is raised."""

    def __init__(self, *scripts: Script | Exception) -> None:
        self.scripts = list(scripts)
        self.log: list[str] = []
        self.group = fake_group(lambda: self.log.append("commit"))
        self.asks: list[FakeAsk] = []
        self.has_taken_all = asyncio.Event()

    def check(self, num_sequences: int) -> None:
        pass

    def submit(self, asks: Sequence[Ask]) -> list[FakeGeneration]:
        return [self._begin(*ask) for ask in asks]

    def _begin(self, prompt_token_ids: list[int], asked: Asked) -> FakeGeneration:
        submit = Submit(0, 1, prompt_token_ids, asked.sampling, asked.priority, asked.n, asked.cache_salt)
        wire.decode_from_api_server(wire.encode(submit))  # or it raises
        script = self.scripts.pop(0)
        if not self.scripts:
            self.has_taken_all.set()
        if isinstance(script, Exception):
            raise script
        generation = FakeGeneration(script, self.log)
        self.asks.append(
            FakeAsk(
                prompt_token_ids,
                asked.sampling,
                asked.n,
                asked.priority,
                asked.cache_salt,
                asked.context,
                generation,
            )
        )
        return generation
