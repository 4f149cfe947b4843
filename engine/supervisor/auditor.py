"""The supervisor's audit: the laws of `metrics.laws`, checked on the tally files, its findings in a tally of its own.

`judge` is pure: two observations in, findings out. `Auditor` is the small adapter that the supervisor's loop calls: it
reads files that others write, without a lock, in a few milliseconds, and never raises (P8).

No false alarm: while anything is under way, or a process has come or gone, a law is an inequality whose smaller side is
from the earlier observation. Laws are exact only where every process was ready, with the same incarnation, at both
observations, and nothing was counted in between: what a dead process left open is settled by its successor.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.wire import Deployment
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER, AUDIT_LAWS, ENGINE, SUPERVISOR
from metrics.files import StoreError, TallyReader, TallyStore, tally_path
from metrics.laws import Finding, Samples, Status, check, check_running, is_idle, samples_of_tally
from metrics.layout import Layout, Shape, build_layout
from metrics.tally import Tally
from metrics.usage import ProcessMetrics

log = logging.getLogger("engine.supervisor.auditor")

AUDIT_S: Final = 10.0
HOUSEKEEPING_S: Final = 1.0

Incarnations = tuple[tuple[str, int, int], ...]  # (role, index, incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """All tallies at one time. `incarnations` is None while a process is not ready."""

    samples: Samples
    incarnations: Incarnations | None


def judge(earlier: Observation, later: Observation) -> list[Finding]:
    """The laws, exact where the deployment has rested from the one observation to the other."""
    is_same = earlier.incarnations is not None and earlier.incarnations == later.incarnations
    if is_same and is_idle(earlier.samples, later.samples):
        return check(later.samples, idle=True)
    return check_running(earlier.samples, later.samples)


def ready_incarnations(table: Deployment) -> Incarnations | None:
    """Who runs, if all of them are ready."""
    children = [entry for entry in table.processes if entry.role != SUPERVISOR]
    if any(entry.state != "ready" for entry in children):
        return None
    return tuple((entry.role, entry.index, entry.incarnation) for entry in children)


class Books:
    """The cells of the supervisor's tally that count findings."""

    def __init__(self, tally: Tally) -> None:
        layout = tally.layout
        self._tally = tally
        self._violations = {law: layout.cell("wholebatch:audit_violations_total", law=law) for law in AUDIT_LAWS}
        self._imbalances = {law: layout.cell("wholebatch:audit_imbalance_tokens", law=law) for law in AUDIT_LAWS}

    def enter(self, findings: Iterable[Finding]) -> None:
        """One audit: a violation counts once each time it is found; the imbalance is the law's greatest."""
        greatest = dict.fromkeys(AUDIT_LAWS, 0.0)
        for finding in findings:
            if finding.status is Status.VIOLATED:
                self._tally.inc(self._violations[finding.law])
                greatest[finding.law] = max(greatest[finding.law], finding.imbalance)
        for law, imbalance in greatest.items():
            self._tally.set(self._imbalances[law], imbalance)


