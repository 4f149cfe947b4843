"""What each fault costs: requests lost, seconds without series, scrapes that were wrong, books that do not balance.

4 API servers, 2 engines, a tiny model under steady load, scrapes at 20 Hz throughout. One fault after another on the
same deployment; after each the load ends, and the idle deployment is audited. Seconds are from the fault to the end of
the scrape, so they include up to 0.05 s between two scrapes, and the scrape.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import zmq

from metrics import broadcast
from metrics.catalogue import API_SERVER, ENGINE, SUPERVISOR
from metrics.snapshot import decode_snapshot
from tests.benchmarks.report import document, table
from tests.e2e.faults import Faults, frozen
from tests.e2e.harness import Samples, Served, served, total, violations, wait_for
from tests.e2e.load import Clients, asks, steady_load
from tests.e2e.watch import Findings, engine_layout, watched
from tests.tiny_models import write_tiny_llama

NUM_SERVERS = 4
NUM_ENGINES = 2
NUM_CLIENTS = 8
FREEZE_S = 3.0
REPEATS = 3
CLEAR_S = 1.5  # looks after the last fault, before the load ends
HEADER = (
    "fault",
    "times",
    "requests lost",
    "open on the dead",
    "absent after, s",
    "back after, s",
    "scrapes",
    "fell",
    "twice",
    "stale",
    "streams changed",
    "finished − counted",
    "violations",
)


@dataclass
class Outcome:
    """What one kind of fault did, over its repetitions."""

    fault: str
    times: int = 0
    lost: int = 0  # requests that clients saw broken
    held: int = 0  # sequences that the dead process had open, by the counters
    gone_s: list[float] = field(default_factory=list)  # until the series were absent; of the engines it concerns
    back_s: list[float] = field(default_factory=list)  # until they were exported (again)
    findings: Findings = field(default_factory=Findings)
    num_different: int = 0
    uncounted: float = 0.0
    violations: list[str] = field(default_factory=list)

    def row(self) -> list[object]:
        seen = self.findings
        return [
            self.fault,
            self.times,
            self.lost,
            self.held,
            _greatest(self.gone_s, "–"),
            _greatest(self.back_s, "no gap"),
            seen.scrapes,
            len(seen.fell),
            len(seen.twice),
            len(seen.stale),
            self.num_different,
            f"{self.uncounted:g}",
            len(self.violations),
        ]


def _greatest(seconds: Sequence[float], none: str) -> str:
    return f"{max(seconds):.2f}" if seconds else none


class Bench:
    """Causes the faults on one deployment and watches what they do."""

    def __init__(self, deployment: Served) -> None:
        self._deployment = deployment
        self._faults = Faults(deployment)
        self._asks = asks(48, prompt_tokens=(20, 120), max_tokens=48, vocab=250)

    def run(self) -> list[Outcome]:
        freeze = f"SIGSTOP for {FREEZE_S:g} s: "
        return [
            self._measure("kill -9: the exporter", lambda o: self._kill_server(o, self._faults.exporter())),
            self._measure("kill -9: another API server", lambda o: self._kill_server(o, self._faults.another())),
            self._measure("kill -9: an engine", self._kill_engine),
            self._measure(freeze + "the exporter", lambda o: self._freeze(o, API_SERVER, self._faults.exporter())),
            self._measure(freeze + "another API server", lambda o: self._freeze(o, API_SERVER, self._faults.another())),
            self._measure(freeze + "an engine", self._freeze_engine),
            self._measure(freeze + "the supervisor", lambda o: self._freeze(o, SUPERVISOR, 0)),
            self._measure("SIGTERM: all API servers, one after another", self._roll, 1),
        ]

    def _measure(self, name: str, act: Callable[[Outcome], None], repeats: int = REPEATS) -> Outcome:
        outcome = Outcome(name)
        before = self._deployment.balanced_metrics()
        shape = {"num_engines": NUM_ENGINES, "num_api_servers": NUM_SERVERS}
        with watched(self._deployment, **shape) as findings:
            outcome.findings = findings
            with steady_load(self._deployment, self._asks, NUM_CLIENTS) as clients:
                wait_for(lambda: clients.finished > NUM_CLIENTS, "load")
                for _ in range(repeats):
                    act(outcome)
                    outcome.times += 1
                    self._faults.settle()
                    time.sleep(CLEAR_S)
        return self._close(outcome, clients, before)

    def _close(self, outcome: Outcome, clients: Clients, before: Samples) -> Outcome:
        with suppress(AssertionError):
            self._deployment.balanced_metrics(20.0)
        after = self._deployment.idle_metrics()
        outcome.violations = violations(after)
        outcome.num_different = len(clients.different)
        outcome.lost = len(clients.broken)
        ended = "wholebatch:sequences_ended_total"
        for reason in ("server_lost", "error"):
            outcome.held += int(_grown(before, after, ended, {"finished_reason": reason}))
        counted = _grown(before, after, "vllm:request_success_total", {"finished_reason": "length"})
        outcome.uncounted = clients.finished - counted
        print("|", " | ".join(str(cell) for cell in outcome.row()), "|", clients.broken_kinds(), flush=True)
        for line in (*outcome.findings.fell, *outcome.findings.twice, *outcome.findings.stale, *outcome.violations):
            print(line, flush=True)
        return outcome

    # --- the faults ---

    def _kill_server(self, outcome: Outcome, index: int) -> None:
        exported = self._exported_by(index)
        began = time.monotonic()
        self._faults.kill(API_SERVER, index)
        self._gaps(outcome, exported or range(NUM_ENGINES), began)

    def _kill_engine(self, outcome: Outcome) -> None:
        began = time.monotonic()
        self._faults.kill(ENGINE, 0)
        self._absence(outcome, began, time.monotonic())

    def _freeze(self, outcome: Outcome, role: str, index: int) -> None:
        exported = self._exported_by(index) if role == API_SERVER else []
        began = time.monotonic()
        self._faults.freeze(role, index, FREEZE_S)
        self._gaps(outcome, exported or range(NUM_ENGINES), began)

    def _freeze_engine(self, outcome: Outcome) -> None:
        pid = self._faults.row(ENGINE, 0)["pid"]
        began = time.monotonic()
        with frozen(pid):
            time.sleep(FREEZE_S)
        self._absence(outcome, began, time.monotonic())

    def _roll(self, outcome: Outcome) -> None:
        began = time.monotonic()
        self._faults.restart_all()
        self._gaps(outcome, range(NUM_ENGINES), began)

    def _exported_by(self, index: int) -> list[int]:
        grants = [(e["engine"], e["grant"]) for e in self._faults.table()["exporters"]]
        return [engine for engine, grant in grants if grant is not None and grant["api_server"] == index]

    def _gaps(self, outcome: Outcome, engines: Sequence[int], began: float) -> None:
        """Seconds until each engine's series were there again, where any scrape was without them."""
        for engine in engines:
            back = wait_for(partial(_back_after_s, outcome, str(engine), began), "the series")[0]
            outcome.back_s += [back] if back else []

    def _absence(self, outcome: Outcome, began: float, ready: float) -> None:
        """Engine 0: until its series were absent; and from its being ready (awake) until they were there."""
        wait_for(lambda: _some(outcome.findings.gone_after_s("0", began)), "an answer without the series")
        back = wait_for(lambda: _back_after_s(outcome, "0", began), "the series")[0]
        gone = outcome.findings.gone_after_s("0", began)
        assert gone is not None
        outcome.gone_s.append(gone)
        outcome.back_s.append(max(0.0, began + back - ready))


