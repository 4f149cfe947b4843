"""What one answer to a scrape consists of: whose series, of which scopes, and the last look at the leases.

Public port: the whole deployment. Request-level series are summed over every API server's tally file, whichever API
server answers; each engine's series come from its exporter; every process has its own process series. With
`--metrics-view pool` the queues and caches in it are those of all engines together, without a label `engine`: one
sample a name, so that a router finds the same whether it keeps the first or the last, and no sum has an engine twice.

Admin port: this process's own, and the series of the engines whose exporter it is, so that the admin ports sum to the
public one; or its own alone, for targets by discovery (`frontend.scrape.discovery`), where every engine is a target of
its own. Exemplars go with the request-level series, in OpenMetrics: of each bucket the newest one, of any API server or
of this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property, lru_cache
from typing import Final

import numpy as np

from engine.wire import Deployment, Facts
from frontend.engines import Identity, InFlight
from frontend.scrape.exporter import Exportable, Exporter
from frontend.scrape.pool import POOLED, cache_config
from frontend.scrape.request import ScrapeRequest
from metrics.catalogue import API_SERVER, ENGINE, ROLES, SUPERVISOR, Scope
from metrics.exposition import (
    MAX_PLANS,
    PROCESS_SCOPES,
    Exemplars,
    Part,
    Renderer,
    Stack,
    Template,
    add_up,
    scrape_part,
)
from metrics.files import Entries, StoreError, Tallies, TallyReader, exemplars_path, read_exemplars, tally_path
from metrics.layout import Layout, Shape, build_layout
from metrics.usage import python_info

Engines = Mapping[int, Exportable]
Sample = tuple[str, dict[str, str], float]  # name, labels, value
Incarnations = Set[tuple[str, int, int]]  # (role, index, incarnation)

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


class Processes:
    """The tallies of one role, and the process series of all of them: with gauges of those that live."""

    def __init__(self, directory: str, role: str, num: int, layout: Layout, *, log_stats: bool) -> None:
        self.role = role
        self.tallies = Tallies(directory, role, num, layout)
        self._layout = layout
        self._templates = [
            {
                is_alive: process_template(layout, f"{role}-{index}", log_stats=log_stats, has_gauges=is_alive)
                for is_alive in (False, True)
            }
            for index in range(num)
        ]
        self._sorted_by: object = None
        self.alive: list[int] = []  # indices
        self.ended: list[int] = []
        self._stacks = lru_cache(MAX_PLANS)(self._make_stack)  # they come back, and their plans with them
        self._stack = self._stacks(())

    def read(self, alive: Incarnations) -> None:
        """Bring everything up to date. A tally's gauges say something while the one that wrote it is among `alive`."""
        self.tallies.read()
        incarnations = self.tallies.incarnations
        if self._sorted_by == (incarnations, alive):
            return
        self._sorted_by = incarnations.copy(), alive
        found = [index for index, incarnation in enumerate(incarnations) if incarnation]
        is_alive = {index: (self.role, index, incarnations[index]) in alive for index in found}
        self.alive = [index for index in found if is_alive[index]]
        self.ended = [index for index in found if not is_alive[index]]
        self._stack = self._stacks(tuple(is_alive.items()))

    def part(self) -> Part:
        """The process's series with their values."""
        return self._stack.part(self.tallies.cells, self.tallies.created_unix)

    def _make_stack(self, is_alive: tuple[tuple[int, bool], ...]) -> Stack:
        return Stack(self._layout, [(index, self._templates[index][lives]) for index, lives in is_alive])


def process_template(layout: Layout, label: str | None, *, log_stats: bool, has_gauges: bool = True) -> Template:
    """The process series of one process."""
    return Template(layout, PROCESS_SCOPES, process=label, log_stats=log_stats, has_gauges=has_gauges)


