"""A bounded random campaign of kills, freezes and restarts under load, ended by the audit: `make soak`.

Prints one line a fault, a table at the end, and a JSON document as the last line; exit code 1 when a promise broke.
The clients ask for random prompts over HTTP and check what they get token for token against the first answer that
the same prompt got; a request may be lost only with the process that held it.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from metrics.catalogue import API_SERVER, ENGINE, SUPERVISOR
from metrics.laws import Finding, Status, check
from tests.benchmarks.report import document, table
from tests.e2e.faults import Faults
from tests.e2e.harness import Samples, Served, served, total
from tests.e2e.load import Clients, asks, steady_load
from tests.e2e.watch import Findings, watched
from tests.tiny_models import write_tiny_llama

MAX_MODEL_LEN = 2048
LONGEST_FREEZE_S = 3.0


def acts(faults: Faults, args: argparse.Namespace, source: random.Random) -> dict[str, Callable[[], None]]:
    """The faults, by name."""

    def server() -> int:
        return source.randrange(args.api_servers)

    def engine() -> int:
        return source.randrange(args.engines)

    def engine_and_exporter() -> list[tuple[str, int]]:
        index = engine()
        return [(ENGINE, index), (API_SERVER, faults.exporter(index))]

    def seconds() -> float:
        return source.uniform(0.2, LONGEST_FREEZE_S)

    return {
        "kill the exporter": lambda: faults.kill(API_SERVER, faults.exporter(engine())),
        "kill an API server": lambda: faults.kill(API_SERVER, server()),
        "kill an engine": lambda: faults.kill(ENGINE, engine()),
        "freeze the exporter": lambda: faults.freeze(API_SERVER, faults.exporter(engine()), seconds()),
        "freeze an API server": lambda: faults.freeze(API_SERVER, server(), seconds()),
        "freeze an engine": lambda: faults.freeze(ENGINE, engine(), seconds()),
        "freeze the supervisor": lambda: faults.freeze(SUPERVISOR, 0, seconds()),
        "kill all API servers": lambda: faults.end([(API_SERVER, i) for i in range(args.api_servers)], signal.SIGKILL),
        "kill an engine and its exporter": lambda: faults.end(engine_and_exporter(), signal.SIGKILL),
        "restart an API server": lambda: faults.restart(API_SERVER, server()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40, help="how many, one after another (40)")
    parser.add_argument("--seconds", type=float, default=1800, help="and for how long at most (1800)")
    parser.add_argument("--seed", type=int, default=0, help="of the campaign (0)")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--api-servers", type=int, default=4)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--only", help="just this fault, by name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        flags = ["--api-server-count", str(args.api_servers), "-dp", str(args.engines)]
        with served(model, *flags, "--max-model-len", str(MAX_MODEL_LEN)) as deployment:
            try:
                return campaign(deployment, args)
            except BaseException:
                print(deployment.log()[-20_000:], file=sys.stderr)
                raise


def campaign(deployment: Served, args: argparse.Namespace) -> int:
    """Load, faults, then the books."""
    faults = Faults(deployment)
    source = random.Random(args.seed)
    possible = acts(faults, args, source)
    done: collections.Counter[str] = collections.Counter()
    supervisor = psutil.Process(deployment.process.pid)
    memory, began = supervisor.memory_info().rss, time.monotonic()
    requests = asks(64, prompt_tokens=(20, 120), max_tokens=48, vocab=250)
    shape = {"num_engines": args.engines, "num_api_servers": args.api_servers, "max_model_len": MAX_MODEL_LEN}
    with watched(deployment, **shape) as findings, steady_load(deployment, requests, args.clients) as clients:
        while done.total() < args.faults and time.monotonic() - began < args.seconds:
            name = source.choice(list(possible)) if args.only is None else args.only
            started, num_broken = time.monotonic(), len(clients.broken)
            possible[name]()
            faults.settle()
            done[name] += 1
            whole_s = time.monotonic() - started
            broken = f"requests broken {len(clients.broken) - num_broken}"
            gaps = [findings.longest_absence_s(engine, started) for engine in list(findings.looks)]
            gap = f"series absent for {max(gaps, default=0.0):.2f} s"
            print(f"{done.total():4} {name}: whole again after {whole_s:.2f} s, {broken}, {gap}", flush=True)
    samples = deployment.idle_metrics(60)
    return verdict(clients, findings, samples, done, supervisor.memory_info().rss - memory, deployment)


def violations(samples: Samples) -> list[Finding]:
    """The audit of the idle deployment."""
    return [finding for finding in check(samples, idle=True) if finding.status is Status.VIOLATED]


def verdict(
    clients: Clients,
    findings: Findings,
    samples: Samples,
    done: collections.Counter[str],
    grown: int,
    deployment: Served,
) -> int:
    """Print what was found; 0 when every promise held."""
    finished = total(samples, "vllm:request_success_total", {"finished_reason": "length"})
    broken = violations(samples)
    must_be_zero = {
        "counters that fell": len(findings.fell),
        "scrapes with a series twice": len(findings.twice),
        "stale engine values": len(findings.stale),
        "streams that differ from the first answer": len(clients.different),
        "requests clients saw the end of that were not counted": max(0.0, clients.finished - finished),
        "audit violations at the end": len(broken),
        "audit violations of the supervisor": total(samples, "wholebatch:audit_violations_total"),
        "faults of the statistics plane": total(samples, "wholebatch:bulkhead_errors_total"),
        "messages rejected": total(samples, "wholebatch:wire_rejected_total"),
    }
    told = {
        "faults": done.total(),
        "scrapes": findings.scrapes,
        "scrapes refused": len(findings.failed),
        "requests finished": clients.finished,
        "requests counted as finished whose end no client saw": max(0.0, finished - clients.finished),
        "requests broken": clients.broken_kinds(),
        "longest absence of an engine's series, s": round(
            max((findings.longest_absence_s(engine) for engine in findings.looks), default=0.0), 2
        ),
        "supervisor's growth, KiB": grown // 1024,
    }
    table("What happened", ("", ""), list(told.items()))
    table("What must be 0", ("", ""), list(must_be_zero.items()))
    seen = [*findings.fell, *findings.twice, *findings.stale, *clients.different, *map(str, broken)]
    print("\n".join(seen[:20]))
    document("soak", {**told, **must_be_zero, "by fault": dict(done)})
    is_broken = any(must_be_zero.values())
    if is_broken:
        print(deployment.log()[-20_000:], file=sys.stderr)
    return int(is_broken)


if __name__ == "__main__":
    sys.exit(main())
