"""One request on its way: its n sequences on one engine, what has arrived of them, and how it is counted.

Between the engine's connection, which calls `on_output` and `fail`, and whoever answers the client, who listens, takes,
writes, and calls `delivered`, `finish` and, in the end, `close`. All of it synchronous: a token wakes no coroutine. It
reads no socket and no clock: instants are arguments or come from the `clock` given.

An `Observer` is told of its beginning and end, and of tokens that come; it can change nothing.

Every token that `on_output` takes is held until it is counted as delivered or undelivered; `close` counts what is
still held. So nothing is ever held by a request that is over (P6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.wire import Finish, Output, SamplingParams, Start, TokenLogprobs
from frontend.context import RequestContext
from frontend.counters import (
    OBSERVED_REASONS,
    REASON_ORDER,
    EndedRequest,
    EngineRecord,
    EngineTimes,
    FinishedSequence,
    GroupCommit,
)
from frontend.errors import ApiError, EngineLost


@dataclass(slots=True)
class Delta:
    """What has newly arrived of one of the n sequences. With `finish` it is the sequence's last; `start` comes with
    the first token, and again after a preemption."""

    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    start: Start | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the client asked for, but for the prompt's tokens. `context.arrived_at` is on the generation's clock."""

    context: RequestContext
    num_prompt_tokens: int
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: str | None = None


class Ask(NamedTuple):
    """One prompt of a request."""

    prompt_token_ids: list[int]
    asked: Asked


class Observer(Protocol):
    """Watches one generation, or a request that was refused and never became one. No call raises (P8)."""

    def refused(self, error: ApiError) -> None:
        """No engine takes the request."""

    def arrived(self, at: float) -> None:
        """Tokens have come that the engine made at its instant `at`."""

    def finished(self) -> None:
        """The answer is about to be complete."""

    def closed(self, generation: Generation) -> None:
        """The request is over, however it ended."""


class EngineSide(Protocol):
    """The connection that a generation's sequences run on."""

    def abort(self, request_ids: Sequence[int], reason: str) -> None:
        """Tell the engine that these are not wanted any more; their tokens still under way are undelivered so."""

    def forget(self, request_id: int) -> None:
        """The engine has ended this sequence."""


@dataclass(slots=True)
class SequenceState:
    """One of the n sequences. Instants are the engine's, but for `ended_at`, which is the API server's."""

    index: int
    request_id: int
    num_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    ended_at: float = 0.0
    longest_gap_s: float | None = None  # None: there were no two tokens
    start: Start | None = None  # the newest one told
    reason: str | None = None  # None: still open


def _nobody() -> None:
    """Stands for a listener while there is none."""