class Auditor:
    """Reads the tallies of one deployment. Call `turn` often; raises StoreError when made where there is no room."""

    def __init__(self, directory: str, shape: Shape, *, log_stats: bool) -> None:
        """`shape` as far as it is known: max_model_len comes with the facts."""
        self._directory = directory
        self._shape = shape
        layout = build_layout(SUPERVISOR, shape)
        path = tally_path(directory, SUPERVISOR, 0)
        self._store = TallyStore.open(path, layout, incarnation=1, now_unix=time.time(), gauges_only=not log_stats)
        self._books = Books(self._store.tally)
        self._starts = [
            layout.cell("wholebatch:api_server_starts_total", api_server=str(index))
            for index in range(shape.num_api_servers)
        ]
        self._process = ProcessMetrics(self._store.tally)
        self._bulkhead = Bulkhead(self._count_fault, log)
        self._tallies: _Tallies | None = None
        self._earlier: Observation | None = None
        self._housekeeping_at = 0.0
        self._audit_at = 0.0

    def turn(self, table: Deployment, now: float) -> None:
        """Once a second what concerns the process; every 10 s the audit. Costs milliseconds, and never raises."""
        if now < self._housekeeping_at:
            return
        self._housekeeping_at = now + HOUSEKEEPING_S
        with self._bulkhead.around("audit"):
            self._process.update()
            self._count_starts(table)
            if now >= self._audit_at:
                self._audit_at = now + AUDIT_S
                self._audit(table)
        with self._bulkhead.around("commit"):
            self._store.commit()

    def close(self) -> None:
        """Let go of the files."""
        self._store.close()
        if self._tallies is not None:
            self._tallies.close()

    def _count_starts(self, table: Deployment) -> None:
        tally = self._store.tally
        for entry in table.processes:
            if entry.role == API_SERVER:
                cell = self._starts[entry.index]
                tally.inc(cell, entry.incarnation - tally.cells[cell])

    def _audit(self, table: Deployment) -> None:
        if table.facts is None:
            return  # nothing has been counted yet
        if self._tallies is None:
            self._tallies = _Tallies(self._directory, self._shape, table.facts.max_model_len)
        # The table first: a process that starts after it is not in it, and the laws are then no more than inequalities.
        incarnations = ready_incarnations(table)
        samples = self._tallies.read()
        if samples is None:
            return
        later = Observation(samples=samples, incarnations=incarnations)
        earlier, self._earlier = self._earlier, later
        if earlier is not None:
            findings = judge(earlier, later)
            self._books.enter(findings)
            self._log(findings)

    def _log(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if finding.status is Status.VIOLATED:
                line = (
                    f"event=audit_violation law={finding.law} engine={finding.engine or '-'}"
                    f" imbalance={finding.imbalance:g} what={finding.sentence!r} detail={finding.detail!r}"
                )
                self._bulkhead.faults.once((finding.law, finding.engine), line)

    def _count_fault(self, where: str) -> None:
        tally = self._store.tally
        tally.inc(tally.layout.cell("wholebatch:bulkhead_errors_total", where=where))


class _Tallies:
    """The files of all engines and API servers, as the samples of one exposition."""

    def __init__(self, directory: str, shape: Shape, max_model_len: int) -> None:
        shape = dataclasses.replace(shape, max_model_len=max_model_len)
        self._layouts = {role: build_layout(role, shape) for role in (ENGINE, API_SERVER)}
        self._engines = [_Tally(directory, ENGINE, i, self._layouts[ENGINE]) for i in range(shape.num_engines)]
        self._servers = [
            _Tally(directory, API_SERVER, i, self._layouts[API_SERVER]) for i in range(shape.num_api_servers)
        ]

    def read(self) -> Samples | None:
        """None where a tally that was read before cannot be read now: what is left does not add up."""
        samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for engine in self._engines:
            cells = engine.read()
            if cells is None and engine.has_been_read:
                return None
            if cells is not None:
                samples |= samples_of_tally(self._layouts[ENGINE], cells.tolist(), engine=str(engine.index))
        total = np.zeros(self._layouts[API_SERVER].num_cells)
        for server in self._servers:
            cells = server.read()
            if cells is None and server.has_been_read:
                return None
            if cells is not None:
                total += cells
        return samples | samples_of_tally(self._layouts[API_SERVER], total.tolist())

    def close(self) -> None:
        for tally in (*self._engines, *self._servers):
            tally.close()


class _Tally:
    """The tally file of one process index, as the auditor reads it."""

    def __init__(self, directory: str, role: str, index: int, layout: Layout) -> None:
        self.index = index
        self.has_been_read = False
        self._reader = TallyReader(tally_path(directory, role, index), layout)

    def read(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
        """The cells of the last commit; None while there is no such file, or none that can be trusted."""
        try:
            cells = self._reader.read().cells
        except StoreError:
            return None
        self.has_been_read = True
        return cells

    def close(self) -> None:
        self._reader.close()
