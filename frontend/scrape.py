"""What one answer to a scrape consists of: whose series, of which scopes, and the last look at the leases.

Public port: the whole deployment. Request-level series are summed over every API server's tally file, whichever API
server answers; each engine's series come from its exporter; every process has its own process series. Admin port:
this process's own, and the series of the engines whose exporter it is, so that the admin ports sum to the public one;
or its own alone, for targets by discovery (`frontend.discovery`), where every engine is a target of its own. Exemplars
go with the request-level series, in OpenMetrics: of each bucket the newest one, of any API server or of this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import Final

import numpy as np

from frontend.admission import InFlight
from frontend.engine_client import Identity
from frontend.exporter import Exportable, Exporter
from frontend.pool import cache_config
from frontend.scrape_request import ScrapeRequest
from metrics.deployment import API_SERVER, ENGINE, ROLES, SUPERVISOR, Deployment, Facts
from metrics.exemplar_store import exemplars_path, read_exemplars
from metrics.exemplars import Slots
from metrics.exposition import (
    PROCESS_SCOPES,
    Exemplars,
    Part,
    Renderer,
    Template,
    add_up,
    scrape_part,
)
from metrics.layout import Layout, Shape, build_layout
from metrics.metric import Scope
from metrics.process import python_info
from metrics.store import StoreError, TallyReader, TallyReading, tally_path

Engines = Mapping[int, Exportable]
Processes = Set[tuple[str, int, int]]  # (role, index, incarnation)

IN_FLIGHT: Final = ("wholebatch:api_server_requests_in_flight", "wholebatch:api_server_prefill_tokens")


class Layouts:
    """The three layouts of a deployment."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._by_role = {role: build_layout(role, shape) for role in ROLES}

    def __getitem__(self, role: str) -> Layout:
        return self._by_role[role]

    @cached_property
    def in_flight_cells(self) -> list[list[int]]:
        """Of an API server's tally: sequences and prompt tokens in flight, the gauges of each engine."""
        layout, engines = self[API_SERVER], range(self.shape.num_engines)
        return [[layout.cell(name, engine=str(engine)) for engine in engines] for name in IN_FLIGHT]


class ProcessTally:
    """The tally file of one process index, and its process series: with gauges while the process lives."""

    def __init__(self, directory: str, role: str, index: int, layout: Layout, *, label: str | None, log_stats: bool):
        self.role = role
        self.index = index
        self._reader = TallyReader(tally_path(directory, role, index), layout)
        self._templates = {
            is_alive: Template(layout, PROCESS_SCOPES, process=label, log_stats=log_stats, has_gauges=is_alive)
            for is_alive in (False, True)
        }
        self._first = min(series.offset for series in layout.series if series.metric.scope in PROCESS_SCOPES)
        self._made_from: object = None
        self._part: Part | None = None

    def read(self) -> TallyReading | None:
        """The last commit; None while there is no such file, or none that can be trusted."""
        try:
            return self._reader.read()
        except StoreError:
            return None

    def part(self, reading: TallyReading, is_alive: bool) -> Part:
        """Its process series; the part made last for as long as nothing in it changes, which is for about a second."""
        made_from = (reading.cells[self._first :].tobytes(), reading.created_unix, is_alive)
        if self._part is None or self._made_from != made_from:
            self._made_from = made_from
            self._part = self._templates[is_alive].part(reading.cells, reading.created_unix)
        return self._part


