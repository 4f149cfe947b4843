"""Messages between engines and API servers. Pure.

`engine.wire.codec` makes them bytes and checks them by what is declared here; whoever receives something else counts it
and drops it.

A DEALER's routing identity is `identity(api_server, incarnation)`. The first message on a connection is `Hello`.
Instants (`at`, `*_at`) are seconds of the engine's monotonic clock: only differences between them mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

from msgspec import Meta

from engine.bounds import Count, Finite, one_of
from engine.wire.codec import WireError, decode, kinds
from engine.wire.sampling import SamplingParams, TokenLogprobs

FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
MAX_N: Final = 128
MAX_SALT_CHARS: Final = 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """An API server's first words to one engine incarnation: how many tokens it has received from this engine
    index since the deployment began (its durable count), so that the engine can book the rest as lost."""

    api_server: Count
    incarnation: Count
    engine_incarnation: Count
    received_tokens: Count


@dataclass(frozen=True, slots=True)
class Submit:
    """One prompt, and n sequences to generate from it. Their ids are `request_id` and the n - 1 after it, the sender's
    own, unique within its incarnation. What was computed under one `cache_salt` is never found under another."""

    request_id: Count
    engine_incarnation: Count
    prompt_token_ids: list[Count]
    sampling: SamplingParams
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0  # lower is served earlier
    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """The sender no longer wants these; unknown ids are ignored (they may have finished meanwhile)."""

    request_ids: list[Count]


class Start(NamedTuple):
    """A sequence's life up to its first token, sent with that token, and again with the first token after each
    preemption: so whoever ends a request early, at a stop string, knows as much of it as the engine."""

    arrived_at: Finite
    scheduled_at: Finite  # the first time
    num_cached_tokens: Count  # of the prompt, found in the prefix cache at the first admission
    num_preemptions: Count  # so far


class Finish(NamedTuple):
    """How a sequence ended; `message` is set with reason `error` only."""

    reason: Annotated[str, one_of(*FINISH_REASONS)]
    stop_token_id: Count | None
    message: str | None


class Output(NamedTuple):
    """New tokens of one sequence; `first_index` counts generated tokens from 0, so that a gap is seen. The first
    token never comes without the sequence's `start`."""

    request_id: Count
    first_index: Count
    token_ids: list[Count]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    start: Start | None


@dataclass(frozen=True, slots=True)
class Outputs:
    """Everything one iteration made for one API server; `at` is when its tokens were on the host."""

    engine_incarnation: Count
    at: Finite
    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The engine does not know this connection (it was given up as lost, or never said Hello): all of its
    requests are gone, and the API server must connect anew."""

    engine_incarnation: Count
    reason: str


def identity(api_server: int, incarnation: int) -> bytes:
    """The DEALER's routing identity."""
    return f"{api_server}.{incarnation}".encode()


def parse_identity(raw: bytes) -> tuple[int, int]:
    """(api_server, incarnation); raises WireError."""
    index, _, incarnation = raw.partition(b".")
    if len(raw) <= 40 and index.isdigit() and incarnation.isdigit():
        pair = int(index), int(incarnation)
        if identity(*pair) == raw:  # one process, one identity: no leading zeros
            return pair
    raise WireError(f"identity is not INDEX.INCARNATION: {raw[:40]!r}")


def work_endpoint(directory: str, engine: int, incarnation: int) -> str:
    """Where one engine incarnation binds its ROUTER. A path per incarnation: no message reaches the wrong one."""
    return f"ipc://{directory}/engine-{engine}.{incarnation}.work"


_FROM_API_SERVER: Final = kinds(Hello, Submit, Abort)
_FROM_ENGINE: Final = kinds(Outputs, Goodbye)


def decode_from_api_server(raw: bytes) -> Hello | Submit | Abort:
    """What an engine may receive; raises WireError."""
    message: Hello | Submit | Abort = decode(raw, _FROM_API_SERVER)
    return message


def decode_from_engine(raw: bytes) -> Outputs | Goodbye:
    """What an API server may receive; raises WireError."""
    message: Outputs | Goodbye = decode(raw, _FROM_ENGINE)
    if isinstance(message, Outputs):
        for output in message.outputs:
            if output.first_index == 0 or output.logprobs is not None:  # never so of most tokens
                _check_output(output)
    return message


def _check_output(output: Output) -> None:
    """What no single field says."""
    if output.logprobs is not None and len(output.logprobs) != len(output.token_ids):
        raise WireError(f"logprobs and token_ids differ in length, request_id: {output.request_id}")
    if output.first_index == 0 and output.token_ids and output.start is None:
        raise WireError(f"first token without the sequence's start, request_id: {output.request_id}")
