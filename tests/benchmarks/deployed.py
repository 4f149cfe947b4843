"""A deployment for measuring scrapes at any size on few cores: one or two real API servers, a stand-in for the rest.

Real: the API server processes 0 and 1 with their HTTP, elections and files; every other process's tally file, written
by its own `TallyStore`; every engine's `Beacon`, with its sockets, heartbeats and grants; the deployment table. What
stands in is one process (`python -m tests.benchmarks.deployed DIRECTORY …`) where there would be many: it holds all
those stores, beacons and the table's publisher, and counts what a busy deployment counts, through the real recorders.
No request is served: API servers 0 and 1 count their own process only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from engine import wire
from engine.config import CacheConfig, ChatConfig, HttpConfig, ModelConfig, Patience, SchedulerConfig, StatsConfig
from engine.loop.beacon import Beacon, Shared
from engine.schedule.batch import IterationCounts
from engine.schedule.record import Recorder
from engine.wire import (
    DEPLOYMENT_TOPIC,
    Deployment,
    EngineConfig,
    Facts,
    Lifeline,
    ProcessEntry,
    ServerConfig,
    deployment_endpoint,
    make_lifeline,
)
from frontend.counters.request_record import RequestRecord
from metrics.broadcast import Publisher
from metrics.catalogue import API_SERVER, ENGINE, SUPERVISOR
from metrics.files.store import TallyStore, tally_path
from metrics.layout import Shape, build_layout
from metrics.usage import ProcessMetrics

MAX_MODEL_LEN = 2048
FACTS = Facts(
    model_name="m",
    max_model_len=MAX_MODEL_LEN,
    vocab_size=300,
    block_size=16,
    num_gpu_blocks=512,
    cache_dtype="float32",
    enable_prefix_caching=True,
)
TABLE_S, HOUSEKEEPING_S = 0.1, 1.0
COUNTS = IterationCounts(num_requests=64, num_decode_tokens=64, num_generated_tokens=64)


# --- the stand-in ---


class Process:
    """One process's tally: what it counts in a commit, and once a second."""

    def __init__(self, directory: str, role: str, index: int, shape: Shape) -> None:
        layout = build_layout(role, shape)
        self.store = TallyStore.open(tally_path(directory, role, index), layout, incarnation=1, now_unix=time.time())
        self._process = ProcessMetrics(self.store.tally)
        self._engine = Recorder(self.store.tally, layout, shape.num_api_servers) if role == ENGINE else None
        self._server = RequestRecord(self.store.tally, layout, shape.num_engines) if role == API_SERVER else None

    def work(self) -> None:
        """As in the iterations of one turn, and commit."""
        if self._engine is not None:
            self._engine.iteration(COUNTS, 0.02)
        if self._server is not None:
            for engine in self._server.engines:
                engine.received(4)
                engine.delivered(4)
                engine.later_tokens(0.0213, 4)
                engine.first_token(0.153)
            self._server.flush()
        self.store.commit()

    def keep_house(self) -> None:
        self._process.update()
        self.store.commit()


def stand_in(directory: str, num_servers: int, num_engines: int, num_real: int, work_s: float | None) -> None:
    """Until it is killed. `work_s` is how often every process counts and commits; None: an idle deployment's."""
    shape = Shape(num_engines=num_engines, num_api_servers=num_servers, max_model_len=MAX_MODEL_LEN)
    indices = [(API_SERVER, i) for i in range(num_real, num_servers)]
    indices += [*((ENGINE, i) for i in range(num_engines)), (SUPERVISOR, 0)]
    processes = [Process(directory, role, index, shape) for role, index in indices]
    lifelines = [make_lifeline() for _ in range(num_engines)]  # the other ends stay open
    engines = processes[-1 - num_engines : -1]
    for index, (process, (_, end)) in enumerate(zip(engines, lifelines, strict=True)):
        _beacon(directory, index, shape, process.store, end).start()
    publisher = Publisher(zmq.Context(), deployment_endpoint(directory))
    rows = [(API_SERVER, i) for i in range(num_servers)] + [*((ENGINE, i) for i in range(num_engines)), (SUPERVISOR, 0)]
    entries = tuple(ProcessEntry(role=r, index=i, incarnation=1, pid=1, state="starting") for r, i in rows)
    table = wire.encode(Deployment(version=1, facts=FACTS, processes=entries))
    table_at = house_at = work_at = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= table_at:
            table_at = now + TABLE_S
            publisher.publish(DEPLOYMENT_TOPIC, table)
        if now >= house_at:
            house_at = now + HOUSEKEEPING_S
            for process in processes:
                process.keep_house()
        if work_s is not None and now >= work_at:
            work_at = now + work_s
            for process in processes:
                process.work()
        time.sleep(0.005)


