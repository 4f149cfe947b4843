"""What a scrape costs: ours over HTTP, N API servers and K engines, beside the multiprocess mode of prometheus_client.

The other side holds the same series (every one of our catalogue's, in every process, as a server has them that keeps
all of its statistics in each API server) and is only asked to collect and write them, without HTTP in front: the
comparison is in its favour. Both sides' files hold as many observations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from metrics.deployment import API_SERVER, ENGINE
from metrics.layout import Shape, build_layout
from metrics.metric import Kind, Scope
from tests.benchmarks.report import document, table
from tests.e2e.harness import served
from tests.e2e.load import asks, run
from tests.tiny_models import write_tiny_llama

MAX_MODEL_LEN = 2048


def fill(num_engines: int) -> None:
    """In a process of its own, with PROMETHEUS_MULTIPROC_DIR set: make every series once, with one event each."""
    shape = Shape(num_engines=num_engines, num_api_servers=1, max_model_len=MAX_MODEL_LEN)
    engine, server = build_layout(ENGINE, shape), build_layout(API_SERVER, shape)
    series = [
        (s, {"engine": str(e)}) for e in range(num_engines) for s in engine.series if s.metric.scope is Scope.ENGINE
    ]
    registry = CollectorRegistry()
    families: dict[str, Counter | Gauge | Histogram] = {}
    for one, extra in [*series, *((s, {}) for s in server.series)]:
        labels = {"model_name": "m", **extra, **dict(one.labels)}
        name = one.metric.name.replace(":", "_")
        if name not in families:
            families[name] = _family(one.metric.kind, name, one.bounds, list(labels), registry)
        child = families[name].labels(**labels)
        child.observe(0.1) if isinstance(child, Histogram) else child.inc()


def _family(
    kind: Kind, name: str, bounds: tuple[float, ...] | None, labels: list[str], registry: CollectorRegistry
) -> Counter | Gauge | Histogram:
    if kind is Kind.HISTOGRAM:
        return Histogram(name, "help", labels, buckets=bounds or (), registry=registry)
    if kind is Kind.COUNTER:
        return Counter(name, "help", labels, registry=registry)
    return Gauge(name, "help", labels, multiprocess_mode="livesum", registry=registry)


def median_ms(action: Callable[[], bytes], seconds: float = 3.0) -> tuple[float, int]:
    """Median milliseconds of as many runs as fit (at least 5), and the size of the last answer."""
    action()
    times, size, ends = [], 0, time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < ends:
        began = time.perf_counter()
        size = len(action())
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3, size


def theirs(num_servers: int, num_engines: int) -> tuple[float, int]:
    """The multiprocess mode with the same series."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": directory}
        command = [sys.executable, "-m", "tests.benchmarks.scrape", "--fill", str(num_engines)]
        for _ in range(num_servers):
            subprocess.run(command, env=environment, check=True)

        def scrape() -> bytes:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, path=directory)  # type: ignore[no-untyped-call]
            return generate_latest(registry)

        return median_ms(scrape)


def ours(model: Path, num_servers: int, num_engines: int) -> tuple[float, int]:
    """A running deployment that has served something, asked over HTTP on a connection a scrape."""
    flags = ("--api-server-count", str(num_servers), "-dp", str(num_engines), "--max-model-len", str(MAX_MODEL_LEN))
    with served(model, *flags) as deployment:
        run(deployment, asks(8, prompt_tokens=(10, 20), max_tokens=4, vocab=250), at_a_time=4)
        deployment.idle_metrics()

        def scrape() -> bytes:
            with urllib.request.urlopen(deployment.url + "/metrics", timeout=30) as answer:
                body: bytes = answer.read()
            return body

        return median_ms(scrape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1x1", "16x1"], help="API servers x engines (1x1 16x1)")
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(args.fill)
        return
    rows, results = [], []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        for size in args.sizes:
            servers, engines = map(int, size.split("x"))
            mine, my_bytes = ours(model, servers, engines)
            other, other_bytes = theirs(servers, engines)
            rows.append((servers, engines, f"{mine:.2f}", my_bytes, f"{other:.2f}", other_bytes, f"{other / mine:.1f}"))
            results.append({"api_servers": servers, "engines": engines, "ms": mine, "multiprocess_ms": other})
    header = ("API servers", "engines", "ours, ms", "bytes", "multiprocess mode, ms", "bytes", "ratio")
    table("One scrape, median", header, rows)
    document("scrape", results)


if __name__ == "__main__":
    main()
