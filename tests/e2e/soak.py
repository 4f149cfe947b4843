"""A bounded random campaign of kills, freezes and restarts under load, ended by the audit: `make soak`.

Prints one line a fault, a table at the end, and a JSON document as the last line; exit code 1 when a promise broke.
The clients ask for random prompts over HTTP and check what they get token for token against the first answer that
the same prompt got; a request may be lost only with the process that held it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.benchmarks.report import document, table
from tests.e2e.harness import Samples, Served, served, total, wait_for
from tests.e2e.load import Ask, BrokenRequestError, asks, stream
from tests.e2e.watch import Watch, engine_layout
from tests.tiny_models import write_tiny_llama

MAX_MODEL_LEN = 2048


@dataclass
class Clients:
    """A steady load: each client asks one request after another until `stop`."""

    served: Served
    asks: list[Ask]
    finished: int = 0
    tokens: int = 0
    broken: collections.Counter[str] = field(default_factory=collections.Counter)
    different: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._answers: dict[int, str] = {}
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._ask, args=(random.Random(number),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client hangs: its request was neither answered nor ended"

    def _ask(self, source: random.Random) -> None:
        while not self._ends.is_set():
            number = source.randrange(len(self.asks))
            try:
                seen = stream(self.served, self.asks[number])
            except (BrokenRequestError, ConnectionError, http.client.HTTPException, TimeoutError) as error:
                with self._lock:
                    self.broken[type(error).__name__] += 1
                time.sleep(0.02)  # a refused client comes back, and does not spin
                continue
            with self._lock:
                self.finished += 1
                self.tokens += seen.completion_tokens or 0
                if self._answers.setdefault(number, seen.text) != seen.text:
                    self.different.append(number)


class Campaign:
    """The faults, by name."""

    def __init__(self, served: Served, source: random.Random) -> None:
        self._served = served
        self._source = source
        self.faults: dict[str, Callable[[], None]] = {
            "kill the exporter": lambda: self._kill(self._exporter()),
            "kill an API server": lambda: self._kill(self._any("api-server")),
            "kill an engine": lambda: self._kill(self._any("engine")),
            "freeze the exporter": lambda: self._freeze(self._exporter()),
            "freeze an API server": lambda: self._freeze(self._any("api-server")),
            "freeze an engine": lambda: self._freeze(self._any("engine")),
            "freeze the supervisor": lambda: self._freeze(self._served.process.pid),
            "restart all API servers": self._roll,
        }

    def _any(self, role: str) -> int:
        return self._source.choice(self._served.pids(role))

    def _exporter(self) -> int:
        table_ = self._served.deployment()
        index = next((e["api_server"] for e in table_["exporters"] if e["api_server"] is not None), 0)
        return next(p["pid"] for p in table_["processes"] if p["role"] == "api-server" and p["index"] == index)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self._settle(pid)

    def _freeze(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._source.uniform(0.2, 3.0))  # the fault itself is a length of time
            os.kill(pid, signal.SIGCONT)
        self._settle(None)

    def _roll(self) -> None:
        for index in range(len(self._served.pids("api-server"))):
            self._kill(self._served.pids("api-server")[index])

    def _settle(self, gone: int | None) -> None:
        wait_for(lambda: self._is_whole(gone), "every process ready again", 60.0)

    def _is_whole(self, gone: int | None) -> bool:
        try:
            rows = self._served.deployment()["processes"]
        except (OSError, http.client.HTTPException):
            return False
        return all(p["state"] == "ready" and p["pid"] != gone for p in rows if p["role"] != "supervisor")


def books(samples: Samples) -> dict[str, float]:
    """Both sides of the conservation laws, on the idle deployment: every value must be 0."""
    received = total(samples, "wholebatch:received_tokens_total")
    given = total(samples, "wholebatch:delivered_tokens_total") + total(samples, "wholebatch:undelivered_tokens_total")
    lost = total(samples, "wholebatch:lost_tokens_total")
    iterations = total(samples, "wholebatch:iterations_total")
    made = ("wholebatch:prompt_tokens_computed_total", "wholebatch:recomputed_tokens_total")
    computed = sum(total(samples, name) for name in (*made, "vllm:generation_tokens_total"))
    return {
        "generated − received − lost": total(samples, "vllm:generation_tokens_total") - received - lost,
        "received − delivered − undelivered": received - given,
        "iteration tokens − their parts": total(samples, "vllm:iteration_tokens_total_sum") - computed,
        "observations − iterations": total(samples, "vllm:iteration_tokens_total_count") - iterations,
        "accepted − finished": total(samples, "wholebatch:sequences_accepted_total")
        - total(samples, "wholebatch:sequences_finished_total"),
        "submitted − ended": total(samples, "wholebatch:sequences_submitted_total")
        - total(samples, "wholebatch:sequences_ended_total"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40, help="how many, one after another (40)")
    parser.add_argument("--seconds", type=float, default=600, help="and for how long at most (600)")
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
            return campaign(deployment, args)


def campaign(deployment: Served, args: argparse.Namespace) -> int:
    """Load, faults, then the books."""
    clients = Clients(deployment, asks(64, prompt_tokens=(20, 120), max_tokens=48, vocab=250))
    layout = engine_layout(args.engines, args.api_servers, MAX_MODEL_LEN)
    watch = Watch(deployment, layout, num_engines=args.engines)
    clients.start(args.clients)
    acts = Campaign(deployment, random.Random(args.seed))
    done: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    memory = psutil.Process(deployment.process.pid).memory_info().rss
    while sum(done.values()) < args.faults and time.monotonic() - began < args.seconds:
        name = args.only or random.Random(f"{args.seed}.{sum(done.values())}").choice(list(acts.faults))
        started = time.monotonic()
        acts.faults[name]()
        done[name] += 1
        print(f"{sum(done.values()):4} {name}: whole again after {time.monotonic() - started:.2f} s", flush=True)
    clients.stop()
    findings = watch.stop()
    samples = deployment.idle_metrics(60)
    return verdict(clients, findings, samples, done, psutil.Process(deployment.process.pid).memory_info().rss - memory)


def verdict(clients: Clients, findings, samples: Samples, done, grown: int) -> int:  # type: ignore[no-untyped-def]
    """Print what was found; 0 when every promise held."""
    delivered = total(samples, "wholebatch:delivered_tokens_total")
    must_be_zero = {
        "counters that fell": len(findings.fell),
        "scrapes with a series twice": len(findings.twice),
        "stale engine values": len(findings.stale),
        "streams that differ from the first answer": len(clients.different),
        "tokens clients saw that were not counted": max(0.0, clients.tokens - delivered),
        **books(samples),
    }
    told = {
        "faults": sum(done.values()),
        "scrapes": findings.scrapes,
        "scrapes refused": findings.failed_scrapes,
        "requests finished": clients.finished,
        "requests broken": dict(clients.broken),
        "longest absence of an engine's series, s": max(
            (findings.longest_absence_s(engine) for engine in findings.absent), default=0.0
        ),
        "supervisor's growth, KiB": grown // 1024,
    }
    table("What happened", ("", ""), list(told.items()))
    table("What must be 0", ("", ""), list(must_be_zero.items()))
    for line in (findings.fell + findings.twice + findings.stale)[:10]:
        print(line)
    document("soak", {**told, **must_be_zero, "by fault": dict(done)})
    return 1 if any(must_be_zero.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
