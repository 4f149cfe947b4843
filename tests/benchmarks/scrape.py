"""What a scrape costs: ours over HTTP, N API servers and K engines, beside the multiprocess mode of prometheus_client.

Ours is asked over a kept connection. The API server asked, where there are several, is not the exporter of any engine,
as all but one are not: it has to find out what that one holds. `tests.benchmarks.deployed` says what is real in this
deployment and what stands in; every process counts and commits 50 times a second. Asked *back to back*, most tallies
have not changed since the answer before; asked *20 times a second*, as inference gateways do, all have, and caches are
cold.

The other side holds the same series (every one of our catalogue's, in every process, as a server has them that keeps
all of its statistics in each API server) and is only asked to collect and write them, without HTTP in front: the
comparison is in its favour. All its processes' files are copies of one process's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from metrics.catalogue import API_SERVER, ENGINE
from metrics.catalogue.metric import Kind, Scope
from metrics.layout import Shape, build_layout
from tests.benchmarks.deployed import MAX_MODEL_LEN, deployed
from tests.benchmarks.report import document, table
from tests.tiny_models import write_tiny_llama

SIZES = ("1x1", "16x1", "64x1", "1x8", "64x8")
WORK_S, PACE_S = 0.02, 0.05


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


def median_ms(action: Callable[[], bytes], pace_s: float, seconds: float = 2.0) -> tuple[float, int]:
    """Median milliseconds of as many runs as fit (at least 5), and the size of the last answer."""
    action()
    times: list[float] = []
    size, ends = 0, time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < ends:
        time.sleep(pace_s)
        began = time.perf_counter()
        size = len(action())
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3, size


def theirs(num_servers: int, num_engines: int) -> dict[str, float]:
    """Measure the multiprocess mode with the same series."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": directory}
        command = [sys.executable, "-m", "tests.benchmarks.scrape", "--fill", str(num_engines)]
        subprocess.run(command, env=environment, check=True)
        for path in list(Path(directory).iterdir()):
            kind, _, pid = path.stem.rpartition("_")
            for number in range(1, num_servers):
                shutil.copyfile(path, path.with_name(f"{kind}_{int(pid) + number}.db"))

        def scrape() -> bytes:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, path=directory)
            return generate_latest(registry)

        ms, size = median_ms(scrape, 0.0)
        return {
            "multiprocess_ms": ms,
            "multiprocess_paced_ms": median_ms(scrape, PACE_S)[0],
            "multiprocess_bytes": size,
        }


def ours(model: Path, num_servers: int, num_engines: int) -> dict[str, float]:
    """Asked of an API server that is no exporter, where there is one."""
    with deployed(model, num_servers, num_engines, WORK_S) as servers:
        time.sleep(1.0)  # everybody's process series are there

        def scrape() -> bytes:
            exposition: bytes = servers[-1].get("/metrics")
            return exposition

        (ms, size), (paced_ms, _) = median_ms(scrape, 0.0), median_ms(scrape, PACE_S)
        return {"ms": ms, "paced_ms": paced_ms, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help=f"API servers x engines ({' '.join(SIZES)})")
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(args.fill)
        return
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        for size in args.sizes:
            servers, engines = map(int, size.split("x"))
            sides = {**ours(model, servers, engines), **theirs(servers, engines)}
            results.append({"api_servers": servers, "engines": engines, **sides})
    for title, figure in (("back to back", "ms"), ("20 times a second", "paced_ms")):
        rows = [
            (
                r["api_servers"],
                r["engines"],
                f"{r[figure]:.2f}",
                r["bytes"],
                f"{r['multiprocess_' + figure]:.2f}",
                r["multiprocess_bytes"],
                f"{r['multiprocess_' + figure] / r[figure]:.1f}",
            )
            for r in results
        ]
        header = ("API servers", "engines", "ours, ms", "bytes", "multiprocess mode, ms", "bytes", "ratio")
        table(f"One scrape, {title}, median", header, rows)
    document("scrape", results)


if __name__ == "__main__":
    main()