def _beacon(directory: str, index: int, shape: Shape, store: TallyStore, lifeline: socket.socket) -> Beacon:
    config = EngineConfig(
        index=index,
        incarnation=1,
        num_engines=shape.num_engines,
        num_api_servers=shape.num_api_servers,
        directory=directory,
        lifeline_fd=0,
        model=ModelConfig(path="/nowhere", served_model_names=("m",)),
        cache=CacheConfig(),
        scheduler=SchedulerConfig(),
        stats=StatsConfig(),
        patience=Patience(),
        facts=None,
    )
    return Beacon(config, store.tally.layout, store, Shared(), Lifeline(lifeline.detach()))


# --- the API servers ---


class ApiServer:
    """One real API server process with sockets of its own, and a connection to its public port."""

    def __init__(self, listening: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=30)

    def get(self, path: str, **headers: str) -> bytes:
        """Fetch a path; returns the body of a 200."""
        self._connection.request("GET", path, headers=headers)
        answer = self._connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    def wait_until_exported(self, api_server: int) -> None:
        """Until API server `api_server` exports every engine, as this one sees it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                exporters = json.loads(self.get("/deployment"))["exporters"]
                if exporters and all(e["grant"] and e["grant"]["api_server"] == api_server for e in exporters):
                    return
            except (AssertionError, OSError):
                self._connection.close()
            time.sleep(0.1)
        raise AssertionError("the API server did not become the exporter of every engine")


@contextmanager
def deployed(model: Path, num_servers: int, num_engines: int, work_s: float | None) -> Iterator[list[ApiServer]]:
    """The real API servers: the first one exports every engine, the second, where there are two, none."""
    num_real = min(num_servers, 2)
    with ExitStack() as stack:
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="wb", dir=base))
        arguments = [directory, str(num_servers), str(num_engines), str(num_real), str(work_s or 0)]
        _start(stack, [sys.executable, "-m", "tests.benchmarks.deployed", *arguments])
        admin = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_servers)]
        addresses = tuple(one.getsockname() for one in admin)
        servers: list[ApiServer] = []
        for index in range(num_real):
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            config = _config(index, directory, num_engines, model, addresses)
            servers.append(ApiServer(listening, _serve(stack, config, listening, admin[index])))
            servers[-1].wait_until_exported(0)
        yield servers


def _config(
    index: int, directory: str, num_engines: int, model: Path, admin_addresses: tuple[tuple[str, int], ...]
) -> ServerConfig:
    return ServerConfig(
        index=index,
        incarnation=1,
        directory=directory,
        num_engines=num_engines,
        num_api_servers=len(admin_addresses),
        listen_fd=0,
        admin_fd=0,
        lifeline_fd=0,
        admin_addresses=admin_addresses,
        port=0,
        model=ModelConfig(path=str(model), served_model_names=("m",)),
        http=HttpConfig(),
        chat=ChatConfig(),
        scheduler=SchedulerConfig(),
        stats=StatsConfig(),
        patience=Patience(drain_timeout_s=1.0),
    )


def _serve(
    stack: ExitStack, config: ServerConfig, listening: socket.socket, admin: socket.socket
) -> subprocess.Popen[bytes]:
    lifeline, childs_end = make_lifeline()
    stack.callback(lifeline.close)
    reading, writing = os.pipe()
    descriptors: dict[str, Any] = {
        "listen_fd": listening.fileno(),
        "admin_fd": admin.fileno(),
        "lifeline_fd": childs_end.fileno(),
    }
    os.write(writing, wire.encode(replace(config, **descriptors)))
    os.close(writing)
    command = [sys.executable, "-m", "frontend.server", "--config-fd", str(reading)]
    process = _start(stack, command, pass_fds=[reading, *descriptors.values()])
    os.close(reading)
    childs_end.close()
    return process


def _start(stack: ExitStack, command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **how)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("numbers", nargs=3, type=int, help="API servers, engines, real API servers")
    parser.add_argument("work_s", type=float, help="0: idle")
    given = parser.parse_args()
    num_servers, num_engines, num_real = given.numbers
    stand_in(given.directory, num_servers, num_engines, num_real, given.work_s or None)
