"""vLLM's own iteration histogram, and the same with our part in it: one load at 1, 4 and 8 API servers.

    tests/benchmarks/install_vllm.sh DIRECTORY
    python -m tests.benchmarks.export_model MODEL
    python -m tests.benchmarks.inside_vllm DIRECTORY MODEL [--api-servers 1 4 8]

*logged* is a line for each batch, written by a scheduler class between vLLM's and ours; *alone* is what vLLM's own
multiprocess registry holds at the end of the same run, which without us is what /metrics says; *with us* is what
/metrics says.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
import urllib.request
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.report import document, table
from tests.benchmarks.sides import VLLM_WITH_US, vllm
from tests.benchmarks.sse_client import random_prompts, run_load

NAME = "vllm:iteration_tokens_total"
OUTPUT_TOKENS = 64
LOG_VARIABLE = "WHOLEBATCH_TEST_ITERATIONS"  # of tests.vllm.logged, which only vLLM's environment can import


def histogram(text: str) -> tuple[float, float]:
    """Count and sum of the iteration histogram, over all engines."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return (
        sum(sample.value for sample in samples if sample.name == f"{NAME}_count"),
        sum(sample.value for sample in samples if sample.name == f"{NAME}_sum"),
    )


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def idle_histogram(url: str) -> tuple[float, float]:
    """As soon as two looks agree."""
    last = histogram(metrics(url))
    while True:
        time.sleep(0.5)
        found = histogram(metrics(url))
        if found == last:
            return found
        last = found


def wait_for_servers(url: str, servers: int) -> None:
    """vLLM answers as soon as its first API server does; the load is for all of them."""
    while len(re.findall(r'process_open_fds\{process="api-server-', metrics(url))) < servers:
        time.sleep(0.5)


def alone(directory: str) -> tuple[float, float]:
    """What vLLM's API servers have written for its own /metrics."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=directory)
    return histogram(generate_latest(registry).decode())


def measure(venv: Path, model: Path, servers: int, num_requests: int) -> dict[str, float]:
    """Measure one load on one vLLM with our part in it."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "iterations")
        theirs = Path(directory, "prometheus")
        theirs.mkdir()
        more = {LOG_VARIABLE: str(log), "PROMETHEUS_MULTIPROC_DIR": str(theirs)}
        flags = ("--api-server-count", str(servers), "--scheduler-cls", "tests.vllm.logged.Logged")
        prompts = random_prompts(num_requests, (100, 200), servers)
        with vllm(venv, model, *flags, program=VLLM_WITH_US, more=more) as side:
            wait_for_servers(side.url, servers)
            run_load(side.url, side.model, prompts, OUTPUT_TOKENS, 32)
            whole = idle_histogram(side.url)
            partial = alone(str(theirs))
            logged = len(log.with_suffix(".0").read_text().splitlines())
    return {
        "api_servers": servers,
        "logged_iterations": logged,
        "alone_count": partial[0],
        "alone_sum": partial[1],
        "whole_count": whole[0],
        "whole_sum": whole[1],
        "computed_and_generated": sum(map(len, prompts)) + OUTPUT_TOKENS * num_requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="where install_vllm.sh has put vLLM")
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--api-servers", nargs="+", type=int, default=[1, 4, 8], help="(1 4 8)")
    parser.add_argument("--requests", type=int, default=64, help="32 at a time (64)")
    args = parser.parse_args()
    results = [measure(args.venv, args.model, servers, args.requests) for servers in args.api_servers]
    header = ("API servers", "logged", "tokens", "alone: count", "sum", "mean", "with us: count", "sum", "mean")
    rows = []
    for r in results:
        columns = [(r[f"{side}_count"], r[f"{side}_sum"]) for side in ("alone", "whole")]
        told = [f"{figure:.5g}" for count, total in columns for figure in (count, total, total / count)]
        rows.append((r["api_servers"], r["logged_iterations"], r["computed_and_generated"], *told))
    table(f"{NAME} of vLLM", header, rows)
    document("inside_vllm", results)


if __name__ == "__main__":
    main()
