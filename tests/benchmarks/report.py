"""What every benchmark prints: a table for people, then one JSON document as the last line for programs."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

import psutil


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one Markdown table."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def machine() -> dict[str, object]:
    """Where and on what this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "commit": commit or "unknown",
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }


def document(benchmark: str, results: Any) -> None:
    """Print the JSON document; call it last."""
    print(json.dumps({"benchmark": benchmark, "machine": machine(), "results": results}))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of a sample."""
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]}
