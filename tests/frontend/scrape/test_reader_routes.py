"""What readers of metrics ask for over HTTP, and the door that requests come through."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest
from aiohttp import ClientSession
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from frontend.scrape.pool import POOLED
from frontend.scrape.request import ScrapeRequest
from tests.e2e.harness import Samples, parse
from tests.frontend.deployments import (
    COMPLETION,
    Deployed,
    Node,
    ask,
    engine_of,
    finish,
    one,
    output,
    total,
    until,
)

GENERATED = "vllm:generation_tokens_total"
ENDS = ("_total", "_bucket", "_sum", "_count")
MOVING = ("wholebatch:stale", "wholebatch:snapshots_total", "process_", "python_")
PROMETHEUS_2_42 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


async def exported(deployed: Deployed) -> None:
    """Every engine has its exporter, and every node has heard of it."""
    for engine in range(deployed.num[1]):
        await until(lambda engine=engine: any(node.is_exporter(engine) for node in deployed.nodes))  # type: ignore[misc]
    await until(lambda: all(len(node.services.exporter.heard()) == deployed.num[1] for node in deployed.nodes))


async def busy(deploy: Any, **changes: Any) -> Deployed:
    """Three API servers and two engines that have counted something each."""
    deployed: Deployed = await deploy(3, 2, lease_s=10.0, **changes)  # none runs out on a busy machine
    for engine, beacon in enumerate(deployed.beacons):
        beacon.tally.inc(beacon.layout.cell(GENERATED), 10 + engine)
        for name, value in (("num_requests_running", 3), ("num_requests_waiting", 2), ("kv_cache_usage_perc", 0.25)):
            beacon.tally.set(beacon.layout.cell(f"vllm:{name}"), value * (engine + 1))
    for index, node in enumerate(deployed.nodes):
        for record in node.services.record.engines:
            record.received(index + 1)
            record.first_token(0.25)
        node.services.group.now()
    await exported(deployed)
    return deployed


async def discovered(node: Node) -> dict[str, Samples]:
    """Every target's samples, by instance."""
    _, groups, headers = await ask(node, "GET", "/prometheus/targets")
    assert headers["Content-Type"].startswith("application/json")
    found = {}
    async with ClientSession() as session:
        for group in groups:
            (address,), labels = group["targets"], group["labels"]
            async with session.get(f"http://{address}{labels['__metrics_path__']}") as answer:
                assert answer.status == 200, group
                found[labels["instance"]] = parse(await answer.text())
    assert len(found) == len(groups)
    return found


# --- discovery ---


async def test_discovered_targets_add_up_to_the_public_port_before_and_after_the_exporter_moves(deploy: Any):
    deployed = await busy(deploy)
    before = await discovered(deployed.nodes[0])
    for node in deployed.nodes:
        if node.is_exporter(1):
            node.services.exporter.resign()
            await exported_again(deployed, engine=1)
            break
    after = await discovered(deployed.nodes[2])
    whole = await deployed.nodes[1].scrape()
    for found in (before, after):
        for (name, labels), value in whole.items():
            if name.endswith(ENDS) and not name.startswith(MOVING) and "process" not in dict(labels):
                parts = [samples[name, labels] for samples in found.values() if (name, labels) in samples]
                assert sum(parts) == value, (name, labels)
        for engine in ("0", "1"):
            holders = [instance for instance, samples in found.items() if total(samples, GENERATED, engine=engine)]
            assert [one.partition("/")[2] for one in holders] == [f"engine-{engine}"]


async def exported_again(deployed: Deployed, engine: int) -> None:
    await until(lambda: any(node.is_exporter(engine) for node in deployed.nodes))


async def test_the_discovered_series_are_those_of_the_public_port_each_once(deploy: Any):
    deployed = await busy(deploy)
    whole = await deployed.nodes[1].scrape()
    keys = [key for samples in (await discovered(deployed.nodes[0])).values() for key in samples]
    assert set(keys) == set(whole)
    own = await deployed.nodes[0].scrape("/metrics/own", of_admin=True)
    request_scope = {key for key in own if "process" not in dict(key[1])}
    assert {key for key in keys if keys.count(key) > 1} <= request_scope | {k for k in keys if k[0] == "python_info"}


async def test_processes_without_a_port_have_a_target_and_api_servers_are_not_in_it(deploy: Any):
    deployed = await busy(deploy)
    found = await discovered(deployed.nodes[0])
    (samples,) = [found[instance] for instance in found if instance.endswith("/processes")]
    assert not any("api-server" in dict(labels).get("process", "") for _, labels in samples)


