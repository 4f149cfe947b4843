"""Who may export an engine's series, who is asked for them, and what an answer to a scrape adds up to.

API servers in this process, each with sockets and an admin port of its own; the engine's beacon is turned by the test.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from frontend.scrape.exporter import MAX_REMEMBERED, EngineView, boottime
from frontend.scrape.request import scrape_request
from metrics.catalogue import API_SERVER
from metrics.election import Holder
from metrics.files.held_snapshots import Held
from tests.frontend.deployments import Deployed, Node, make_table, total, until

PLAIN = scrape_request("", "", [])
GENERATED = "vllm:generation_tokens_total"


async def exporter(deployed: Deployed, engine: int = 0) -> Node:
    """The one node that may export the engine's series, once there is one."""
    await until(lambda: any(node.is_exporter(engine) for node in deployed.nodes))
    (only,) = [node for node in deployed.nodes if node.is_exporter(engine)]
    return only


async def test_one_api_server_becomes_the_exporter_and_every_one_gives_the_same_answer(deploy: Any):
    deployed = await deploy(3)
    beacon = deployed.beacons[0]
    beacon.tally.inc(beacon.layout.cell(GENERATED), 42)
    await exporter(deployed)
    for node in deployed.nodes:
        samples = await node.scrape()
        assert total(samples, GENERATED, engine="0", model_name="tiny") == 42
        assert total(samples, "wholebatch:exporter_up", engine="0") == 1
        assert total(samples, "vllm:cache_config_info", num_gpu_blocks="64") == 1


async def test_admin_ports_sum_to_the_public_port(deploy: Any):
    deployed = await deploy(3, 2)
    for engine, beacon in enumerate(deployed.beacons):
        beacon.tally.inc(beacon.layout.cell(GENERATED), 10 + engine)
    for index, node in enumerate(deployed.nodes):
        for engine in range(2):
            node.services.record.engines[engine].received(index + 1)
            node.services.record.engines[engine].first_token(0.25)
        node.services.group.now()
    await exporter(deployed, 0)
    await exporter(deployed, 1)
    whole = await deployed.nodes[2].scrape()
    parts = [await node.scrape(of_admin=True) for node in deployed.nodes]
    ends = ("_total", "_bucket", "_sum", "_count")
    moving = ("wholebatch:stale", "process_", "python_")
    for (name, labels), value in whole.items():
        if name.endswith(ends) and not name.startswith(moving) and "process" not in dict(labels):
            assert sum(part.get((name, labels), 0.0) for part in parts) == value, (name, labels)
    assert total(whole, "wholebatch:received_tokens_total", engine="1") == 6


async def test_process_series_are_labelled_on_the_public_port_and_not_on_an_admin_port(deploy: Any):
    deployed = await deploy(2)
    node = deployed.nodes[1]
    await until(lambda: deployed.nodes[0].services.scrape.own(PLAIN).count(b"process_open_fds 0.0") == 0)
    name = "process_resident_memory_bytes"
    whole = await node.scrape()
    assert {dict(labels)["process"] for have, labels in whole if have == name} == {"api-server-0", "api-server-1"}
    own = await node.scrape(of_admin=True)
    assert [labels for have, labels in own if have == name] == [frozenset()]
    alone = await node.scrape("/metrics/own", of_admin=True)
    assert [labels for have, labels in alone if have == name] == [frozenset({("process", "api-server-1")})]


async def test_an_exporter_that_resigns_exports_no_more_and_another_does_without_a_gap(deploy: Any):
    deployed = await deploy(2)
    old = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not old]
    old.services.exporter.resign()
    assert not old.is_exporter()
    assert total(await other.scrape(), GENERATED) == 0
    assert other.is_exporter()
    assert total(await old.scrape(), GENERATED) == 0
    assert not old.is_exporter()


async def test_a_silent_engine_is_absent_and_not_told_from_memory(deploy: Any):
    deployed = await deploy(2, lease_s=0.3)
    await exporter(deployed)
    deployed.pause_beacons()
    await until(lambda: not any(node.is_exporter() for node in deployed.nodes))
    for node in deployed.nodes:
        samples = await node.scrape()
        assert total(samples, GENERATED) is None
        assert total(samples, "wholebatch:exporter_up", engine="0") == 0
        assert total(samples, "wholebatch:received_tokens_total") == 0


