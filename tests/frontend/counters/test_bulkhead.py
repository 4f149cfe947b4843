"""P8: faults injected into an API server's part of the statistics plane end at a bulkhead, counted, logged once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import zmq

from metrics.files.exemplars import Origin
from metrics.tally import TallyError
from metrics.usage import ProcessMetrics
from tests.frontend.deployments import Deployed, Node, total, until


async def held(deployed: Deployed) -> Node:
    """The node that exports engine 0."""
    await until(lambda: any(node.is_exporter() for node in deployed.nodes))
    return next(node for node in deployed.nodes if node.is_exporter())


async def faults(node: Node, where: str) -> float:
    samples = await node.scrape(of_admin=True)
    return total(samples, "wholebatch:bulkhead_errors_total", where=where) or 0.0


class Socket:
    """A socket that takes every other message only, and raises otherwise."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._number = 0

    def send(self, raw: bytes, flags: int) -> None:
        self._number += 1
        if self._number % 2:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        self._real.send(raw, flags)

    def close(self) -> None:
        self._real.close()


async def test_a_heartbeat_that_cannot_be_sent_is_counted_and_the_next_ones_keep_the_grant(deploy: Any):
    deployed = await deploy(1)
    node = await held(deployed)
    exporter = node.services.exporter
    exporter._beats[0] = Socket(exporter._beats[0])  # type: ignore[call-overload]
    before = deployed.beacons[0].num_heartbeats
    await until(lambda: deployed.beacons[0].num_heartbeats > before + 3)
    node.services.group.now()
    assert await faults(node, "heartbeat") >= 3
    await until(node.is_exporter)


async def test_a_snapshot_that_breaks_its_reader_is_counted_and_the_next_one_is_read(deploy: Any):
    deployed = await deploy(1)
    node = await held(deployed)
    exporter = node.services.exporter
    on_load, calls = exporter._on_load, 0

    def fail_twice(engine: int, load: float) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise ZeroDivisionError("no load")
        on_load(engine, load)

    exporter._on_load = fail_twice
    await until(lambda: calls > 3)
    node.services.group.now()
    assert await faults(node, "snapshot") == 2
    assert await held(deployed) is node


async def test_process_figures_that_cannot_be_had_are_counted_and_housekeeping_goes_on(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: ProcessMetrics) -> None:
        raise PermissionError("no /proc")

    monkeypatch.setattr(ProcessMetrics, "update", fail)
    monkeypatch.setattr("frontend.services.HOUSEKEEPING_S", 0.01)
    deployed = await deploy(1)
    node = await held(deployed)
    seen: set[float] = set()
    async with asyncio.timeout(20):
        while len(seen) < 3:
            seen.add(await faults(node, "process"))


async def test_a_full_disk_under_a_running_tally_is_counted_and_answers_go_on(deploy: Any):
    def full() -> None:
        raise OSError(28, "No space left on device")

    deployed = await deploy(1)
    node = await held(deployed)
    commit, node.services.group._commit = node.services.group._commit, full
    node.services.record.engines[0].received(5)
    async with asyncio.timeout(10):
        await node.services.group.committed()
    assert (await node.get("/metrics"))[0] == 200
    node.services.group._commit = commit
    node.services.group.now()
    samples = await node.scrape()
    assert total(samples, "wholebatch:received_tokens_total") == 5
    assert await faults(node, "commit") >= 1


async def test_an_exemplar_that_cannot_be_kept_is_counted_and_what_was_observed_stays(deploy: Any):
    deployed = await deploy(1)
    node = await held(deployed)
    assert node.services._exemplars is not None
    node.services._exemplars.close()
    node.services.record.engines[0].first_token(0.25, Origin("request_id", "cmpl-1"))
    node.services.group.now()
    assert await faults(node, "record") == 1
    assert total(await node.scrape(), "vllm:time_to_first_token_seconds_count") == 1


async def test_a_value_that_is_none_costs_no_request_and_no_other_figure(deploy: Any):
    deployed = await deploy(1)
    node = await held(deployed)
    record = node.services.record.engines[0]
    record.first_token(float("nan"))
    record.first_token(-1.0)
    record.first_token(0.5)
    node.services.group.now()
    samples = await node.scrape()
    assert total(samples, "vllm:time_to_first_token_seconds_count") == 1
    assert total(samples, "vllm:time_to_first_token_seconds_sum") == 0.5
    assert await faults(node, "record") == 2
    with pytest.raises(TallyError):
        node.services._store.tally.inc(0, float("nan"))


@pytest.mark.parametrize("jump_s", [-1e8, 1e8])
async def test_a_wall_clock_that_jumps_changes_no_lease(deploy: Any, monkeypatch: pytest.MonkeyPatch, jump_s: float):
    deployed = await deploy(2)
    node = await held(deployed)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    before = deployed.beacons[0].num_heartbeats
    await until(lambda: deployed.beacons[0].num_heartbeats > before + 10)
    assert await held(deployed) is node
    assert total(await node.scrape(), "wholebatch:exporter_up") == 1


async def test_garbage_on_the_snapshot_socket_is_counted_and_dropped(deploy: Any):
    deployed = await deploy(1)
    node = await held(deployed)
    deployed.beacons[0].publish(b"\xc1 no snapshot")
    rejected = node.services.record._layout.cell("wholebatch:wire_rejected_total", kind="snapshot")
    await until(lambda: node.services._store.tally.cells[rejected] == 1)
    assert await held(deployed) is node