async def test_targets_are_there_before_any_engine_is(deploy: Any):
    node = await one(deploy)
    node.state.services, serving = None, node.state.services
    assert (await ask(node, "GET", "/prometheus/targets"))[0] == 200
    node.state.services = serving


# --- the pool ---


async def test_the_pool_is_one_sample_a_name_and_the_same_from_any_api_server(deploy: Any):
    deployed = await busy(deploy)
    answers = [await node.scrape("/metrics/pool") for node in deployed.nodes]
    assert answers[0] == answers[1] == answers[2]
    values = {name: value for (name, _), value in answers[0].items()}
    assert values == {
        "vllm:num_requests_running": 9,
        "vllm:num_requests_waiting": 6,
        "vllm:kv_cache_usage_perc": 0.375,
        "vllm:gpu_cache_usage_perc": 0.375,
        "vllm:cache_config_info": 1,
    }


async def test_a_silent_engine_is_no_part_of_the_pool(deploy: Any):
    deployed = await deploy(1, lease_s=0.3)
    await exported(deployed)
    assert await deployed.nodes[0].scrape("/metrics/pool")
    deployed.pause_beacons()
    await until(lambda: not deployed.nodes[0].services.exporter.heard())
    assert await deployed.nodes[0].scrape("/metrics/pool") == {}


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
async def test_where_the_engines_are_shown_as_one_the_first_and_the_last_sample_of_a_name_are_the_pools(
    deploy: Any, accept: str
):
    deployed = await busy(deploy, metrics_view="pool")
    node = deployed.nodes[0]
    _, pool = await node.get("/metrics/pool")
    _, text = await node.get("/metrics", accept=accept)
    read = (parse_openmetrics if "openmetrics" in accept else parse_text)(text)
    families = {family.name: family.samples for family in read}
    expected = {family.name: family.samples for family in parse_text(pool)}
    for name in POOLED:
        (sample,) = families[name]
        assert sample.value == expected[name][0].value, name
        assert sample.labels == expected[name][0].labels | {"model_name": "tiny"}
        assert text.count(f"# TYPE {name} ") == 1


async def test_what_is_counted_and_each_engines_own_view_stay_where_the_engines_are_shown_as_one(deploy: Any):
    deployed = await busy(deploy, metrics_view="pool")
    node = deployed.nodes[0]
    whole, engines = await node.scrape(), await node.scrape("/metrics/engines")
    assert {key for key in engines if key not in whole} == {key for key in engines if key[0] in POOLED}
    assert {key: value for key, value in whole.items() if key[0] in (GENERATED, "wholebatch:exporter_up")} == {
        key: value for key, value in engines.items() if key[0] in (GENERATED, "wholebatch:exporter_up")
    }
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert total(whole, name) == total(engines, name)
    alone = await node.scrape("/metrics/engine/1")
    assert total(alone, "vllm:num_requests_running", engine="1") == 6


async def test_the_pools_samples_are_absent_with_the_last_engine_that_is_heard(deploy: Any):
    deployed = await deploy(1, lease_s=0.3, metrics_view="pool")
    await exported(deployed)
    node = deployed.nodes[0]
    assert total(await node.scrape(), "vllm:num_requests_running") == 0
    deployed.pause_beacons()
    await until(lambda: not node.services.exporter.heard())
    assert not {name for name, _ in await node.scrape()} & POOLED


# --- formats ---

PATHS = ("/metrics", "/metrics/engines", "/metrics/engine/0", "/metrics/pool", "/metrics/processes")


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_comes_compressed_restricted_and_headless_where_asked(deploy: Any, path: str):
    deployed = await busy(deploy)
    url = deployed.nodes[0].public.make_url(path)
    async with ClientSession(auto_decompress=False) as session:
        async with session.get(url, headers={"Accept-Encoding": "gzip"}) as answer:
            assert answer.headers["Content-Encoding"] == "gzip"
            whole = parse(gzip.decompress(await answer.read()).decode())
        name = next((name for name, _ in whole), "none")
        async with session.get(url, params={"name[]": name}, headers={"Accept-Encoding": "identity"}) as answer:
            assert "Content-Encoding" not in answer.headers
            assert {have for have, _ in parse(await answer.text())} == ({name} if whole else set())
        async with session.head(url, headers={"Accept-Encoding": "identity"}) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(("accept", "escaping"), [(PROMETHEUS_2_42, ""), (PROMETHEUS_3, "; escaping=allow-utf-8")])
