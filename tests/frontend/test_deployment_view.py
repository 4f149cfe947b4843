"""The newest deployment table is what counts, whatever else arrives."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator

import pytest

from engine import wire
from engine.wire import DEPLOYMENT_TOPIC, deployment_endpoint
from frontend.deployment_view import DeploymentView
from metrics import broadcast
from metrics.catalogue import ENGINE
from tests.contexts import OwningContext
from tests.frontend.deployments import make_table, until


class Supervisor:
    def __init__(self, context: OwningContext, directory: str) -> None:
        self._publisher = broadcast.Publisher(context, deployment_endpoint(directory))

    async def join(self) -> None:
        await until(lambda: self._publisher.has_subscribers(DEPLOYMENT_TOPIC))

    def publish(self, raw: bytes) -> None:
        assert self._publisher.publish(DEPLOYMENT_TOPIC, raw)

    def table(self, version: int, state: str) -> None:
        self.publish(wire.encode(make_table(version, (ENGINE, 0, 1, state))))


@pytest.fixture
async def both() -> AsyncIterator[tuple[Supervisor, DeploymentView]]:
    with tempfile.TemporaryDirectory(prefix="wb") as directory:
        context = OwningContext()
        supervisor, view = Supervisor(context, directory), DeploymentView(context, directory)
        await supervisor.join()
        yield supervisor, view
        view.close()
        context.destroy(linger=0)


async def test_everybody_hears_of_every_newer_table_until_they_no_longer_want_to(
    both: tuple[Supervisor, DeploymentView],
):
    supervisor, view = both
    heard: list[int] = []
    supervisor.table(1, "starting")
    await until(lambda: view.table is not None)
    unsubscribe = view.subscribe(lambda table: heard.append(table.version))
    assert heard == [1]
    supervisor.table(2, "ready")
    await until(lambda: heard == [1, 2])
    unsubscribe()
    supervisor.table(3, "ready")
    await until(lambda: view.table is not None and view.table.version == 3)
    assert heard == [1, 2]


async def test_an_older_table_changes_nothing(both: tuple[Supervisor, DeploymentView]):
    supervisor, view = both
    supervisor.table(5, "ready")
    supervisor.table(4, "ended")
    supervisor.publish(b"the last one")
    await until(lambda: view.num_rejected == 1)
    assert view.table is not None
    assert view.table.version == 5


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"\xc1"])
async def test_bytes_that_are_no_table_are_counted_and_dropped(both: tuple[Supervisor, DeploymentView], raw: bytes):
    supervisor, view = both
    supervisor.publish(raw)
    supervisor.table(1, "ready")
    await until(lambda: view.table is not None)
    assert view.num_rejected == 1