class ScrapeResponder:
    """Answers scrapes. `table` is the newest deployment table."""

    def __init__(  # noqa: PLR0913  its collaborators, handed in by the one place that makes it
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
        pool: Callable[[], Sequence[Sample]] | None = None,
    ) -> None:
        """`pool` makes the samples that are shown for all engines together in place of each engine's."""
        shape, index = layouts.shape, identity.index
        self._index = index
        self._itself = (API_SERVER, index, identity.incarnation)
        self._alive_by: int | None = None  # version of the table
        self._alive_now: Incarnations = frozenset([self._itself])
        self._layouts = layouts
        self._facts = facts
        self._exporter = exporter
        self._table = table
        self._clock = clock
        self._renderer = Renderer()
        name = facts.model_name
        self._requests = Template(layouts[API_SERVER], (Scope.REQUEST,), model_name=name, log_stats=log_stats)
        self._pool = pool
        # By whether the engines are shown as a pool.
        self._engines = {
            is_pool: [
                Template(
                    layouts[ENGINE],
                    (Scope.ENGINE,),
                    model_name=name,
                    engine=engine,
                    log_stats=log_stats,
                    without=POOLED if is_pool else frozenset(),
                )
                for engine in range(shape.num_engines)
            ]
            for is_pool in (False, True)
        }
        nums = {API_SERVER: shape.num_api_servers, ENGINE: shape.num_engines, SUPERVISOR: 1}
        self._processes = {
            role: Processes(directory, role, num, layouts[role], log_stats=log_stats) for role, num in nums.items()
        }
        layout = layouts[API_SERVER]
        self._entries = Entries(layout)
        self._exemplar_paths = [exemplars_path(directory, API_SERVER, i) for i in range(shape.num_api_servers)]
        self._own = TallyReader(tally_path(directory, API_SERVER, index), layout)
        self._own_process = process_template(layout, None, log_stats=log_stats)
        self._labelled_own_process = process_template(layout, f"{API_SERVER}-{index}", log_stats=log_stats)
        self._cache_config = cache_config(facts)
        self._scrape_part = lru_cache(MAX_PLANS)(self._make_scrape_part)
        self._python_info = scrape_part([("python_info", python_info(), 1.0)])

    @property
    def num_engines(self) -> int:
        return len(self._engines[False])

    async def whole(self, asked: ScrapeRequest) -> bytes:
        """The body for the whole deployment, its queues and caches as the operator wants them shown."""
        pool = self._pool
        if pool is None:
            return await self.engines(asked)
        exportable, engines = await self._exportable(), range(self.num_engines)

        def parts(fresh: Engines) -> list[Part]:
            together = scrape_part(pool(), model_name=self._facts.model_name, of_all_engines=True)
            return [*self._shared_parts(asked), *self._engine_parts(fresh, engines, is_pool=True), together]

        return self._render(exportable, parts, asked)

    async def engines(self, asked: ScrapeRequest) -> bytes:
        """The body for the whole deployment, every engine's own queue and cache in it."""
        exportable, engines = await self._exportable(), range(self.num_engines)
        return self._render(
            exportable, lambda fresh: [*self._shared_parts(asked), *self._engine_parts(fresh, engines)], asked
        )

    async def _exportable(self) -> Engines:
        engines = range(self.num_engines)
        found = [self._exporter.look(engine) for engine in engines]
        if None in found:
            found = await asyncio.gather(*(self._exporter.series(engine) for engine in engines))
        return {engine: one for engine, one in zip(engines, found, strict=True) if one is not None}

    async def engine(self, engine: int, asked: ScrapeRequest) -> bytes:
        """The body for one engine's series alone."""
        found = await self._exporter.series(engine)
        exportable = {} if found is None else {engine: found}
        return self._render(exportable, lambda fresh: self._engine_parts(fresh, [engine]), asked)

    def processes(self, asked: ScrapeRequest) -> bytes:
        """The body for the process series of engines and the supervisor, which have no port of their own."""
        alive = self._alive()
        without_port = [self._processes[role] for role in (ENGINE, SUPERVISOR)]
        for processes in without_port:
            processes.read(alive)
        return self._render({}, lambda fresh: [processes.part() for processes in without_port], asked)

    def own(self, asked: ScrapeRequest) -> bytes:
        """The body for this process alone, without an engine's series; labelled as on the public port."""
        return self._render({}, lambda fresh: self._own_parts(self._labelled_own_process, asked), asked)

    def admin(self, asked: ScrapeRequest) -> bytes:
        """The body for this process and the engines whose exporter it is."""
        held = {engine: self._exporter.held(engine) for engine in range(self.num_engines)}
        exportable = {engine: one for engine, one in held.items() if one is not None}
        return self._render(
            exportable,
            lambda fresh: [*self._own_parts(self._own_process, asked), *self._engine_parts(fresh, [*fresh])],
            asked,
        )

    def in_flight(self, *, including_own: bool = True) -> InFlight:
        """What all API servers that live, or all others, wait for, by their last commits."""
        servers = self._processes[API_SERVER]
        servers.read(self._alive())
        wanted = [index for index in servers.alive if including_own or index != self._index]
        found = servers.tallies.cells[:, self._layouts.in_flight_cells][wanted]  # (servers, gauges, engines)
        return InFlight(*found.sum(axis=(0, 2)).tolist())

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
        alive = self._alive()
        for processes in self._processes.values():
            processes.read(alive)
        servers = self._processes[API_SERVER]
        cells = add_up(self._layouts[API_SERVER], servers.tallies.cells, servers.ended)
        created_unix = float(servers.tallies.created_unix.max())  # one tally begun anew is a reset of the sum
        requests = self._requests.part(cells, created_unix, self._exemplars(self._exemplar_paths, asked))
        return [self._python_info, requests, *(processes.part() for processes in self._processes.values())]

    def _own_parts(self, process: Template, asked: ScrapeRequest) -> list[Part]:
        try:
            reading = self._own.read()
        except StoreError:
            return [self._python_info]
        exemplars = self._exemplars([self._exemplar_paths[self._index]], asked)
        requests = self._requests.part(reading.cells, reading.created_unix, exemplars)
        return [self._python_info, requests, process.part(reading.cells, reading.created_unix)]

    def _exemplars(self, paths: Sequence[str], asked: ScrapeRequest) -> Exemplars:
        """Nothing is read for a format that has none."""
        return read_exemplars(paths, self._entries) if asked.form.is_openmetrics else {}

    def _engine_parts(self, fresh: Engines, engines: Sequence[int], *, is_pool: bool = False) -> list[Part]:
        """The series of those that are fresh; of the others only that they are absent. `is_pool`: without what is shown
        of all together."""
        parts = [self._scrape_part(tuple(engines), frozenset(fresh), is_pool)]
        for engine, one in fresh.items():
            cells = np.frombuffer(one.snapshot.cells, dtype="<f8")
            parts.append(self._engines[is_pool][engine].part(cells, one.snapshot.created_unix))
        return parts

    def _make_scrape_part(self, engines: tuple[int, ...], fresh: frozenset[int], is_pool: bool) -> Part:
        up = [("wholebatch:exporter_up", {"engine": str(e)}, float(e in fresh)) for e in engines]
        config = [("vllm:cache_config_info", self._cache_config | {"engine": str(e)}, 1.0) for e in sorted(fresh)]
        config = [] if is_pool else config
        return scrape_part([*up, *config], model_name=self._facts.model_name)

    def _alive(self) -> Incarnations:
        """The incarnations that run, by index."""
        table = self._table()
        if table is not None and table.version != self._alive_by:
            self._alive_by = table.version
            alive = {(p.role, p.index, p.incarnation) for p in table.processes if p.state != "ended"}
            self._alive_now = frozenset(alive | {self._itself})
        return self._alive_now
