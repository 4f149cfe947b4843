"""Pieces of a deployment around API servers under test: an engine's beacon, tally files, a table, in one directory."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import fields, replace
from typing import Any

import numpy as np
import zmq
import zmq.asyncio
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestServer

from engine import wire
from engine.config import ChatConfig, HttpConfig, ModelConfig, Patience, SchedulerConfig, StatsConfig
from engine.wire import Finish, Hello, Output, Outputs, ServerConfig, Start, Submit
from engine.wire.deployment import Deployment, Facts, ProcessEntry
from frontend.app import State, admin_app, public_app
from frontend.deployment_view import DeploymentView
from frontend.engines.generation import Delta, Generation
from frontend.services import Services
from metrics import broadcast
from metrics.catalogue import API_SERVER, ENGINE
from metrics.election import Granter
from metrics.layout import Layout, Shape, build_layout
from metrics.snapshot import Heartbeat, Snapshot, decode_to_beacon, encode
from metrics.tally import Tally
from tests.contexts import OwningContext
from tests.e2e.harness import Samples, parse
from tests.frontend.small_tokenizers import byte_level_tokenizer

FACTS = Facts(
    model_name="tiny",
    max_model_len=512,
    vocab_size=300,
    block_size=16,
    num_gpu_blocks=64,
    cache_dtype="float32",
    enable_prefix_caching=True,
)


def make_config(directory: str, **changes: Any) -> ServerConfig:
    """As the supervisor would send it; `changes` are fields of the configuration or of any of its sections."""

    def section(kind: type[Any], **usual: Any) -> Any:
        names = {field.name for field in fields(kind)} & changes.keys() - {"port"}
        return kind(**usual | {name: changes.pop(name) for name in names})

    sections: dict[str, Any] = {
        "model": section(ModelConfig, path="/nowhere", served_model_names=("tiny",)),
        "http": section(HttpConfig),
        "chat": section(ChatConfig),
        "scheduler": section(SchedulerConfig),
        "stats": section(StatsConfig),
        "patience": section(Patience, drain_timeout_s=5.0),
    }
    usual: dict[str, Any] = {
        "index": 0,
        "incarnation": 1,
        "directory": directory,
        "num_engines": 1,
        "num_api_servers": 1,
        "listen_fd": 0,
        "admin_fd": 0,
        "lifeline_fd": 0,
        "port": 8000,
        "admin_addresses": tuple(("127.0.0.1", 9000 + i) for i in range(changes.get("num_api_servers", 1))),
    }
    return ServerConfig(**sections, **usual | changes)


def make_table(version: int, *states: tuple[str, int, int, str], facts: Facts | None = FACTS) -> Deployment:
    """(role, index, incarnation, state) of each process."""
    rows = tuple(ProcessEntry(role=r, index=i, incarnation=n, pid=100 + i, state=s) for r, i, n, s in states)
    return Deployment(version=version, facts=facts, processes=rows)


class FakeEngine:
    """One engine incarnation's ROUTER."""

    def __init__(self, directory: str, incarnation: int) -> None:
        self.incarnation = incarnation
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(wire.work_endpoint(directory, 0, incarnation))
        self._peer = b""

    async def receive(self) -> Any:
        async with asyncio.timeout(10):
            self._peer, raw = await self._socket.recv_multipart()
        return wire.decode_from_api_server(raw)

    async def receive_submits(self, num: int) -> list[Submit]:
        """As many sequences, each as if it had been submitted alone."""
        found: list[Submit] = []
        while len(found) < num:
            submit = await self.receive()
            found += [
                replace(submit, request_id=submit.request_id + i, sampling=submit.sampling.of_sequence(i), n=1)
                for i in range(submit.n)
            ]
        return found

    async def send(self, *outputs: Output, at: float = 0.0) -> None:
        await self.send_raw(wire.encode(Outputs(self.incarnation, at, list(outputs))))

    async def send_raw(self, raw: bytes) -> None:
        await self._socket.send_multipart([self._peer, raw])

    def close(self) -> None:
        self._context.destroy(linger=0)


def finish(reason: str = "length") -> Finish:
    return Finish(reason, None, None)


START = Start(arrived_at=1.0, scheduled_at=1.5, num_cached_tokens=1, num_preemptions=0)


def output(
    submit: Submit, first_index: int, tokens: list[int], end: Finish | None = None, start: Start | None = None
) -> Output:
    """With START where the first token is among the tokens."""
    if first_index == 0 and tokens and start is None:
        start = START
    return Output(submit.request_id, first_index, tokens, None, end, start)


async def deltas_of(generation: Generation) -> list[Delta]:
    """The next that arrive; none once every sequence has ended."""
    news = asyncio.Event()
    generation.listen(news.set)
    async with asyncio.timeout(10):
        while not (deltas := generation.take()) and any(sequence.reason is None for sequence in generation.sequences):
            news.clear()
            await news.wait()
    return deltas


