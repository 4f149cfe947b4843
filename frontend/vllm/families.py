"""Which families vLLM's answer keeps, and which of ours it gets in their place. Pure."""

from __future__ import annotations

from typing import Final

from metrics.catalogue import METRICS, Scope

# Whole iterations, which an engine core alone can see; everything else vLLM counts itself.
SHOWN: Final = frozenset(
    metric.name
    for metric in METRICS
    if metric.scope is Scope.ENGINE
    and (
        metric.name.startswith(("wholebatch:iteration", "vllm:iteration_tokens_total"))
        or metric.name in ("wholebatch:prompt_tokens_computed_total", "wholebatch:recomputed_tokens_total")
    )
)
NOT_OF_ENGINES: Final = frozenset(m.name for m in METRICS if m.scope is Scope.ENGINE) - SHOWN
# Counted by our own processes only.
NOT_OF_PROCESSES: Final = frozenset({"wholebatch:wire_rejected_total", "wholebatch:bulkhead_errors_total"})
_PROCESS: Final = ("process_", "python_")


def without_ours(text: str) -> str:
    """A text exposition less the families that ours replace, which are whole there or not at all."""
    kept = []
    is_ours = False
    for line in text.splitlines(keepends=True):
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2].rstrip("\n")
            is_ours = name.removesuffix("_created") in SHOWN or name.startswith(_PROCESS)
        if not is_ours:
            kept.append(line)
    return "".join(kept)