class Scrape:
    """Answers scrapes. `table` is the newest deployment table."""

    def __init__(
        self,
        directory: str,
        identity: Identity,
        layouts: Layouts,
        facts: Facts,
        exporter: Exporter,
        table: Callable[[], Deployment | None],
        *,
        log_stats: bool,
        clock: Callable[[], float],
    ) -> None:
        shape, index = layouts.shape, identity.index
        self._index = index
        self._itself = (API_SERVER, index, identity.incarnation)
        self._layouts = layouts
        self._facts = facts
        self._exporter = exporter
        self._table = table
        self._clock = clock
        self._renderer = Renderer()
        name = facts.model_name
        self._requests = Template(layouts[API_SERVER], (Scope.REQUEST,), model_name=name, log_stats=log_stats)
        self._engines = [
            Template(layouts[ENGINE], (Scope.ENGINE,), model_name=name, engine=engine, log_stats=log_stats)
            for engine in range(shape.num_engines)
        ]
        indices = [(API_SERVER, i) for i in range(shape.num_api_servers)]
        indices += [*((ENGINE, i) for i in range(shape.num_engines)), (SUPERVISOR, 0)]
        self._processes = [
            ProcessTally(directory, role, i, layouts[role], label=f"{role}-{i}", log_stats=log_stats)
            for role, i in indices
        ]
        layout = layouts[API_SERVER]
        self._slots = Slots(layout)
        self._exemplar_paths = [exemplars_path(directory, API_SERVER, i) for i in range(shape.num_api_servers)]
        self._labelled_own = self._processes[index]
        self._own = ProcessTally(directory, API_SERVER, index, layout, label=None, log_stats=log_stats)
        self._cache_config = cache_config(facts)
        self._python_info = scrape_part([("python_info", python_info(), 1.0)])

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    async def whole(self, asked: ScrapeRequest) -> bytes:
        """The body for the whole deployment."""
        engines = range(self.num_engines)
        found = await asyncio.gather(*(self._exporter.series(engine) for engine in engines))
        exportable = {engine: one for engine, one in zip(engines, found, strict=True) if one is not None}
        return self._render(
            exportable, lambda fresh: [*self._shared_parts(asked), *self._engine_parts(fresh, engines)], asked
        )

    async def engine(self, engine: int, asked: ScrapeRequest) -> bytes:
        """The body for one engine's series alone."""
        found = await self._exporter.series(engine)
        exportable = {} if found is None else {engine: found}
        return self._render(exportable, lambda fresh: self._engine_parts(fresh, [engine]), asked)

    def processes(self, asked: ScrapeRequest) -> bytes:
        """The body for the process series of engines and the supervisor, which have no port of their own."""
        parts, alive = [], self._alive()
        for process in self._processes:
            reading = process.read() if process.role != API_SERVER else None
            if reading is not None:
                parts.append(process.part(reading, (process.role, process.index, reading.incarnation) in alive))
        return self._render({}, lambda fresh: parts, asked)

    def own(self, asked: ScrapeRequest) -> bytes:
        """The body for this process alone, without an engine's series; labelled as on the public port."""
        return self._render({}, lambda fresh: self._own_parts(self._labelled_own, asked), asked)

    def admin(self, asked: ScrapeRequest) -> bytes:
        """The body for this process and the engines whose exporter it is."""
        held = {engine: self._exporter.held(engine) for engine in range(self.num_engines)}
        exportable = {engine: one for engine, one in held.items() if one is not None}
        return self._render(
            exportable, lambda fresh: [*self._own_parts(self._own, asked), *self._engine_parts(fresh, [*fresh])], asked
        )

    def in_flight(self, *, including_own: bool = True) -> InFlight:
        """What all API servers that live, or all others, wait for, by their last commits."""
        total, alive = np.zeros(2), self._alive()
        for process in self._processes:
            is_wanted = process.role == API_SERVER and (including_own or process.index != self._index)
            reading = process.read() if is_wanted else None
            if reading is not None and (process.role, process.index, reading.incarnation) in alive:
                total += reading.cells[self._layouts.in_flight_cells].sum(axis=1)
        return InFlight(*total.tolist())

    def _render(self, engines: Engines, parts: Callable[[Engines], Sequence[Part]], asked: ScrapeRequest) -> bytes:
        """P2: an engine whose lease has run out by now, or by the time the body is ready, is left out."""
        while True:
            fresh = self._fresh(engines)
            body = asked.body(self._renderer.render(parts(fresh), asked.form))
            if len(self._fresh(fresh)) == len(fresh):
                return body
            engines = fresh

    def _fresh(self, engines: Engines) -> Engines:
        now = self._clock()
        return {engine: one for engine, one in engines.items() if now < one.expires_at}

    # --- parts ---

    def _shared_parts(self, asked: ScrapeRequest) -> list[Part]:
        """Request-level series summed, and each process's own."""
        parts = [self._python_info]
        tallies = []
        alive = self._alive()
        for process in self._processes:
            reading = process.read()
            if reading is None:
                continue
            is_alive = (process.role, process.index, reading.incarnation) in alive
            parts.append(process.part(reading, is_alive))
            if process.role == API_SERVER:
                tallies.append((reading.cells, reading.created_unix, is_alive))
        cells, created_unix = add_up(self._layouts[API_SERVER], tallies)
        return [self._requests.part(cells, created_unix, self._exemplars(self._exemplar_paths, asked)), *parts]

    def _own_parts(self, own: ProcessTally, asked: ScrapeRequest) -> list[Part]:
        parts = [self._python_info]
        reading = own.read()
        if reading is not None:
            exemplars = self._exemplars([self._exemplar_paths[self._index]], asked)
            parts += [self._requests.part(reading.cells, reading.created_unix, exemplars), own.part(reading, True)]
        return parts

    def _exemplars(self, paths: Sequence[str], asked: ScrapeRequest) -> Exemplars:
        """Nothing is read for a format that has none."""
        return read_exemplars(paths, self._slots) if asked.form.is_openmetrics else {}

    def _engine_parts(self, fresh: Engines, engines: Sequence[int]) -> list[Part]:
        """The series of those that are fresh; of the others only that they are absent."""
        name = self._facts.model_name
        up = [("wholebatch:exporter_up", {"engine": str(e)}, float(e in fresh)) for e in engines]
        config = [("vllm:cache_config_info", self._cache_config | {"engine": str(e)}, 1.0) for e in fresh]
        parts = [scrape_part([*up, *config], model_name=name)]
        for engine, one in fresh.items():
            cells = np.frombuffer(one.snapshot.cells, dtype="<f8")
            parts.append(self._engines[engine].part(cells, one.snapshot.created_unix))
        return parts

    def _alive(self) -> Processes:
        """Which incarnations run: a tally's gauges say something while the one that wrote it is among them."""
        table = self._table()
        alive = {(p.role, p.index, p.incarnation) for p in (table.processes if table else ()) if p.state != "ended"}
        return alive | {self._itself}
