"""What each request was and where its time went, told once, at its end, to whoever exports traces.

Nothing here knows OpenTelemetry: `frontend.tracing.otlp` does, and is imported only where an endpoint is given. Without
one none of this runs: `TracedClients` stands before the engines, and `middleware` before the routes, only with tracing
on. A trace has numbers and names, never a word of a prompt or of an answer (tested).

The engine's instants are of its own clock. They are mapped onto this process's by the least delay seen between an
instant that came with tokens and their arrival here; on one host that is the time a message takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from aiohttp import web

from engine.wire import SamplingParams
from frontend.counters import Party
from frontend.engines import Delta, Generation
from frontend.errors import ApiError

OPERATIONS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
CONTEXT_HEADERS: Final = ("traceparent", "tracestate")

Attributes = dict[str, str | int | float | Sequence[str]]


@dataclass(slots=True)
class Call:
    """One HTTP request, as far as its traces say it. A list of prompts makes several requests of it."""

    operation: str
    context: Mapping[str, str]  # the headers that name the caller's trace
    model: str = ""
    response_id: str = ""


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


@web.middleware
async def middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Keeps what the HTTP request says for the requests that are made of it."""
    if request.path in OPERATIONS:
        context = {name: request.headers[name] for name in CONTEXT_HEADERS if name in request.headers}
        _CALL.set(Call(OPERATIONS[request.path], context))
    return await handler(request)


def describe(model: str, response_id: str) -> None:
    """Adds what only the route knows."""
    call = _CALL.get()
    if call is not None:
        call.model, call.response_id = model, response_id


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

    call: Call
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


@dataclass(slots=True)
class Told:
    """What a generation's coming and going says, on this process's clock."""

    arrived_at: float
    num_delivered: int = 0
    first_token_at: float | None = None
    delay_s: float = math.inf  # from an instant of the engine's to its arrival here: the least, clocks' offset included
    finished_at: float | None = None


class TracedGeneration:
    """A generation whose end is told. Otherwise it is the one it wraps."""

    def __init__(
        self, inner: Generation, arrived_at: float, clock: Callable[[], float], end: Callable[[Generation, Told], None]
    ) -> None:
        self._inner = inner
        self._clock = clock
        self._end: Callable[[Generation, Told], None] | None = end
        self._told = Told(arrived_at)

    def listen(self, on_news: Callable[[], None]) -> None:
        self._inner.listen(on_news)

    def take(self) -> list[Delta]:
        deltas = self._inner.take()
        now, told = self._clock(), self._told
        for delta in deltas:
            if delta.token_ids:
                told.delay_s = min(told.delay_s, now - self._inner.sequences[delta.index].last_at)
                told.first_token_at = now if told.first_token_at is None else told.first_token_at
        return deltas

    def stop(self, index: int) -> None:
        self._inner.stop(index)

    def delivered(self, num_tokens: int) -> None:
        self._inner.delivered(num_tokens)
        self._told.num_delivered += num_tokens

    def undelivered(self, num_tokens: int, reason: str) -> None:
        self._inner.undelivered(num_tokens, reason)

    def finish(self) -> None:
        self._inner.finish()
        if self._told.finished_at is None:
            self._told.finished_at = self._clock()

    def join(self, party: Party) -> None:
        self._inner.join(party)

    async def committed(self) -> None:
        await self._inner.committed()

    def close(self) -> None:
        self._inner.close()
        end, self._end = self._end, None
        if end is not None:
            end(self._inner, self._told)


class Clients(Protocol):
    """The engines; `frontend.engines.engine_client` has them."""

    async def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, n: int, priority: int, arrived_at: float
    ) -> Generation: ...


@dataclass(slots=True, kw_only=True)
class TracedClients:
    """The engines, with every request's end told to `sink`. P8: whatever fails in telling it, `on_fault` hears of it
    and the request does not."""

    clients: Clients
    sink: Callable[[Trace], None]
    on_fault: Callable[[Exception], None]
    clock: Callable[[], float] = field(default=time.monotonic)

    async def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, n: int, priority: int, arrived_at: float
    ) -> TracedGeneration:
        """As the engines' own; raises what that raises."""
        call = _CALL.get() or Call("text_completion", {})
        attributes = _asked(call, len(prompt_token_ids), sampling, n)
        try:
            inner = await self.clients.submit(prompt_token_ids, sampling, n=n, priority=priority, arrived_at=arrived_at)
        except ApiError as error:
            self._tell(partial(_refused, call, attributes, arrived_at, self.clock(), error))
            raise

        def end(generation: Generation, told: Told) -> None:
            self._tell(partial(_ended, call, attributes, generation, told, self.clock()))

        return TracedGeneration(inner, arrived_at, self.clock, end)

    def _tell(self, make: Callable[[], Trace]) -> None:
        try:
            self.sink(make())
        except Exception as error:  # noqa: BLE001  a bulkhead
            self.on_fault(error)


# --- what is told; pure ---


def _asked(call: Call, num_prompt_tokens: int, sampling: SamplingParams, n: int) -> Attributes:
    """Names of OpenTelemetry's semantic conventions for generative AI, and the older ones that vLLM has.
    Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/"""
    attributes: Attributes = {
        "gen_ai.operation.name": call.operation,
        "gen_ai.provider.name": "wholebatch",
        "gen_ai.request.model": call.model,
        "gen_ai.response.model": call.model,
        "gen_ai.response.id": call.response_id,
        "gen_ai.request.id": call.response_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.n": n,
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.prompt_tokens": num_prompt_tokens,
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


def _refused(call: Call, attributes: Attributes, begin: float, end: float, error: ApiError) -> Trace:
    return Trace(
        call=call,
        attributes=attributes | {"gen_ai.latency.e2e": end - begin},
        begin=begin,
        end=end,
        stages=(),
        error_type=error.code or type(error).__name__,
        time_to_first_token_s=None,
        time_per_output_token_s=None,
    )


def _ended(call: Call, attributes: Attributes, generation: Generation, told: Told, closed_at: float) -> Trace:
    begin, end = told.arrived_at, closed_at if told.finished_at is None else told.finished_at
    reasons = [sequence.reason or "abort" for sequence in generation.sequences]
    is_whole = told.finished_at is not None and not {"error", "abort"} & set(reasons)
    first_token_s = None if told.first_token_at is None else told.first_token_at - begin
    stages, told_by_engine = _stages(generation, told.delay_s, begin, end)
    answer: Attributes = {
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.output_tokens": told.num_delivered,
        "gen_ai.usage.completion_tokens": told.num_delivered,
        "gen_ai.usage.num_sequences": len(reasons),
        "gen_ai.latency.e2e": end - begin,
    }
    if first_token_s is not None:
        answer["gen_ai.latency.time_to_first_token"] = first_token_s
    return Trace(
        call=call,
        attributes=attributes | answer | told_by_engine,
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
