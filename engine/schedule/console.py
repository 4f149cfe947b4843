"""The engine's line on the console, every ten seconds while there is work: whole-engine figures. Pure.

Made from the engine's tally, so that it says the same at any number of API servers; of the prefix cache only where
something was looked up.
"""

from __future__ import annotations

from typing import Final

from metrics.tally import Tally

INTERVAL_S: Final = 10.0


class Console:
    """What grew between two lines, and how things stand."""

    def __init__(self, tally: Tally, now: float, *, prompt_counter: str = "vllm:prompt_tokens_total") -> None:
        cell = tally.layout.cell
        self._tally = tally
        self._counters = {
            "prompt": cell(prompt_counter),
            "generated": cell("vllm:generation_tokens_total"),
            "preempted": cell("vllm:num_preemptions_total"),
            "queries": cell("vllm:prefix_cache_queries_total"),
            "hits": cell("vllm:prefix_cache_hits_total"),
        }
        self._running = cell("vllm:num_requests_running")
        self._waiting = cell("vllm:num_requests_waiting")
        self._kv_usage = cell("vllm:kv_cache_usage_perc")
        self._last = self._read()
        self._last_at = now

    def _read(self) -> dict[str, float]:
        return {name: self._tally.cells[cell] for name, cell in self._counters.items()}

    def line(self, now: float) -> str | None:
        """The line for the time since the last one; None before its time, or when there was nothing to do."""
        elapsed = now - self._last_at
        if elapsed < INTERVAL_S:
            return None
        counts = self._read()
        grown = {name: value - self._last[name] for name, value in counts.items()}
        self._last, self._last_at = counts, now
        cells = self._tally.cells
        running, waiting = cells[self._running], cells[self._waiting]
        if not (running or waiting or any(grown.values())):
            return None
        lookups = grown["queries"]
        hit_rate = f" prefix_cache_hit_rate_pct={100 * grown['hits'] / lookups:.1f}" if lookups else ""
        return (
            f"event=stats prompt_tokens_per_s={grown['prompt'] / elapsed:.1f}"
            f" generation_tokens_per_s={grown['generated'] / elapsed:.1f}"
            f" running={running:.0f} waiting={waiting:.0f} kv_cache_usage_pct={100 * cells[self._kv_usage]:.1f}"
            f"{hit_rate} preemptions={grown['preempted']:.0f}"
        )