class Generation:
    """`listen`, then `take` the deltas that have arrived."""

    def __init__(
        self,
        engine: EngineSide,
        record: EngineRecord,
        group: GroupCommit,
        clock: Callable[[], float],
        asked: Asked,
        request_ids: Sequence[int],
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._record = record
        self._group = group
        self._clock = clock
        self._asked = asked
        self._observer = observer
        self.sequences = [SequenceState(index, request_id) for index, request_id in enumerate(request_ids)]
        self._pending: list[Delta] = []
        self._on_news: Callable[[], None] = _nobody
        self._num_held = 0
        self.num_delivered = 0
        self._has_first_token = False
        self._is_finished = False
        self._is_closed = False
        self.error: EngineLost | None = None
        for _ in self.sequences:
            record.submitted()
            record.prefilling(asked.num_prompt_tokens)

    # --- from the engine's connection ---

    def on_output(self, sequence: SequenceState, output: Output, at: float) -> None:
        """New tokens of an open sequence, or its end; `at` is the engine's instant. They count as received already."""
        num_tokens = len(output.token_ids)
        self._num_held += num_tokens
        if output.first_index != sequence.num_tokens:
            lost = f"tokens {sequence.num_tokens} to {output.first_index} of the answer were lost on the way"
            self.fail(EngineLost(lost, code="tokens_lost"))
            return
        if num_tokens:
            self._observe_tokens(sequence, num_tokens, at)
        if output.start is not None:
            sequence.start = output.start
        if output.finish is not None:
            self._end(sequence, output.finish.reason)
        self._pending.append(Delta(sequence.index, output.token_ids, output.logprobs, output.finish, output.start))
        self._on_news()

    def fail(self, error: EngineLost) -> None:
        """The engine has gone, or the answer has a hole: what is open ends here, after what has arrived before."""
        ended = self._end_open("error")
        if ended and self.error is None:
            self.error = error
        self._on_news()

    # --- from whoever answers the client ---

    def listen(self, on_news: Callable[[], None]) -> None:
        """It is called whenever there is something to take, or an error to meet; at once where there is already."""
        self._on_news = on_news
        if self._pending or self.error is not None:
            on_news()

    def take(self) -> list[Delta]:
        """Whatever has arrived since; raises EngineLost once there is nothing before it."""
        if self.error is not None:
            if not self._pending:
                raise self.error
            self._on_news()  # the error is still to be met
        deltas, self._pending = self._pending, []
        return deltas

    def stop(self, index: int) -> None:
        """A stop string was found: end this sequence here. Nothing more of it is yielded."""
        sequence = self.sequences[index]
        if sequence.reason is None:
            self._engine.abort([sequence.request_id], "stop")
            self._end(sequence, "stop")
        sequence.reason = "stop"
        dropped = [delta for delta in self._pending if delta.index == index]
        self._pending = [delta for delta in self._pending if delta.index != index]
        self.undelivered(sum(len(delta.token_ids) for delta in dropped), "stop")

    def delivered(self, num_tokens: int) -> None:
        """So many tokens are about to be written to the client, once that is committed."""
        self._settle(num_tokens)
        self.num_delivered += num_tokens
        self._record.delivered(num_tokens)

    def undelivered(self, num_tokens: int, reason: str) -> None:
        """So many tokens that arrived will not be written."""
        self._settle(num_tokens)
        self._record.undelivered(num_tokens, reason)

    def finish(self) -> None:
        """Every sequence has ended and the answer is about to be complete: count the request. Idempotent."""
        if self._is_finished or self._is_closed:
            return
        self._is_finished = True
        reasons = {sequence.reason for sequence in self.sequences}
        assert None not in reasons, "a request is finished while a sequence of it is open"
        reason = next(reason for reason in REASON_ORDER if reason in reasons)
        self._count_sequences()
        latency_s = self._clock() - self._asked.context.arrived_at
        num_tokens = [sequence.num_tokens for sequence in self.sequences]
        self._record.request_ended(EndedRequest(reason=reason, num_tokens=num_tokens, latency_s=latency_s))
        if self._observer is not None:
            self._observer.finished()

    def close(self) -> None:
        """End what still runs, and count what is still open. Idempotent; call it however the request ends."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_open("abort")
        self._on_news = _nobody
        self._pending.clear()
        failed = self.error is not None or any(sequence.reason == "error" for sequence in self.sequences)
        if self._num_held:
            self.undelivered(self._num_held, "error" if failed else "disconnect")
        if not self._is_finished:
            self._count_sequences()
            self._record.request_gave_up("error" if failed else "abort")
        self._group.soon()
        if self._observer is not None:
            self._observer.closed(self)

    # --- inside ---

    def _count_sequences(self) -> None:
        """Each by its own reason, as vLLM does: one that had ended before the request was given up, ended as it did."""
        for sequence in self.sequences:
            assert sequence.reason is not None, "a sequence is open at its request's end"
            if sequence.reason in OBSERVED_REASONS:
                self._record.finished(self._finished(sequence, sequence.reason))
            else:
                self._record.gave_up(sequence.reason)

    def _observe_tokens(self, sequence: SequenceState, num_tokens: int, at: float) -> None:
        if self._observer is not None:
            self._observer.arrived(at)
        num_later, gap_s = num_tokens, (at - sequence.last_at) / num_tokens
        if sequence.num_tokens == 0:
            self._observe_first_token()
            sequence.first_at = at
            num_later, gap_s = num_tokens - 1, 0.0
        if num_later:
            self._record.later_tokens(gap_s, num_later)
            sequence.longest_gap_s = max(sequence.longest_gap_s or 0.0, gap_s)
        sequence.last_at = at
        sequence.num_tokens += num_tokens

    def _observe_first_token(self) -> None:
        context = self._asked.context
        seconds = self._clock() - context.arrived_at
        self._record.prefilling(-self._asked.num_prompt_tokens)
        self._record.first_token(seconds, context.origin)
        if not self._has_first_token:
            self._has_first_token = True
            self._record.request_first_token(seconds)

    def _end(self, sequence: SequenceState, reason: str) -> None:
        sequence.reason = reason
        sequence.ended_at = self._clock()
        if sequence.num_tokens == 0:
            self._record.prefilling(-self._asked.num_prompt_tokens)
        self._record.ended(reason)
        self._engine.forget(sequence.request_id)

    def _end_open(self, reason: str) -> bool:
        """End every open sequence; returns whether there was any."""
        still_open = [sequence for sequence in self.sequences if sequence.reason is None]
        if still_open:
            undelivered = "disconnect" if reason == "abort" else "error"
            self._engine.abort([sequence.request_id for sequence in still_open], undelivered)
        for sequence in still_open:
            self._end(sequence, reason)
        return bool(still_open)

    def _settle(self, num_tokens: int) -> None:
        assert 0 <= num_tokens <= self._num_held, f"{num_tokens} tokens settled, {self._num_held} held"
        self._num_held -= num_tokens

    def _finished(self, sequence: SequenceState, reason: str) -> FinishedSequence:
        start = sequence.start
        return FinishedSequence(
            reason=reason,
            num_prompt_tokens=self._asked.num_prompt_tokens,
            num_cached_tokens=0 if start is None else start.num_cached_tokens,
            num_tokens=sequence.num_tokens,
            max_tokens=self._asked.sampling.max_tokens,
            num_preemptions=0 if start is None else start.num_preemptions,
            e2e_s=sequence.ended_at - self._asked.context.arrived_at,
            decode_s=sequence.last_at - sequence.first_at,
            engine=None if start is None else _engine_times(start, sequence),
            longest_gap_s=sequence.longest_gap_s,
            origin=self._asked.context.origin,
        )


def _engine_times(start: Start, sequence: SequenceState) -> EngineTimes:
    return EngineTimes(
        queue_s=start.scheduled_at - start.arrived_at,
        prefill_s=sequence.first_at - start.scheduled_at,
        inference_s=sequence.last_at - start.scheduled_at,
    )
