"""What one API server counts: its own requests and their tokens, and its HTTP answers. Pure.

The only writer of request scope. Every method is a few array operations on cells that were looked up at the start;
what comes with every token is gathered, and `flush` adds it to the tally once for each commit.
What an iteration did is not counted here: an API server sees its own requests' part of it only.

The tokens' ledger (P6): `received` counts every token that came from an engine; each of them later becomes either
`delivered` or `undelivered`; the difference is held. The sequences' ledger: `submitted`, later `ended`; the difference
is in flight. `close_books` settles both for what a dead predecessor left open.

Which clock: time to first token and end-to-end latency are the API server's; all other times are differences between
the engine's instants. With n > 1 each sequence counts as a request under vLLM's names, as vLLM counts it, so that
ratios of its metrics mean what they mean there; the request's own view is under `wholebatch:request_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from metrics.catalogue import ENDED_REASONS, FINISHED_REASONS, HANDLERS, METHODS, STATUSES, UNDELIVERED_REASONS
from metrics.files import Origin
from metrics.layout import Histogram, Layout
from metrics.tally import Tally, TallyError

OBSERVED_REASONS: Final = ("stop", "length", "repetition")  # histograms of finished requests observe these only
REASON_ORDER: Final = ("error", "abort", "length", "repetition", "stop")  # of n sequences: the first present
OTHER: Final = "other"  # any method that has no label of its own
UNROUTED: Final = "none"  # any route that has none, as vLLM says it

Exemplify = Callable[[Histogram, float, Origin], None]  # what a histogram has observed, of which request; never raises


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """How long a sequence was where in the engine, in seconds."""

    queue_s: float
    prefill_s: float
    inference_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSequence:
    """One of a request's n sequences at its end."""

    reason: str  # one of OBSERVED_REASONS
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    max_tokens: int
    num_preemptions: int
    e2e_s: float
    decode_s: float  # first token to last
    engine: EngineTimes | None  # None: it never had a token
    longest_gap_s: float | None = None  # between two tokens; None: there were no two
    origin: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """A request whose answer is complete. `reason` is one of FINISHED_REASONS; `num_tokens` has the generated tokens of
    each of its n sequences."""

    reason: str
    num_tokens: Sequence[int]
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPAnswer:
    """One answered HTTP request. `handler` is a route's template, never a path. Sizes are as Content-Length says, 0
    where it says nothing."""

    method: str
    handler: str
    status: int
    seconds: float
    num_request_bytes: int = 0
    num_response_bytes: int = 0