async def test_a_lease_that_runs_out_while_the_answer_is_written_takes_its_series_out_of_it(deploy: Any):
    deployed = await deploy(1)
    node = await exporter(deployed)
    scrape = node.services.scrape
    num_looks = 0

    def clock() -> float:
        nonlocal num_looks
        num_looks += 1
        return boottime() if num_looks == 1 else boottime() + 3600

    scrape._clock = clock
    samples = await node.scrape()
    assert total(samples, GENERATED) is None
    assert total(samples, "wholebatch:exporter_up", engine="0") == 0


async def end_of_broadcasts(deployed: Any) -> None:
    """From here on snapshots come only by a test's hand; all have heard the last one."""
    deployed.pause_beacons()
    last = deployed.beacons[0].turn()
    await until(lambda: all(node.services.exporter.engines[0].holder.snapshot == last for node in deployed.nodes))


async def test_who_has_just_started_waits_for_an_engines_first_snapshot(deploy: Any):
    deployed = await deploy(2)
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await end_of_broadcasts(deployed)
    other.services.exporter.engines[0] = EngineView(Holder(deployed.nodes.index(other), 1, 0.6), boottime())
    assert other.services.exporter.look(0) is None
    asking = asyncio.create_task(other.services.exporter.series(0))
    await asyncio.sleep(0)  # it has looked
    deployed.beacons[0].turn()
    assert await asking is not None


async def test_who_heard_more_than_the_exporter_exports_what_the_exporter_does(deploy: Any):
    deployed = await deploy(2)
    beacon = deployed.beacons[0]
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await end_of_broadcasts(deployed)
    held = holder.services.exporter.held(0)
    assert held is not None
    beacon.tally.inc(beacon.layout.cell(GENERATED), 42)
    ahead = beacon.turn()
    other.services.exporter._on_snapshot(ahead)
    assert (await other.services.exporter.series(0)) == held
    holder.services.exporter._on_snapshot(ahead)
    found = await other.services.exporter.series(0)
    assert found == holder.services.exporter.held(0)
    assert found is not None
    assert found.snapshot == ahead


async def test_who_heard_less_than_the_exporter_waits_for_it(deploy: Any):
    deployed = await deploy(2)
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await end_of_broadcasts(deployed)
    behind = other.services.exporter.engines[0]
    other.services.exporter._reader._on_messages = lambda messages: None
    ahead = deployed.beacons[0].turn()
    await until(lambda: holder.services.exporter.engines[0].holder.snapshot == ahead)
    assert behind.grant is not None
    assert other.services.exporter.look(0) is None
    asking = asyncio.create_task(other.services.exporter.series(0))
    await asyncio.sleep(0)  # it has looked
    other.services.exporter._on_snapshot(ahead)
    found = await asking
    assert found is not None
    assert found.snapshot == ahead


async def test_what_an_exporter_that_is_frozen_holds_is_not_exported_longer_than_its_right(deploy: Any):
    deployed = await deploy(2)
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await until(lambda: other.services.exporter.look(0) is not None)
    deployed.pause_beacons()
    found = other.services.exporter.look(0)
    assert found is not None
    for expires_at, is_exported in ((boottime() + 10, True), (boottime(), False)):
        holder.services.exporter._writer.hold(0, Held(found.snapshot.position, expires_at))
        assert (other.services.exporter.look(0) is not None) == is_exported


async def test_an_exporter_that_has_ended_is_not_read(deploy: Any):
    deployed = await deploy(2)
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await until(lambda: other.services.exporter.look(0) is not None)
    deployed.pause_beacons()
    holder.services.exporter._writer.close()
    assert other.services.exporter.look(0) is None


async def test_what_is_held_at_an_older_term_than_what_is_known_is_refused(deploy: Any):
    deployed = await deploy(2)
    holder = await exporter(deployed)
    (other,) = [node for node in deployed.nodes if node is not holder]
    await until(lambda: other.services.exporter.look(0) is not None)
    await end_of_broadcasts(deployed)
    newest = other.services.exporter.engines[0].holder.snapshot
    assert newest is not None
    assert newest.grant is not None
    term = (newest.grant.term[0], newest.grant.term[1] + 1)
    newer = replace(newest, sequence=newest.sequence + 1, grant=replace(newest.grant, term=term))
    other.services.exporter._on_snapshot(newer)
    assert other.services.exporter.look(0) is None


