"""What an iteration ran, as increments of the engine's tally; the only writer of engine scope. Pure.

The scheduler decides and counts (`IterationCounts`), the recorder writes it down, the loop commits and only then
sends. Nothing here is counted from what comes back to an API server: that is the whole point.

A new whole-iteration histogram is one declaration in `metrics.catalogue` and one line in `Recorder.iteration`. Cells
are resolved by name once, at construction; every method is a few array operations, whatever the batch size.

Laws that the figures keep at any time (`metrics.audit`): the sum of iteration tokens is prompt tokens computed +
recomputed + generated; as many observations as iterations; accepted = finished + running + waiting.
"""

from __future__ import annotations

from typing import Final

from engine.batch import IterationCounts
from metrics.layout import Histogram, Layout
from metrics.tally import Tally

PHASES: Final = ("prefill", "decode", "mixed")
STAGES: Final = ("receive", "schedule", "run", "record", "send")
FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
LOST_REASONS: Final = ("server_lost", "engine_lost")


class _Cells:
    """Every cell that the recorder writes, by the metric's name."""

    __slots__ = (
        "accepted",
        "cache_hits",
        "cache_queries",
        "cached",
        "computed",
        "decode_tokens",
        "duration",
        "finished",
        "from_cache",
        "from_compute",
        "generated",
        "iteration_preemptions",
        "iteration_tokens",
        "iterations",
        "kv_usage",
        "lost",
        "preemptions",
        "prefill_tokens",
        "prompt",
        "recomputed",
        "requests",
        "running",
        "scheduled_tokens",
        "sent",
        "stages",
        "waiting",
        "waiting_capacity",
        "waiting_deferred",
    )

    def __init__(self, layout: Layout, num_api_servers: int) -> None:
        cell, histogram = layout.cell, layout.histogram
        servers = [str(index) for index in range(num_api_servers)]
        self.iteration_tokens: Histogram = histogram("vllm:iteration_tokens_total")
        self.scheduled_tokens: Histogram = histogram("wholebatch:iteration_scheduled_tokens")
        self.prefill_tokens: Histogram = histogram("wholebatch:iteration_prefill_tokens")
        self.decode_tokens: Histogram = histogram("wholebatch:iteration_decode_tokens")
        self.requests: Histogram = histogram("wholebatch:iteration_requests")
        self.iteration_preemptions: Histogram = histogram("wholebatch:iteration_preemptions")
        self.duration = {p: histogram("wholebatch:iteration_duration_seconds", phase=p) for p in PHASES}
        self.iterations = {p: cell("wholebatch:iterations_total", phase=p) for p in PHASES}
        self.stages = [cell("wholebatch:iteration_stage_seconds_total", stage=s) for s in STAGES]
        self.computed = cell("wholebatch:prompt_tokens_computed_total")
        self.recomputed = cell("wholebatch:recomputed_tokens_total")
        self.generated = cell("vllm:generation_tokens_total")
        self.preemptions = cell("vllm:num_preemptions_total")
        self.cache_queries = cell("vllm:prefix_cache_queries_total")
        self.cache_hits = cell("vllm:prefix_cache_hits_total")
        self.prompt = cell("vllm:prompt_tokens_total")
        self.cached = cell("vllm:prompt_tokens_cached_total")
        self.from_compute = cell("vllm:prompt_tokens_by_source_total", source="local_compute")
        self.from_cache = cell("vllm:prompt_tokens_by_source_total", source="local_cache_hit")
        self.accepted = cell("wholebatch:sequences_accepted_total")
        self.finished = {r: cell("wholebatch:sequences_finished_total", finished_reason=r) for r in FINISH_REASONS}
        self.sent = [cell("wholebatch:tokens_sent_total", api_server=s) for s in servers]
        self.lost = {
            r: [cell("wholebatch:lost_tokens_total", reason=r, api_server=s) for s in servers] for r in LOST_REASONS
        }
        self.running = cell("vllm:num_requests_running")
        self.waiting = cell("vllm:num_requests_waiting")
        self.waiting_capacity = cell("vllm:num_requests_waiting_by_reason", reason="capacity")
        self.waiting_deferred = cell("vllm:num_requests_waiting_by_reason", reason="deferred")
        self.kv_usage = cell("vllm:kv_cache_usage_perc")


