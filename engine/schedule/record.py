"""What an iteration ran, as increments of the engine's tally. Pure.

The scheduler decides and counts (`IterationCounts`), the recorder writes it down, the loop commits and only then sends.
The beacon counts what it alone sees, in cells of its own. Nothing here is counted from what comes back to an API
server: that is the whole point.

A new whole-iteration histogram is one declaration in `metrics.catalogue.engine` and one line in HISTOGRAMS below. Cells
are resolved by name once, at construction; every method is a few array operations, whatever the batch size.

Laws that the figures keep at any time (`metrics.audit`): the sum of iteration tokens is prompt tokens computed +
recomputed + generated; as many observations as iterations; accepted = finished + running + waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from engine.schedule.batch import IterationCounts
from metrics.catalogue import BULKHEADS, FINISHED_REASONS, LOST_REASONS, PHASES, STAGES
from metrics.layout import Layout
from metrics.tally import Tally

# What one iteration observes in each whole-iteration histogram.
HISTOGRAMS: Final[Mapping[str, Callable[[IterationCounts], float]]] = {
    "vllm:iteration_tokens_total": lambda c: c.num_iteration_tokens,
    "wholebatch:iteration_scheduled_tokens": lambda c: c.num_scheduled_tokens,
    "wholebatch:iteration_requests": lambda c: c.num_requests,
}

# The same, where an iteration without any is not observed.
HISTOGRAMS_OF_SOME: Final[Mapping[str, Callable[[IterationCounts], float]]] = {
    "wholebatch:iteration_prefill_tokens": lambda c: c.num_prefill_tokens,
    "wholebatch:iteration_decode_tokens": lambda c: c.num_decode_tokens,
    "wholebatch:iteration_preemptions": lambda c: c.num_preemptions,
}

# What one iteration adds to each counter.
COUNTERS: Final[Mapping[str, Callable[[IterationCounts], float]]] = {
    "vllm:generation_tokens_total": lambda c: c.num_generated_tokens,
    "vllm:num_preemptions_total": lambda c: c.num_preemptions,
    "vllm:prefix_cache_queries_total": lambda c: c.num_cache_queries,
    "vllm:prefix_cache_hits_total": lambda c: c.num_cache_hits,
    "vllm:prompt_tokens_total": lambda c: c.num_completed_prompt_tokens,
    "vllm:prompt_tokens_cached_total": lambda c: c.num_completed_cached_tokens,
    "wholebatch:prompt_tokens_computed_total": lambda c: c.num_prompt_tokens_computed,
    "wholebatch:recomputed_tokens_total": lambda c: c.num_recomputed_tokens,
    "wholebatch:sampling_faults_total": lambda c: c.num_sampling_faults,
}


class Recorder:
    """Writes one engine's tally. Not thread-safe: the engine's loop owns it."""

    __slots__ = (
        "_accepted",
        "_by_source",
        "_counters",
        "_device_hits",
        "_durations",
        "_faults",
        "_finished",
        "_histograms",
        "_histograms_of_some",
        "_iterations",
        "_kv_usage",
        "_lost",
        "_number_cells",
        "_numbers",
        "_sent",
        "_stages",
        "_tally",
    )

    def __init__(self, tally: Tally, layout: Layout, num_api_servers: int) -> None:
        cell, histogram = layout.cell, layout.histogram
        servers = [str(index) for index in range(num_api_servers)]
        self._tally = tally
        self._histograms = [(histogram(name), value) for name, value in HISTOGRAMS.items()]
        self._histograms_of_some = [(histogram(name), value) for name, value in HISTOGRAMS_OF_SOME.items()]
        self._counters = [(cell(name), value) for name, value in COUNTERS.items()]
        self._by_source = (
            cell("vllm:prompt_tokens_by_source_total", source="local_compute"),
            cell("vllm:prompt_tokens_by_source_total", source="local_cache_hit"),
        )
        self._device_hits = cell("vllm:prompt_tokens_cached_by_source_total", source="device")
        self._iterations = {p: cell("wholebatch:iterations_total", phase=p) for p in PHASES}
        self._durations = {p: histogram("wholebatch:iteration_duration_seconds", phase=p) for p in PHASES}
        self._stages = [cell("wholebatch:iteration_stage_seconds_total", stage=s) for s in STAGES]
        self._faults = {where: cell("wholebatch:bulkhead_errors_total", where=where) for where in BULKHEADS}
        self._accepted = cell("wholebatch:sequences_accepted_total")
        self._finished = {
            reason: cell("wholebatch:sequences_finished_total", finished_reason=reason) for reason in FINISHED_REASONS
        }
        self._sent = [cell("wholebatch:tokens_sent_total", api_server=server) for server in servers]
        self._lost = {
            reason: [cell("wholebatch:lost_tokens_total", reason=reason, api_server=server) for server in servers]
            for reason in LOST_REASONS
        }
        self._number_cells = (
            cell("vllm:num_requests_running"),
            cell("vllm:num_requests_waiting"),
            cell("vllm:num_requests_waiting_by_reason", reason="capacity"),
            cell("vllm:num_requests_waiting_by_reason", reason="deferred"),
        )
        self._numbers: tuple[int, ...] = ()  # that these gauges show
        self._kv_usage = cell("vllm:kv_cache_usage_perc")

    # --- iterations ---

    def iteration(self, counts: IterationCounts, duration_s: float) -> None:
        """One iteration that ran: exactly one observation in each whole-iteration histogram.

        Raises TallyError for a duration that is none; everything else is booked by then."""
        tally, phase = self._tally, counts.phase
        for histogram, value_of in self._histograms:
            tally.observe(histogram, value_of(counts))
        for histogram, value_of in self._histograms_of_some:
            if value := value_of(counts):
                tally.observe(histogram, value)
        for cell, value_of in self._counters:
            if value := value_of(counts):
                tally.inc(cell, value)
        if counts.num_completed_prompt_tokens:
            computed, found = self._by_source
            tally.inc(computed, counts.num_completed_prompt_tokens - counts.num_completed_cached_tokens)
            tally.inc(found, counts.num_completed_cached_tokens)
        if counts.num_cache_hits:
            tally.inc(self._device_hits, counts.num_cache_hits)
        tally.inc(self._iterations[phase])
        tally.observe(self._durations[phase], duration_s)

    def stages(
        self,
        *,
        receive_s: float = 0.0,
        schedule_s: float = 0.0,
        run_s: float = 0.0,
        record_s: float = 0.0,
        send_s: float = 0.0,
    ) -> None:
        """Where the loop's time went; each stage is booked by whoever knows it, when it is known."""
        for cell, seconds in zip(self._stages, (receive_s, schedule_s, run_s, record_s, send_s), strict=True):
            if seconds:
                self._tally.inc(cell, seconds)

    def faulted(self, where: str) -> None:
        """A bulkhead of the engine's loop caught a fault."""
        self._tally.inc(self._faults[where])

    def gauges(self, running: int, waiting_capacity: int, waiting_deferred: int, kv_usage: float) -> None:
        numbers = (running, waiting_capacity + waiting_deferred, waiting_capacity, waiting_deferred)
        if numbers != self._numbers:  # most iterations change none. Measured: 0.16 µs instead of 0.87
            for cell, number in zip(self._number_cells, numbers, strict=True):
                self._tally.set(cell, number)
            self._numbers = numbers
        self._tally.set(self._kv_usage, kv_usage)

    # --- sequences ---

    def accepted(self) -> None:
        self._tally.inc(self._accepted)

    def finished(self, reason: str) -> None:
        self._tally.inc(self._finished[reason])

    # --- tokens on their way to an API server ---

    def sent(self, api_server: int, num_tokens: int) -> None:
        """Tokens about to be sent; counted and committed before they are (P4)."""
        self._tally.inc(self._sent[api_server], num_tokens)

    def lost(self, reason: str, api_server: int, num_tokens: int) -> None:
        """Sent tokens of which it is certain that the API server never received them."""
        self._tally.inc(self._lost[reason][api_server], num_tokens)

    def settle(self, api_server: int, received_tokens: int, reason: str) -> int:
        """Book as lost what was sent to this API-server index, not received by it and not lost before; how many.

        Only while nothing is on the wire: at a Hello. More received than sent (after a tally was set aside) is 0."""
        cells = self._tally.cells
        num_known = received_tokens + sum(int(cells[lost[api_server]]) for lost in self._lost.values())
        num_lost = max(0, int(cells[self._sent[api_server]]) - num_known)
        self.lost(reason, api_server, num_lost)
        return num_lost

    # --- a new incarnation ---

    def close_books(self) -> int:
        """End by `error` what the previous incarnation accepted and never finished; how many."""
        cells = self._tally.cells
        num_open = int(cells[self._accepted]) - sum(int(cells[cell]) for cell in self._finished.values())
        assert num_open >= 0, f"{-num_open} sequences finished that were never accepted"
        self._tally.inc(self._finished["error"], num_open)
        return num_open
