"""Whole iterations against partial batches: the same load at 1, 4 and 8 API servers, both ways in the same run.

*whole* is what /metrics says; *partial* is what the API servers together would have recorded from what came back to
them (`tests.e2e.partial_batches`); *logged* is the engine's own line for each iteration, written before it runs.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from pathlib import Path

from engine import default_model
from tests.benchmarks.report import document, table
from tests.e2e.harness import served, total
from tests.e2e.load import asks, run
from tests.e2e.partial_batches import observations

NAME = "vllm:iteration_tokens_total"


def measure(model: Path, servers: int, num_requests: int) -> dict[str, float]:
    """Measure one load on one deployment."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["WHOLEBATCH_PARTIAL_DIR"] = directory
        flags = ("--api-server-count", str(servers), "--enable-logging-iteration-details")
        with served(model, *flags, module="tests.e2e.serve_partial") as deployment:
            requests = asks(num_requests, prompt_tokens=(100, 200), max_tokens=64, vocab=400)
            run(deployment, requests, at_a_time=32)
            samples = deployment.idle_metrics(120)
            logged = len(re.findall("event=iteration ", deployment.log()))
        partial = observations(Path(directory))
    return {
        "api_servers": servers,
        "logged_iterations": logged,
        "whole_count": total(samples, f"{NAME}_count"),
        "whole_sum": total(samples, f"{NAME}_sum"),
        "computed_and_generated": sum(len(ask.prompt) for ask in requests) + 64 * num_requests,
        "partial_count": len(partial),
        "partial_sum": sum(partial),
        "partial_median": statistics.median(partial),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-servers", nargs="+", type=int, default=[1, 4, 8], help="(1 4 8)")
    parser.add_argument("--requests", type=int, default=64, help="32 at a time (64)")
    parser.add_argument("--model", type=Path, help="default: the default model")
    args = parser.parse_args()
    model = args.model or default_model.fetch()
    results = [measure(model, servers, args.requests) for servers in args.api_servers]
    header = (
        "API servers",
        "iterations logged",
        "whole: count",
        "sum",
        "mean",
        "partial: count",
        "sum",
        "mean",
    )
    rows = [
        (
            r["api_servers"],
            r["logged_iterations"],
            f"{r['whole_count']:.0f}",
            f"{r['whole_sum']:.0f}",
            f"{r['whole_sum'] / r['whole_count']:.1f}",
            r["partial_count"],
            r["partial_sum"],
            f"{r['partial_sum'] / r['partial_count']:.1f}",
        )
        for r in results
    ]
    table("vllm:iteration_tokens_total", header, rows)
    document("whole_batch", results)


if __name__ == "__main__":
    main()