class Recorder:
    """Writes one engine's tally. Not thread-safe: the engine's loop owns it."""

    __slots__ = ("_cells", "_tally")

    def __init__(self, tally: Tally, layout: Layout, num_api_servers: int) -> None:
        self._tally = tally
        self._cells = _Cells(layout, num_api_servers)

    # --- iterations ---

    def iteration(self, counts: IterationCounts, num_generated: int, duration_s: float) -> None:
        """One iteration that ran: exactly one observation in each whole-iteration histogram."""
        tally, cells, phase = self._tally, self._cells, counts.phase
        num_computed = counts.num_prompt_tokens_computed + counts.num_recomputed_tokens
        tally.observe(cells.iteration_tokens, num_computed + num_generated)
        tally.observe(cells.scheduled_tokens, counts.num_scheduled_tokens)
        tally.observe(cells.requests, counts.num_requests)
        tally.observe(cells.duration[phase], duration_s)
        if counts.num_prefill_tokens:
            tally.observe(cells.prefill_tokens, counts.num_prefill_tokens)
        if counts.num_decode_tokens:
            tally.observe(cells.decode_tokens, counts.num_decode_tokens)
        if counts.num_preemptions:
            tally.observe(cells.iteration_preemptions, counts.num_preemptions)
            tally.inc(cells.preemptions, counts.num_preemptions)
        tally.inc(cells.iterations[phase])
        tally.inc(cells.computed, counts.num_prompt_tokens_computed)
        tally.inc(cells.recomputed, counts.num_recomputed_tokens)
        tally.inc(cells.generated, num_generated)

    def stages(
        self,
        *,
        receive_s: float = 0.0,
        schedule_s: float = 0.0,
        run_s: float = 0.0,
        record_s: float = 0.0,
        send_s: float = 0.0,
    ) -> None:
        """Where the loop's time went; each stage may be booked on its own, when it is known."""
        for cell, seconds in zip(self._cells.stages, (receive_s, schedule_s, run_s, record_s, send_s), strict=True):
            if seconds:
                self._tally.inc(cell, seconds)

    def looked_up(self, queries: int, hits: int) -> None:
        """Prompt tokens looked up in the prefix cache at first admissions, and those found."""
        self._tally.inc(self._cells.cache_queries, queries)
        self._tally.inc(self._cells.cache_hits, hits)

    def prefilled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Prompts whose prefill completed: their tokens, and the part that came from the prefix cache."""
        tally, cells = self._tally, self._cells
        tally.inc(cells.prompt, prompt_tokens)
        tally.inc(cells.cached, cached_tokens)
        tally.inc(cells.from_cache, cached_tokens)
        tally.inc(cells.from_compute, prompt_tokens - cached_tokens)

    # --- sequences ---

    def accepted(self) -> None:
        self._tally.inc(self._cells.accepted)

    def finished(self, reason: str) -> None:
        self._tally.inc(self._cells.finished[reason])

    def gauges(self, running: int, waiting_capacity: int, waiting_deferred: int, kv_usage: float) -> None:
        tally, cells = self._tally, self._cells
        tally.set(cells.running, running)
        tally.set(cells.waiting, waiting_capacity + waiting_deferred)
        tally.set(cells.waiting_capacity, waiting_capacity)
        tally.set(cells.waiting_deferred, waiting_deferred)
        tally.set(cells.kv_usage, kv_usage)

    # --- tokens on their way to an API server ---

    def sent(self, api_server: int, num_tokens: int) -> None:
        """Tokens about to be sent; counted and committed before they are (P4)."""
        self._tally.inc(self._cells.sent[api_server], num_tokens)

    def lost(self, reason: str, api_server: int, num_tokens: int) -> None:
        """Sent tokens of which it is certain that the API server never received them."""
        self._tally.inc(self._cells.lost[reason][api_server], num_tokens)

    def settle(self, api_server: int, received_tokens: int, reason: str) -> int:
        """Book as lost what was sent to this API-server index, not received by it and not lost before; how many.

        Only when nothing is on the wire: at a Hello. More received than sent (a tally that was set aside) is 0."""
        values, cells = self._tally.cells, self._cells
        known = received_tokens + sum(int(values[cells.lost[r][api_server]]) for r in LOST_REASONS)
        num_lost = max(0, int(values[cells.sent[api_server]]) - known)
        self.lost(reason, api_server, num_lost)
        return num_lost

    # --- a new incarnation ---

    def close_books(self) -> int:
        """End by `error` what the previous incarnation accepted and never finished; how many."""
        values, cells = self._tally.cells, self._cells
        num_open = int(values[cells.accepted]) - sum(int(values[cell]) for cell in cells.finished.values())
        assert num_open >= 0, f"{-num_open} sequences finished that were never accepted"
        self._tally.inc(cells.finished["error"], num_open)
        return num_open