class FakeBeacon:
    """An engine's statistics street, turned by hand: `turn` takes heartbeats in and broadcasts one snapshot."""

    def __init__(
        self, directory: str, shape: Shape, engine: int = 0, incarnation: int = 1, lease_s: float = 0.6
    ) -> None:
        self.layout: Layout = build_layout(ENGINE, shape)
        self.tally = Tally(self.layout)
        self.granter = Granter(incarnation, lease_s, time.monotonic())
        self.num_heartbeats = 0
        self._engine = engine
        self._incarnation = incarnation
        self._sequence = 0
        self._context = zmq.Context()
        self._publisher = broadcast.Publisher(self._context, broadcast.snapshot_endpoint(directory, engine))
        self._heartbeats = broadcast.bind_heartbeats(self._context, broadcast.heartbeat_endpoint(directory, engine))

    def turn(self) -> Snapshot:
        self._take_heartbeats()
        self._sequence += 1
        grant, echo = self.granter.on_publish(self._sequence, time.monotonic())
        snapshot = Snapshot(
            layout_digest=self.layout.digest,
            engine=self._engine,
            incarnation=self._incarnation,
            sequence=self._sequence,
            created_unix=1.0,
            published_unix=time.time(),
            grant=grant,
            echo=echo,
            is_stuck=False,
            cells=np.array(self.tally.cells, dtype="<f8").tobytes(),
        )
        self._publisher.publish(broadcast.TOPIC_TALLY, encode(snapshot))
        return snapshot

    def publish(self, payload: bytes) -> None:
        self._publisher.publish(broadcast.TOPIC_TALLY, payload)

    def close(self) -> None:
        self._publisher.close()
        self._context.destroy(linger=0)

    def _take_heartbeats(self) -> None:
        with suppress(zmq.Again):
            while True:
                message = decode_to_beacon(self._heartbeats.recv(zmq.NOBLOCK))
                if isinstance(message, Heartbeat):
                    self.num_heartbeats += 1
                    self.granter.on_heartbeat(message, time.monotonic())
                else:
                    self.granter.on_resign(message, time.monotonic())


def total(samples: Samples, name: str, **labels: str) -> float | None:
    """None where there is no such series."""
    values = [value for (have, of), value in samples.items() if have == name and labels.items() <= dict(of).items()]
    return sum(values) if values else None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what it waits for says nothing
            await asyncio.sleep(0.001)


class Node:
    """One API server: everything but the process."""

    def __init__(self, state: State, services: Services, public: TestServer, admin: TestServer) -> None:
        self.state = state
        self.services = services
        self.public = public
        self.admin = admin

    async def scrape(self, path: str = "/metrics", *, of_admin: bool = False, accept: str = "") -> Samples:
        return parse((await self.get(path, of_admin=of_admin, accept=accept))[1])

    async def get(self, path: str, *, of_admin: bool = False, accept: str = "") -> tuple[int, str]:
        server = self.admin if of_admin else self.public
        async with ClientSession() as session, session.get(server.make_url(path), headers={"Accept": accept}) as answer:
            return answer.status, (await answer.read()).decode(errors="replace")

    def is_exporter(self, engine: int = 0) -> bool:
        return self.services.exporter.held(engine) is not None


class Deployed:
    """API servers and one beacon an engine, in a directory of their own."""

    def __init__(self, stack: AsyncExitStack, num_api_servers: int, num_engines: int, **changes: Any) -> None:
        self.directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="wb"))
        self.context = OwningContext()
        stack.callback(self.context.destroy, 0)
        self.num = (num_api_servers, num_engines)
        self.changes = changes
        shape = make_config(self.directory, num_api_servers=num_api_servers, num_engines=num_engines).shape(512)
        lease_s = changes.get("lease_s", 0.6)
        self.beacons = [FakeBeacon(self.directory, shape, engine, lease_s=lease_s) for engine in range(num_engines)]
        for beacon in self.beacons:
            stack.callback(beacon.close)
        self.nodes: list[Node] = []
        self._stack = stack
        self._turning = asyncio.create_task(self._turn())
        stack.callback(self._turning.cancel)

    async def begin(self) -> None:
        servers = [(TestServer(public_app(s)), TestServer(admin_app(s)), s) for s in self._states()]
        for public, admin, _ in servers:
            for server in (public, admin):
                await server.start_server()
                self._stack.push_async_callback(server.close)
        addresses = tuple(("127.0.0.1", admin.port) for _, admin, _ in servers)
        for index, (public, admin, state) in enumerate(servers):
            state.config = self._config(index, admin_addresses=addresses)
            serving = Services(state.config, FACTS, self.context, state.view, byte_level_tokenizer())
            state.services = serving
            self._stack.push_async_callback(serving.close)
            self.nodes.append(Node(state, serving, public, admin))

    def pause_beacons(self) -> None:
        self._turning.cancel()

    def _states(self) -> list[State]:
        states = []
        for index in range(self.num[0]):
            view = DeploymentView(self.context, self.directory)
            self._stack.callback(view.close)
            alive = [(API_SERVER, i, 1, "ready") for i in range(self.num[0])]
            view.table = make_table(1, *alive, *((ENGINE, i, 1, "starting") for i in range(self.num[1])))
            states.append(State(self._config(index), view))
        return states

    def _config(self, index: int, **changes: Any) -> Any:
        counts = {"num_api_servers": self.num[0], "num_engines": self.num[1]}
        return make_config(self.directory, index=index, **counts, **self.changes, **changes)

    async def _turn(self) -> None:
        while True:
            for beacon in self.beacons:
                beacon.turn()
            await asyncio.sleep(0.01)


# --- one node, and a client of it ---

COMPLETION = {"prompt": [1, 2, 3], "max_tokens": 4}


async def ask(node: Node, method: str, path: str, **arguments: Any) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text, headers)"""
    arguments.setdefault("timeout", ClientTimeout(total=10))
    async with ClientSession() as session, session.request(method, node.public.make_url(path), **arguments) as answer:
        text = await answer.text()
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text, dict(answer.headers)


async def one(deploy: Any, **changes: Any) -> Node:
    deployed: Deployed = await deploy(1, **changes)
    return deployed.nodes[0]


@asynccontextmanager
async def engine_of(node: Node) -> AsyncIterator[FakeEngine]:
    """An engine that the node has said Hello to."""
    engine = FakeEngine(node.state.config.directory, 1)
    try:
        node.services.clients.on_deployment(make_table(2, (ENGINE, 0, 1, "ready")))
        assert isinstance(await engine.receive(), Hello)
        yield engine
    finally:
        engine.close()
