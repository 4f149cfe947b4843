"""The token path of one API server: streamed tokens a second of its processor time, at 256 streams.

A real deployment of one API server, whose engine has no model. *Paced*, the engine makes one token for every stream so
seldom that the API server is done with one before the next comes: every write carries one token, the most expensive
case and the usual one. *Unpaced*, the engine is always ahead, and a write carries whatever has arrived meanwhile.

The client is a process of its own. Processor time is the API server's, user and system. A round is a load of short
answers and one of long ones: their difference is what a token costs, the rest what a request costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

from engine import default_model
from metrics.catalogue import API_SERVER, ENGINE
from tests.benchmarks.instant_engine import INTERVAL_VARIABLE
from tests.benchmarks.report import document, table
from tests.benchmarks.sse_client import Load, random_prompts, run_load
from tests.e2e.harness import Served, served

NAME = "default"
SHORT = 16  # tokens of a short answer, and of every prompt


@dataclass(frozen=True, slots=True)
class Round:
    """Of the long answers, but for what a request costs."""

    tokens_per_s: float
    tokens_per_core_s: float  # requests and all
    token_us: float
    request_us: float
    tokens_per_event: float
    api_server_cores: float
    engine_cores: float
    client_cores: float


@dataclass(frozen=True, slots=True)
class Spent:
    """One load, and the seconds of processor time that it took."""

    load: Load
    api_server_s: float
    engine_s: float


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def spend(deployment: Served, streams: int, max_tokens: int, seed: int) -> Spent:
    """All streams at once, from their requests to their ends."""
    pids = (*deployment.pids(API_SERVER), *deployment.pids(ENGINE))
    prompts = random_prompts(streams, (SHORT, SHORT), seed)
    before = [cpu_s(pid) for pid in pids]
    load = run_load(deployment.url, NAME, prompts, max_tokens, streams)
    return Spent(load, *(cpu_s(pid) - earlier for pid, earlier in zip(pids, before, strict=True)))


def measure(deployment: Served, streams: int, max_tokens: int, seed: int) -> Round:
    short = spend(deployment, streams, SHORT, 2 * seed)
    long = spend(deployment, streams, max_tokens, 2 * seed + 1)
    token_s = (long.api_server_s - short.api_server_s) / (streams * (max_tokens - SHORT))
    return Round(
        tokens_per_s=long.load.tokens_per_s,
        tokens_per_core_s=streams * max_tokens / long.api_server_s,
        token_us=token_s * 1e6,
        request_us=(short.api_server_s / streams - SHORT * token_s) * 1e6,
        tokens_per_event=streams * max_tokens / sum(answer.num_events for answer in long.load.answers),
        api_server_cores=long.api_server_s / long.load.elapsed_s,
        engine_cores=long.engine_s / long.load.elapsed_s,
        client_cores=long.load.client_cpu_s / long.load.elapsed_s,
    )


@contextmanager
def deployed(interval_ms: float, flags: Sequence[str]) -> Iterator[Served]:
    """One API server, and an engine that makes a token a sequence every so many milliseconds; 0: as fast as it can."""
    os.environ[INTERVAL_VARIABLE] = str(interval_ms)
    flags = ["--served-model-name", NAME, "--no-enable-prefix-caching", "--max-num-seqs", "1024", *flags]
    with served(default_model.fetch(), *flags, module="tests.benchmarks.serve_instant") as deployment:
        yield deployment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="at once (256)")
    parser.add_argument("--tokens", type=int, default=256, help="of a long answer (256)")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="between a stream's tokens, paced (20)")
    parser.add_argument("--rounds", type=int, default=3, help="of each pace (3)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server")
    args = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    fields = tuple(Round.__dataclass_fields__)
    for pace, interval_ms in (("paced", args.interval_ms), ("unpaced", 0.0)):
        with deployed(interval_ms, args.flags) as deployment:
            spend(deployment, args.streams, SHORT, -1)  # a warm-up
            rounds = [measure(deployment, args.streams, args.tokens, number) for number in range(args.rounds)]
        medians = {name: statistics.median(getattr(r, name) for r in rounds) for name in fields}
        results[pace] = {**medians, "rounds": [asdict(r) for r in rounds]}
    table(
        f"One API server, {args.streams} streams of {args.tokens} tokens; median of {args.rounds} rounds",
        ("pace", *(name.replace("_", " ") for name in fields)),
        [(pace, *(f"{found[name]:.5g}" for name in fields)) for pace, found in results.items()],
    )
    document("token_path", {"streams": args.streams, "tokens": args.tokens, **results})


if __name__ == "__main__":
    main()