async def test_the_snapshots_remembered_are_bounded(deploy: Any):
    deployed = await deploy(1)
    view = (await exporter(deployed)).services.exporter.engines[0]
    await until(lambda: len(view._latest) == MAX_REMEMBERED)
    first = view._latest[0]
    await until(lambda: view.snapshot_at(first.position) is None)
    assert len(view._latest) == MAX_REMEMBERED


async def test_one_engines_series_stand_alone_under_their_own_path(deploy: Any):
    deployed = await deploy(2, 2)
    await exporter(deployed, 1)
    samples = await deployed.nodes[0].scrape("/metrics/engine/1")
    assert {dict(labels).get("engine") for _, labels in samples} == {"1"}
    for wrong in ("2", "-1", "x", "00000000001", "%C2%B2"):
        assert (await deployed.nodes[0].get(f"/metrics/engine/{wrong}"))[0] == 404


async def test_openmetrics_is_written_for_who_asks_for_it_with_names_as_they_are(deploy: Any):
    deployed = await deploy(1)
    await exporter(deployed)
    _, text = await deployed.nodes[0].get("/metrics", accept="application/openmetrics-text;version=1.0.0")
    assert text.endswith("# EOF\n")
    assert "\nvllm:generation_tokens_total{" in text
    assert "\nvllm:generation_tokens_created{" in text


async def test_gauges_of_an_ended_api_server_are_left_out_and_its_counters_stay(deploy: Any):
    deployed = await deploy(2)
    for node in deployed.nodes:
        node.services.record.engines[0].submitted()
        node.services.group.now()
    watching = deployed.nodes[0]
    assert await watching.get("/load") == (200, '{"server_load": 2}')
    watching.state.view.table = make_table(2, (API_SERVER, 0, 1, "ready"), (API_SERVER, 1, 1, "ended"))
    samples = await watching.scrape()
    assert total(samples, "wholebatch:api_server_requests_in_flight") == 1
    assert total(samples, "wholebatch:sequences_submitted_total") == 2
    assert await watching.get("/load") == (200, '{"server_load": 1}')


async def test_process_series_are_as_new_as_the_last_commit_and_without_gauges_once_the_process_has_ended(deploy: Any):
    deployed = await deploy(2)
    watching, other = deployed.nodes
    faults = {"where": "heartbeat", "process": "api-server-1"}
    before = total(await watching.scrape(), "wholebatch:bulkhead_errors_total", **faults)
    assert before is not None
    for number in range(1, 4):
        other.services.record.fault("heartbeat")
        other.services.group.now()
        assert total(await watching.scrape(), "wholebatch:bulkhead_errors_total", **faults) == before + number
    watching.state.view.table = make_table(2, (API_SERVER, 0, 1, "ready"), (API_SERVER, 1, 1, "ended"))
    samples = await watching.scrape()
    assert total(samples, "wholebatch:bulkhead_errors_total", **faults) == before + 3
    assert total(samples, "process_open_fds", process="api-server-1") is None
    watching.state.view.table = make_table(3, (API_SERVER, 0, 1, "ready"), (API_SERVER, 1, 2, "starting"))
    assert total(await watching.scrape(), "process_open_fds", process="api-server-1") is None
    watching.state.view.table = make_table(4, (API_SERVER, 0, 1, "ready"), (API_SERVER, 1, 1, "ready"))
    assert total(await watching.scrape(), "process_open_fds", process="api-server-1") is not None


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"nonsense"])
async def test_snapshots_that_do_not_parse_are_counted_and_change_nothing(deploy: Any, raw: bytes):
    deployed = await deploy(1)
    node = await exporter(deployed)
    deployed.beacons[0].publish(raw)
    cell = node.services.record._layout.cell("wholebatch:wire_rejected_total", kind="snapshot")
    await until(lambda: node.services.record._tally.cells[cell] == 1)
    assert total(await node.scrape(), GENERATED) == 0