class EngineRecord:
    """What this API server counts about its requests on one engine."""

    def __init__(
        self,
        tally: Tally,
        layout: Layout,
        engine: int,
        observe: Callable[[Histogram, float, int], None],
        exemplify: Exemplify,
    ) -> None:
        label = str(engine)

        def cell(name: str, **labels: str) -> int:
            return layout.cell(name, engine=label, **labels)

        self._tally = tally
        self._observe = observe
        self._exemplify = exemplify
        self._received = cell("wholebatch:received_tokens_total")
        self._delivered = cell("wholebatch:delivered_tokens_total")
        self._undelivered = {r: cell("wholebatch:undelivered_tokens_total", reason=r) for r in UNDELIVERED_REASONS}
        self._submitted = cell("wholebatch:sequences_submitted_total")
        self._ended = {r: cell("wholebatch:sequences_ended_total", finished_reason=r) for r in ENDED_REASONS}
        self._in_flight = cell("wholebatch:api_server_requests_in_flight")
        self._prefill_tokens = cell("wholebatch:api_server_prefill_tokens")
        self._success = {r: cell("vllm:request_success_total", finished_reason=r) for r in FINISHED_REASONS}
        self._requests = {r: cell("wholebatch:request_ended_total", finished_reason=r) for r in FINISHED_REASONS}
        self._stale_snapshots = cell("wholebatch:stale_snapshots_total")
        self._histograms = {name: layout.histogram(f"vllm:{name}", engine=label) for name in _HISTOGRAMS}
        self._of_requests = {
            name: layout.histogram(f"wholebatch:request_{name}", engine=label) for name in _HISTOGRAMS_OF_REQUESTS
        }
        self._num_delivered = 0  # and not in the tally yet
        self._gap_s = 0.0  # that the last tokens came after, and how many of them are not observed yet
        self._num_gaps = 0
        self.num_in_flight = 0
        self.num_prefill_tokens = 0
        self._num_announced = [0, 0]  # sequences and prompt tokens that the gauges show besides

    @property
    def num_received(self) -> int:
        """Tokens received from this engine index since the deployment began; durable."""
        return int(self._tally.cells[self._received])

    def received(self, num_tokens: int) -> None:
        """Every token of a message, whoever it is for."""
        self._tally.inc(self._received, num_tokens)

    def delivered(self, num_tokens: int) -> None:
        """About to be handed to a client's socket; in the tally with the next `flush`."""
        self._num_delivered += num_tokens

    def undelivered(self, num_tokens: int, reason: str) -> None:
        """Received, and no client will get them."""
        self._tally.inc(self._undelivered[reason], num_tokens)

    def submitted(self) -> None:
        """One sequence is about to be sent to the engine."""
        self._tally.inc(self._submitted)
        self._set_in_flight(self.num_in_flight + 1)

    def ended(self, reason: str) -> None:
        """One submitted sequence ended, as this API server sees it."""
        self._tally.inc(self._ended[reason])
        self._set_in_flight(self.num_in_flight - 1)

    def prefilling(self, num_prompt_tokens: int) -> None:
        """The prompt of a submitted sequence is to be computed; less than 0: that is over, by a token or its end."""
        self.num_prefill_tokens += num_prompt_tokens
        assert self.num_prefill_tokens >= 0, "more prompt tokens were computed than submitted"
        self._show()

    def announce(self, num_sequences: int, num_prompt_tokens: int) -> None:
        """So many more are about to be submitted, to any engine; less than 0: no longer. The gauges show it."""
        self._num_announced[0] += num_sequences
        self._num_announced[1] += num_prompt_tokens
        self._show()

    def first_token(self, seconds: float, origin: Origin | None = None) -> None:
        """A sequence's first token came, so long after the request."""
        self._observe(self._histograms["time_to_first_token_seconds"], seconds, 1)
        self._exemplary("time_to_first_token_seconds", seconds, origin)

    def request_first_token(self, seconds: float) -> None:
        """The first token of any of a request's sequences came."""
        self._observe(self._of_requests["time_to_first_token_seconds"], seconds, 1)

    def later_tokens(self, gap_s: float, num_tokens: int) -> None:
        """Later tokens of a sequence came, each so long after the one before; all observed with the next `flush`."""
        if gap_s != self._gap_s:
            self._observe_gaps()
            self._gap_s = gap_s
        self._num_gaps += num_tokens

    def flush(self) -> None:
        """Add what was gathered to the tally."""
        self._observe_gaps()
        self._tally.inc(self._delivered, self._num_delivered)
        self._num_delivered = 0

    def stale_snapshot(self) -> None:
        """A snapshot was not newer than the one held."""
        self._tally.inc(self._stale_snapshots)

    def gave_up(self, reason: str) -> None:
        """A sequence ended by abort or error; no histogram observes it."""
        self._tally.inc(self._success[reason])

    def finished(self, sequence: FinishedSequence) -> None:
        """A sequence ended as it should."""
        self._tally.inc(self._success[sequence.reason])
        num_later = sequence.num_tokens - 1
        values = {
            "e2e_request_latency_seconds": sequence.e2e_s,
            "request_decode_time_seconds": sequence.decode_s,
            "request_time_per_output_token_seconds": sequence.decode_s / num_later if num_later > 0 else 0.0,
            "request_prompt_tokens": sequence.num_prompt_tokens,
            "request_prefill_kv_computed_tokens": sequence.num_prompt_tokens - sequence.num_cached_tokens,
            "request_generation_tokens": sequence.num_tokens,
            "request_params_max_tokens": sequence.max_tokens,
            "request_num_preemptions": sequence.num_preemptions,
        }
        for name, value in values.items():
            self._observe(self._histograms[name], value, 1)
        self._exemplary("e2e_request_latency_seconds", sequence.e2e_s, sequence.origin)
        self._exemplary("inter_token_latency_seconds", sequence.longest_gap_s, sequence.origin)
        if sequence.engine is not None:
            self.engine_times(sequence.engine)

    def request_gave_up(self, reason: str) -> None:
        """A whole request ended by abort or error."""
        self._tally.inc(self._requests[reason])

    def request_ended(self, request: EndedRequest) -> None:
        """A whole request's answer is complete. As in vLLM, n and the longest sequence are observed once a request."""
        self._tally.inc(self._requests[request.reason])
        if request.reason not in OBSERVED_REASONS:
            return
        self._observe(self._histograms["request_params_n"], len(request.num_tokens), 1)
        self._observe(self._histograms["request_max_num_generation_tokens"], max(request.num_tokens), 1)
        self._observe(self._of_requests["latency_seconds"], request.latency_s, 1)
        self._observe(self._of_requests["output_tokens"], sum(request.num_tokens), 1)

    def engine_times(self, times: EngineTimes) -> None:
        """The engine told where a finished sequence's time went."""
        self._observe(self._histograms["request_queue_time_seconds"], times.queue_s, 1)
        self._observe(self._histograms["request_prefill_time_seconds"], times.prefill_s, 1)
        self._observe(self._histograms["request_inference_time_seconds"], times.inference_s, 1)

    def close_books(self) -> None:
        """Settle what a predecessor left open: its tokens reach nobody, its sequences ended with it."""
        cells = self._tally.cells
        held = cells[self._received] - cells[self._delivered] - sum(cells[c] for c in self._undelivered.values())
        in_flight = cells[self._submitted] - sum(cells[c] for c in self._ended.values())
        self._tally.inc(self._undelivered["server_lost"], held)
        self._tally.inc(self._ended["server_lost"], in_flight)

    def _observe_gaps(self) -> None:
        """The sequences of an iteration mostly have the same gap, and then it is one observation."""
        if self._num_gaps:
            self._observe(self._histograms["inter_token_latency_seconds"], self._gap_s, self._num_gaps)
            self._num_gaps = 0

    def _exemplary(self, name: str, seconds: float | None, origin: Origin | None) -> None:
        if origin is not None and seconds is not None:
            self._exemplify(self._histograms[name], seconds, origin)

    def _set_in_flight(self, num_sequences: int) -> None:
        assert num_sequences >= 0, "more sequences ended than were submitted"
        self.num_in_flight = num_sequences
        self._show()

    def _show(self) -> None:
        num_sequences, num_prompt_tokens = self._num_announced
        self._tally.set(self._in_flight, self.num_in_flight + num_sequences)
        self._tally.set(self._prefill_tokens, self.num_prefill_tokens + num_prompt_tokens)