async def test_prometheus_gets_openmetrics_with_units_created_times_and_names_as_they_are(
    deploy: Any, accept: str, escaping: str
):
    deployed = await busy(deploy)
    for path in ("/metrics", "/metrics/pool"):
        _, text, headers = await ask(deployed.nodes[0], "GET", path, headers={"Accept": accept})
        assert headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8" + escaping
        families = {family.name: family for family in parse_openmetrics(text)}
        assert "vllm:num_requests_running" in families
        if path == "/metrics":
            assert families["vllm:time_to_first_token_seconds"].unit == "seconds"
            created = [s for s in families["vllm:generation_tokens"].samples if s.name.endswith("_created")]
            assert len(created) == 2


async def test_a_lease_that_runs_out_while_the_answer_is_compressed_takes_its_series_out_of_it(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
):
    deployed = await busy(deploy)
    node = deployed.nodes[0]
    scrape, body = node.services.scrape, ScrapeRequest.body

    def slow(asked: ScrapeRequest, text: bytes) -> bytes:
        scrape._clock = lambda: float("inf")
        return body(asked, text)

    monkeypatch.setattr(ScrapeRequest, "body", slow)
    samples = await node.scrape()
    assert total(samples, GENERATED) is None
    assert total(samples, "wholebatch:exporter_up") == 0


# --- load reports ---


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_carries_the_pools_figures_where_the_request_asks_for_them(deploy: Any, stream: bool):
    deployed = await busy(deploy)
    node = deployed.nodes[0]
    expected = "TEXT named_metrics.kv_cache_usage_perc=0.375, named_metrics.num_requests_waiting=6.0"
    async with engine_of(node) as engine:
        for asked, header in (("TEXT", expected), ("yaml", None), (None, None)):
            headers = {} if asked is None else {"endpoint-load-metrics-format": asked}
            body = COMPLETION | {"stream": stream}
            asking = asyncio.create_task(ask(node, "POST", "/v1/completions", json=body, headers=headers))
            (submit,) = await engine.receive_submits(1)
            await engine.send(output(submit, 0, [ord("h")], finish()))
            status, _, answered = await asking
            assert (status, answered.get("endpoint-load-metrics")) == (200, header)


async def test_a_load_report_that_fails_is_counted_and_the_answer_goes_out_without(deploy: Any):
    node = await one(deploy)
    node.services.pool.figures = lambda snapshots: [][0]  # type: ignore[method-assign]
    async with engine_of(node) as engine:
        headers = {"endpoint-load-metrics-format": "JSON"}
        asking = asyncio.create_task(ask(node, "POST", "/v1/completions", json=COMPLETION, headers=headers))
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [ord("h")], finish()))
        status, _, answered = await asking
    assert (status, "endpoint-load-metrics" in answered) == (200, False)
    node.services.group.now()
    assert total(await node.scrape(), "wholebatch:bulkhead_errors_total", where="scrape") == 1


# --- the door ---


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_num_queued_reqs": 3}, "max_num_queued_reqs"), ({"max_num_queued_tokens": 5}, "max_num_queued_tokens")],
)
async def test_a_full_queue_is_an_honest_503_whichever_api_server_filled_it(
    deploy: Any, limits: dict[str, int], reason: str
):
    deployed = await deploy(2, **limits)
    node, other = deployed.nodes
    for one_of_two, num_sequences in ((node, 1), (other, 2)):
        record = one_of_two.services.record.engines[0]
        for _ in range(num_sequences):
            record.submitted()
        record.prefilling(1 + num_sequences)
        one_of_two.services.group.now()
    async with engine_of(node) as engine:
        status, body, headers = await ask(node, "POST", "/v1/completions", json=COMPLETION)
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, reason, "1")
        record.prefilling(-1)
        record.ended("stop")
        other.services.group.now()
        asking = asyncio.create_task(ask(node, "POST", "/v1/completions", json=COMPLETION))
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [ord("h")], finish()))
        assert (await asking)[0] == 200
    samples = await node.scrape()
    assert total(samples, "vllm:admission_rejections_total", reason=reason) == 1
    assert total(samples, "vllm:admission_rejections_total") == 1
    assert total(samples, "wholebatch:sequences_submitted_total") == 4


async def test_a_slash_behind_metrics_changes_nothing_on_either_port(deploy: Any):
    deployed = await busy(deploy)
    node = deployed.nodes[0]
    for of_admin in (False, True):
        answers = [await node.get(path, of_admin=of_admin) for path in ("/metrics", "/metrics/")]
        assert [status for status, _ in answers] == [200, 200]
        plain, slashed = ({name for name, _ in parse(text)} for _, text in answers)
        assert slashed == plain
