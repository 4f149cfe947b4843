"""What each request was and where its time went, told once, at its end, to whoever exports traces.

A `RequestTrace` observes one generation. Nothing here knows OpenTelemetry: `frontend.tracing.otlp` does, and is
imported only where an endpoint is given; without one no request has an observer. A trace has numbers and names, never
a word of a prompt or of an answer (tested).

The engine's instants are of its own clock. They are mapped onto this process's by the least delay seen between an
instant that came with tokens and their arrival here; on one host that is the time a message takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from frontend.context import RequestContext
from frontend.engines import Asked, Generation
from frontend.errors import ApiError
from metrics.bulkhead import Bulkhead

Attributes = dict[str, str | int | float | Sequence[str]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a request's life, on this process's monotonic clock."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One request that is over, on this process's monotonic clock. `error_type` is None where it ended as it should,
    `abort` where the client went, else what failed."""

    context: RequestContext
    attributes: Attributes
    begin: float
    end: float
    stages: tuple[Stage, ...]
    error_type: str | None
    time_to_first_token_s: float | None
    time_per_output_token_s: float | None

    @property
    def has_failed(self) -> bool:
        """Whether it was this server's fault; a client may go whenever it likes."""
        return self.error_type not in (None, "abort")


class RequestTrace:
    """Observes one request and tells `sink` of it when it is over."""

    def __init__(
        self,
        asked: Asked,
        sink: Callable[[Trace], None],
        bulkhead: Bulkhead,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asked = asked
        self._sink = sink
        self._bulkhead = bulkhead
        self._clock = clock
        self.first_token_at: float | None = None
        self.delay_s = (
            math.inf
        )  # the least, from an instant of the engine's to its arrival here, clocks' offset included
        self.finished_at: float | None = None

    def refused(self, error: ApiError) -> None:
        with self._bulkhead.around("tracing"):
            self._sink(_refused(self._asked, self._clock(), error))

    def arrived(self, at: float) -> None:
        with self._bulkhead.around("tracing"):
            now = self._clock()
            self.delay_s = min(self.delay_s, now - at)
            if self.first_token_at is None:
                self.first_token_at = now

    def finished(self) -> None:
        with self._bulkhead.around("tracing"):
            self.finished_at = self._clock()

    def closed(self, generation: Generation) -> None:
        with self._bulkhead.around("tracing"):
            self._sink(_ended(self._asked, generation, self, self._clock()))


# --- what is told; pure ---


def _attributes(asked: Asked) -> Attributes:
    """Names of OpenTelemetry's semantic conventions for generative AI, and the older ones that vLLM has.
    Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/"""
    context, sampling, n = asked.context, asked.sampling, asked.n
    attributes: Attributes = {
        "gen_ai.operation.name": context.operation,
        "gen_ai.provider.name": "wholebatch",
        "gen_ai.request.model": context.model,
        "gen_ai.response.model": context.model,
        "gen_ai.response.id": context.response_id,
        "gen_ai.request.id": context.response_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.n": n,
        "gen_ai.usage.input_tokens": asked.num_prompt_tokens,
        "gen_ai.usage.prompt_tokens": asked.num_prompt_tokens,
    }
    optional: Attributes = {
        "gen_ai.request.choice.count": n if n > 1 else 0,
        "gen_ai.request.top_k": max(sampling.top_k, 0),
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    attributes |= {name: value for name, value in optional.items() if value}
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _refused(asked: Asked, end: float, error: ApiError) -> Trace:
    begin = asked.context.arrived_at
    return Trace(
        context=asked.context,
        attributes=_attributes(asked) | {"gen_ai.latency.e2e": end - begin},
        begin=begin,
        end=end,
        stages=(),
        error_type=error.code or type(error).__name__,
        time_to_first_token_s=None,
        time_per_output_token_s=None,
    )


def _ended(asked: Asked, generation: Generation, seen: RequestTrace, closed_at: float) -> Trace:
    begin, end = asked.context.arrived_at, closed_at if seen.finished_at is None else seen.finished_at
    reasons = [sequence.reason or "abort" for sequence in generation.sequences]
    is_whole = seen.finished_at is not None and not {"error", "abort"} & set(reasons)
    first_token_s = None if seen.first_token_at is None else seen.first_token_at - begin
    stages, told_by_engine = _stages(generation, seen.delay_s, begin, end)
    answer: Attributes = {
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.output_tokens": generation.num_delivered,
        "gen_ai.usage.completion_tokens": generation.num_delivered,
        "gen_ai.usage.num_sequences": len(reasons),
        "gen_ai.latency.e2e": end - begin,
    }
    if first_token_s is not None:
        answer["gen_ai.latency.time_to_first_token"] = first_token_s
    return Trace(
        context=asked.context,
        attributes=_attributes(asked) | answer | told_by_engine,
        begin=begin,
        end=end,
        stages=stages,
        error_type=None if is_whole else _error_type(generation, reasons),
        time_to_first_token_s=first_token_s if is_whole else None,
        time_per_output_token_s=_time_per_output_token(generation) if is_whole else None,
    )


def _time_per_output_token(generation: Generation) -> float | None:
    """Of the longest sequence, after its first token; None where that was its only one."""
    longest = max(generation.sequences, key=lambda sequence: sequence.num_tokens)
    return (longest.last_at - longest.first_at) / (longest.num_tokens - 1) if longest.num_tokens > 1 else None


def _error_type(generation: Generation, reasons: Sequence[str]) -> str:
    if generation.error is not None:
        return generation.error.code or type(generation.error).__name__
    return "generation_failed" if "error" in reasons else "abort"


def _stages(generation: Generation, delay_s: float, begin: float, end: float) -> tuple[tuple[Stage, ...], Attributes]:
    """Queue, prefill and decode, from the first of n sequences to the last, and what the engine says besides. Nothing
    before the first token: only with it does the engine tell."""
    starts = [sequence.start for sequence in generation.sequences if sequence.start is not None]
    started = [sequence for sequence in generation.sequences if sequence.num_tokens]
    if not starts or not started:
        return (), {}
    edges = (
        min(start.arrived_at for start in starts),
        min(start.scheduled_at for start in starts),
        min(sequence.first_at for sequence in started),
        max(sequence.last_at for sequence in started),
    )
    queued, scheduled, first, last = edges
    latencies: Attributes = {
        "gen_ai.latency.time_in_queue": scheduled - queued,
        "gen_ai.latency.time_in_model_prefill": first - scheduled,
        "gen_ai.latency.time_in_model_decode": last - first,
        "gen_ai.latency.time_in_model_inference": last - scheduled,
        "gen_ai.usage.cache_read.input_tokens": min(start.num_cached_tokens for start in starts),
        "wholebatch.num_preemptions": sum(start.num_preemptions for start in starts),
    }
    here = [min(max(edge + delay_s, begin), end) for edge in edges]  # no child outside its parent
    names = ("queue", "prefill", "decode")
    return tuple(Stage(name, here[i], here[i + 1]) for i, name in enumerate(names)), latencies