def _back_after_s(outcome: Outcome, engine: str, began: float) -> tuple[float] | None:
    return _some(outcome.findings.back_after_s(engine, began))


def _some(value: float | None) -> tuple[float] | None:
    return None if value is None else (value,)


def _grown(before: Samples, after: Samples, name: str, labels: dict[str, str]) -> float:
    return total(after, name, labels) - total(before, name, labels)


def end_of_the_supervisor(model: Path) -> dict[str, Any]:
    """Seconds from its kill -9 until no child is left."""
    with served(model, "--api-server-count", str(NUM_SERVERS), "-dp", str(NUM_ENGINES)) as deployment:
        children = psutil.Process(deployment.process.pid).children(recursive=True)
        began = time.monotonic()
        os.kill(deployment.process.pid, signal.SIGKILL)
        deployment.process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        return {"children": len(children), "left": len(alive), "seconds": round(time.monotonic() - began, 2)}


def abort_of_orphans(model: Path) -> list[float]:
    """Seconds from the kill -9 of an API server until the engine runs none of its requests, by its own word."""
    seconds = []
    cell = engine_layout(1, 1, 2048).cell("vllm:num_requests_running")
    with served(model, "--api-server-count", "1") as deployment, zmq.Context() as context:
        endpoint = broadcast.snapshot_endpoint(str(next(deployment.runtime_directory.iterdir())), 0)
        subscriber = broadcast.make_subscriber(context, [endpoint], [broadcast.TOPIC_TALLY])

        def running() -> float:
            payload = subscriber.recv_multipart()[-1]
            return memoryview(decode_snapshot(payload).cells).cast("d")[cell]

        for _ in range(REPEATS):
            with steady_load(deployment, asks(4, prompt_tokens=(20, 40), max_tokens=1900, vocab=250), 4) as clients:
                wait_for(lambda: running() == 4, "requests at work")
                victims = deployment.pids(API_SERVER)
                clients.end()
                began = time.monotonic()
                os.kill(victims[0], signal.SIGKILL)
                wait_for(lambda: running() == 0, "an engine at rest")
                seconds.append(round(time.monotonic() - began, 2))
            deployment.wait_until_restarted(victims)
        subscriber.close()
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        loads = [f"{load:.1f}" for load in os.getloadavg()]
        with served(model, "--api-server-count", str(NUM_SERVERS), "-dp", str(NUM_ENGINES)) as deployment:
            outcomes = Bench(deployment).run()
            samples = deployment.balanced_metrics()
        end = end_of_the_supervisor(model)
        aborted = abort_of_orphans(model)
    table("What each fault costs", HEADER, [outcome.row() for outcome in outcomes])
    print(f"\nkill -9: the supervisor: {end['left']} of {end['children']} children left, {end['seconds']} s")
    print(f"kill -9: an API server: its 4 requests aborted after {max(aborted)} s ({len(aborted)} times)")
    alarms = total(samples, "wholebatch:audit_violations_total")
    print(f"violations found by the supervisor's own audit meanwhile: {alarms:g}; load average before: {loads}")
    rows = [dict(zip(HEADER, outcome.row(), strict=True)) for outcome in outcomes]
    results = {"rows": rows, "supervisor killed": end, "aborted after, s": aborted}
    document("faults", {**results, "own audit's violations": alarms, "load": loads})


if __name__ == "__main__":
    main()
