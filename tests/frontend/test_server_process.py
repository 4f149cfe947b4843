"""The API server as a process, with a test in the supervisor's place: sockets handed down, reports, and three ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import psutil
import pytest
import zmq

from engine import wire
from engine.wire import STOP_SIGNAL, WIRE_VERSION, Hello
from engine.wire.deployment import DEPLOYMENT_TOPIC, Alive, Facts, Failed, Ready, decode_report, deployment_endpoint
from metrics import broadcast
from metrics.catalogue import API_SERVER, ENGINE
from tests.frontend.deployments import FACTS, FakeEngine, finish, make_config, make_table, output
from tests.tiny_models import write_tiny_llama

ROOT = Path(__file__).parent.parent.parent
COMPLETION = {"prompt": [1, 2, 3], "max_tokens": 4}


class Parent:
    """What the supervisor does for one API server."""

    def __init__(self, directory: str, model: Path) -> None:
        self.directory = directory
        self._model = model
        self._context = zmq.Context()
        self._publisher = broadcast.Publisher(self._context, deployment_endpoint(directory))
        self._version = 0
        self.facts: Facts | None = FACTS
        self.engine_state = "starting"
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.admin = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.admin_url = f"http://127.0.0.1:{self.admin.getsockname()[1]}"
        self.lifeline, self._childs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lifeline.setblocking(False)
        self.process: subprocess.Popen[bytes] | None = None
        self._publishing = asyncio.create_task(self._publish())

    def spawn(self, **changes: Any) -> subprocess.Popen[bytes]:
        reading, writing = os.pipe()
        shared = [self.listening.fileno(), self.admin.fileno(), self._childs_end.fileno()]
        descriptors = dict(zip(("listen_fd", "admin_fd", "lifeline_fd"), shared, strict=True))
        address = ("127.0.0.1", self.admin.getsockname()[1])
        fields = {"admin_addresses": (address,), "path": str(self._model)} | descriptors | changes
        os.write(writing, wire.encode(make_config(self.directory, **fields)))
        os.close(writing)
        command = [sys.executable, "-m", "frontend.server", "--config-fd", str(reading)]
        self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[reading, *shared])
        os.close(reading)
        self._childs_end.close()
        return self.process

    async def report(self, kind: type) -> Any:
        """The next report of this kind."""
        async with asyncio.timeout(30):
            while True:
                report = decode_report(await asyncio.get_running_loop().sock_recv(self.lifeline, 65536))
                if isinstance(report, kind):
                    return report

    async def exit_code(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 30)

    def close(self) -> None:
        self._publishing.cancel()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for one in (self.listening, self.admin, self.lifeline):
            one.close()
        self._publisher.close()
        self._context.destroy(linger=0)

    async def _publish(self) -> None:
        while True:
            self._version += 1
            rows = ((API_SERVER, 0, 1, "starting"), (ENGINE, 0, 1, self.engine_state))
            self._publisher.publish(DEPLOYMENT_TOPIC, wire.encode(make_table(self._version, *rows, facts=self.facts)))
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_llama(Path(directory) / "tiny")
        yield Path(directory) / "tiny"


@pytest.fixture
async def parent(model: Path) -> AsyncIterator[Parent]:
    with tempfile.TemporaryDirectory(prefix="wb") as directory:
        parent = Parent(directory, model)
        try:
            yield parent
        finally:
            parent.close()


async def status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


async def knock_for_ever(url: str) -> None:
    async with asyncio.timeout(10):
        while True:
            await status(url)


async def test_it_reports_is_named_and_answers_503_until_the_facts_are_known(parent: Parent):
    parent.facts = None
    process = parent.spawn()
    assert (await parent.report(Alive)).progress > 0
    assert await status(f"{parent.url}/health") == 503
    assert await status(f"{parent.url}/v1/models") == 503
    assert await status(f"{parent.url}/deployment") == 200
    assert psutil.Process(process.pid).cmdline()[0] == "wholebatch api-server 0"
    parent.facts = FACTS
    await parent.report(Ready)
    assert await status(f"{parent.url}/v1/models") == 200
    assert await status(f"{parent.admin_url}/metrics") == 200


async def test_on_sigterm_it_finishes_what_runs_and_takes_no_more(parent: Parent):
    engine = FakeEngine(parent.directory, 1)
    parent.engine_state = "ready"
    process = parent.spawn()
    await parent.report(Ready)
    assert isinstance(await engine.receive(), Hello)
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(f"{parent.url}/v1/completions", json=COMPLETION))
        (submit,) = await engine.receive_submits(1)
        process.send_signal(STOP_SIGNAL)
        parent.listening.close()
        with pytest.raises(aiohttp.ClientError):
            await knock_for_ever(f"{parent.url}/version")
        await engine.send(output(submit, 0, [5], finish()))
        answer = await asking
        assert answer.status == 200
        assert (await answer.json())["usage"]["completion_tokens"] == 1
    assert await parent.exit_code() == 0
    engine.close()


async def test_a_request_that_outlasts_the_drain_does_not_hold_the_end_up(parent: Parent):
    engine = FakeEngine(parent.directory, 1)
    parent.engine_state = "ready"
    process = parent.spawn(drain_timeout_s=0.3)
    await parent.report(Ready)
    await engine.receive()
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(f"{parent.url}/v1/completions", json=COMPLETION))
        await engine.receive_submits(1)
        process.send_signal(STOP_SIGNAL)
        started_at = time.monotonic()
        assert await parent.exit_code() == 0
        assert time.monotonic() - started_at < 10
        answer = await asking
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "engine_lost")
    engine.close()


async def test_it_ends_at_once_when_its_supervisor_does(parent: Parent):
    parent.spawn()
    await parent.report(Ready)
    parent.lifeline.close()
    assert await parent.exit_code() == 1


async def test_a_model_without_a_tokenizer_is_reported_as_a_failure_that_stays(parent: Parent):
    parent.spawn(path="/nowhere")
    assert "/nowhere" in (await parent.report(Failed)).message
    assert await parent.exit_code() == 2


def test_a_configuration_that_cannot_be_read_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "frontend.server", "--config-fd", "0"]
    done = subprocess.run(
        command, input=msgpack.packb([WIRE_VERSION, "serverconfig", {}]), capture_output=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"missing required field" in done.stderr