_HISTOGRAMS: Final = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_num_preemptions",
)
_HISTOGRAMS_OF_REQUESTS: Final = ("time_to_first_token_seconds", "latency_seconds", "output_tokens")


class RequestRecord:
    """One API server's counts: an `EngineRecord` per engine, and what belongs to no engine."""

    def __init__(
        self,
        tally: Tally,
        layout: Layout,
        num_engines: int,
        exemplify: Exemplify = lambda histogram, value, origin: None,
    ) -> None:
        self._tally = tally
        self._layout = layout
        self.engines = tuple(
            EngineRecord(tally, layout, engine, self._observe, exemplify) for engine in range(num_engines)
        )
        self._http = {
            (method, handler, status): layout.cell("http_requests_total", method=method, handler=handler, status=status)
            for method in METHODS
            for handler in HANDLERS
            for status in STATUSES
        }
        duration = "http_request_duration_seconds"
        self._http_seconds = {
            (method, handler): layout.histogram(duration, method=method, handler=handler)
            for method in METHODS
            for handler in HANDLERS
        }
        self._http_all_seconds = layout.histogram("http_request_duration_highr_seconds")
        self._http_bytes = {
            handler: [layout.histogram(f"http_{what}_size_bytes", handler=handler) for what in ("request", "response")]
            for handler in HANDLERS
        }

    def answered(self, answer: HTTPAnswer) -> None:
        """One HTTP request was answered."""
        method = answer.method if answer.method in METHODS else OTHER
        handler = answer.handler if answer.handler in HANDLERS else UNROUTED
        self._tally.inc(self._http[method, handler, f"{answer.status // 100}xx"])
        self._observe(self._http_seconds[method, handler], answer.seconds, 1)
        self._observe(self._http_all_seconds, answer.seconds, 1)
        sizes = (answer.num_request_bytes, answer.num_response_bytes)
        for summary, num_bytes in zip(self._http_bytes[handler], sizes, strict=True):
            self._observe(summary, num_bytes, 1)

    def rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._tally.inc(self._layout.cell("vllm:admission_rejections_total", reason=reason))

    def wire_rejected(self, kind: str) -> None:
        """A message from another process did not parse."""
        self._tally.inc(self._layout.cell("wholebatch:wire_rejected_total", kind=kind))

    def fault(self, where: str) -> None:
        """The statistics plane failed somewhere, and a bulkhead caught it."""
        self._tally.inc(self._layout.cell("wholebatch:bulkhead_errors_total", where=where))

    def flush(self) -> None:
        """Add what was gathered to the tally: before each commit."""
        for engine in self.engines:
            engine.flush()

    def close_books(self) -> None:
        """A new incarnation begins: settle what the old one left open."""
        for engine in self.engines:
            engine.close_books()

    def _observe(self, histogram: Histogram, value: float, count: int) -> None:
        """P8: a value that cannot be observed is counted as a fault and costs no request."""
        try:
            self._tally.observe(histogram, value, count)
        except TallyError:
            self.fault("record")
