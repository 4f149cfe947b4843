"""The routes around the OpenAI API: who may call, what is answered without an engine and with one, what is counted."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any, NoReturn

import pytest
from aiohttp import ClientSession

from engine.wire import Abort
from frontend.api import Terms
from frontend.app import MAX_BODY_BYTES
from frontend.engines import Ask, Limits
from frontend.errors import EngineUnavailable
from frontend.services import Services, queue_limits, terms_of
from metrics.catalogue import API_SERVER, ENGINE
from tests.fakes import fake_asked
from tests.frontend.deployments import (
    COMPLETION,
    FACTS,
    Node,
    ask,
    engine_of,
    finish,
    make_config,
    make_table,
    one,
    output,
    total,
    until,
)


def without_facts(node: Node) -> Services:
    """As it is before an engine has said what it serves."""
    serving, node.state.services = node.state.services, None
    assert serving is not None
    return serving


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/metrics/engine/0", "/load", "/v1/models"])
async def test_until_the_facts_are_known_the_answer_is_503_with_when_to_try_again(deploy: Any, path: str):
    node = await one(deploy)
    without_facts(node)
    status, body, headers = await ask(node, "GET", path)
    assert (status, set(body["error"])) == (503, {"message", "type", "param", "code"})
    assert headers["Retry-After"] == "1"


JSON = {"Content-Type": "application/json"}


async def test_what_runs_and_which_version_is_told_from_the_start(deploy: Any):
    node = await one(deploy)
    without_facts(node)
    assert (await ask(node, "GET", "/version"))[0] == 200
    status, body, _ = await ask(node, "GET", "/deployment")
    assert status == 200
    rows = {(p["role"], p["index"]): p for p in body["processes"]}
    assert rows[API_SERVER, 0]["admin_url"] == f"http://127.0.0.1:{node.admin.port}"
    assert rows[ENGINE, 0]["state"] == "starting"
    node.state.view.table = None
    assert (await ask(node, "GET", "/deployment"))[0] == 503


async def test_health_is_200_only_while_an_engine_is_ready(deploy: Any):
    node = await one(deploy)
    assert (await ask(node, "GET", "/health"))[0] == 503
    node.services.clients.on_deployment(make_table(2, (ENGINE, 0, 1, "ready")))
    assert (await ask(node, "GET", "/health"))[0] == 200
    assert (await ask(node, "POST", "/ping"))[0] == 200
    node.services.clients.on_deployment(make_table(3, (ENGINE, 0, 1, "ended")))
    assert (await ask(node, "GET", "/health"))[0] == 503


async def test_the_deployment_says_who_exports_which_engine_at_which_term(deploy: Any):
    node = await one(deploy)
    await until(lambda: node.services.exporter.engines[0].grant is not None)
    _, body, _ = await ask(node, "GET", "/deployment")
    grant = body["exporters"][0]["grant"]
    assert (grant["api_server"], grant["incarnation"], grant["term"]) == (0, 1, [1, 1])


async def test_with_api_keys_the_api_needs_one_of_them_and_the_rest_stays_open(deploy: Any):
    node = await one(deploy, api_keys=["first", "zweiter-Schlüssel"])

    async def status(path: str, authorization: str | None) -> int:
        headers = {} if authorization is None else {"Authorization": authorization}
        return (await ask(node, "GET", path, headers=headers))[0]

    assert await status("/v1/models", "Bearer first") == 200
    assert await status("/v1/models", "bearer zweiter-Schlüssel") == 200
    for wrong in (None, "", "first", "Basic first", "Bearer", "Bearer ", "Bearer firs", "Bearer firstt"):
        assert await status("/v1/models", wrong) == 401
    for key, expected in (("first", 200), ("firs", 401), ("", 401)):
        assert (await ask(node, "GET", "/v1/models", headers={"x-api-key": key}))[0] == expected
    assert await status("/v1/nothing", None) == 401
    assert await status("/metrics", None) == 200
    assert await status("/version", None) == 200
    _, body, headers = await ask(node, "GET", "/v1/models")
    assert (body["error"]["code"], headers["WWW-Authenticate"]) == ("invalid_api_key", "Bearer")


async def test_a_body_that_is_too_long_is_refused_in_the_usual_shape(deploy: Any):
    node = await one(deploy)
    status, body, _ = await ask(
        node, "POST", "/v1/completions", data=io.BytesIO(b"a" * (MAX_BODY_BYTES + 1)), headers=JSON
    )
    assert (status, set(body)) == (413, {"error"})


async def test_http_answers_are_counted_by_template_and_status_routes_are_not(deploy: Any):
    node = await one(deploy)
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/unknown"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/completions"),
        ("GET", "/anything/at/all"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/version"),
    ]:
        await ask(node, method, path, data=b"{" if method == "POST" else None, headers=JSON)
    samples = await node.scrape()
    counted = {
        (dict(labels)["method"], dict(labels)["handler"], dict(labels)["status"]): value
        for (name, labels), value in samples.items()
        if name == "http_requests_total" and value
    }
    assert counted == {
        ("GET", "/v1/models", "2xx"): 1,
        ("GET", "/v1/models", "4xx"): 1,
        ("POST", "/v1/completions", "4xx"): 1,
        ("GET", "none", "4xx"): 2,
    }
    assert total(samples, "http_request_duration_seconds_count") == 5
    assert total(samples, "http_request_duration_highr_seconds_count") == 5


async def test_the_sizes_of_requests_and_answers_are_what_their_content_length_says(deploy: Any):
    node = await one(deploy)
    _, _, headers = await ask(node, "POST", "/v1/completions", data=b"{" + b" " * 98)
    samples = await node.scrape()
    num_bytes = int(headers["Content-Length"])
    for name, expected in (("http_request_size_bytes", 99), ("http_response_size_bytes", num_bytes)):
        assert total(samples, f"{name}_count", handler="/v1/completions") == 1
        assert total(samples, f"{name}_sum", handler="/v1/completions") == expected


async def test_a_request_without_an_engine_is_refused_and_counted_as_such(deploy: Any):
    node = await one(deploy)
    with pytest.raises(EngineUnavailable):
        node.services.clients.submit([Ask([1], fake_asked())])
    status, body, headers = await ask(node, "POST", "/v1/completions", json=COMPLETION)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "engine_unavailable", "1")
    samples = await node.scrape()
    assert total(samples, "http_requests_total", handler="/v1/completions", status="5xx") == 1
    assert total(samples, "wholebatch:sequences_submitted_total") == 0


async def test_a_commit_that_fails_costs_no_answer_and_is_counted(deploy: Any):
    node = await one(deploy)

    def full() -> None:
        raise OSError("no space left on device")

    commit, node.services.group._commit = node.services.group._commit, full
    assert (await ask(node, "GET", "/v1/models"))[0] == 200
    node.services.group._commit = commit
    node.services.group.now()
    samples = await node.scrape()
    assert (total(samples, "wholebatch:bulkhead_errors_total", where="commit") or 0) >= 1
    assert total(samples, "http_requests_total", handler="/v1/models", status="2xx") == 1


async def test_a_scrape_that_fails_is_counted_and_the_next_one_answers(deploy: Any):
    node = await one(deploy)
    scrape = node.services.scrape
    shared_parts = scrape._shared_parts

    def fail(asked: object) -> NoReturn:
        raise IndexError

    scrape._shared_parts = fail  # type: ignore[method-assign]
    assert (await ask(node, "GET", "/metrics"))[0] == 500
    scrape._shared_parts = shared_parts  # type: ignore[method-assign]
    node.services.group.now()
    assert total(await node.scrape(), "wholebatch:bulkhead_errors_total", where="scrape") == 1


# --- with an engine behind ---


async def test_an_answer_goes_the_whole_way_and_every_token_of_it_is_counted_before_it_is_seen(deploy: Any):
    node = await one(deploy)
    async with engine_of(node) as engine:
        asking = asyncio.create_task(ask(node, "POST", "/v1/completions", json=COMPLETION))
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [ord("h")]))
        await engine.send(output(submit, 1, [ord("i")], finish()))
        status, body, _ = await asking
        samples = await node.scrape()
    assert (status, body["choices"][0]["text"], body["usage"]["completion_tokens"]) == (200, "hi", 2)
    assert total(samples, "wholebatch:delivered_tokens_total") == 2
    assert total(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert total(samples, "vllm:e2e_request_latency_seconds_count") == 1
    assert total(samples, "http_requests_total", status="2xx") == 1


async def test_a_client_that_goes_aborts_its_request_within_a_tenth_of_a_second(deploy: Any):
    node = await one(deploy)
    async with engine_of(node) as engine, ClientSession() as session:
        body = COMPLETION | {"stream": True, "max_tokens": 100}
        asking = asyncio.create_task(session.post(node.public.make_url("/v1/completions"), json=body))
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [ord("h")]))
        answer = await asking
        await answer.content.readany()
        gone_at = time.monotonic()
        answer.close()
        assert await engine.receive() == Abort([submit.request_id])
        assert time.monotonic() - gone_at < 0.1
        samples = await node.scrape()
    assert total(samples, "vllm:request_success_total", finished_reason="abort") == 1
    assert total(samples, "wholebatch:sequences_ended_total", finished_reason="abort") == 1
    assert total(samples, "wholebatch:api_server_requests_in_flight") == 0
    assert total(samples, "wholebatch:delivered_tokens_total") == 1


async def test_an_engine_that_ends_midway_is_an_honest_503(deploy: Any):
    node = await one(deploy)
    async with engine_of(node) as engine:
        asking = asyncio.create_task(ask(node, "POST", "/v1/completions", json=COMPLETION))
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [ord("h")]))
    node.services.clients.on_deployment(make_table(3, (ENGINE, 0, 1, "ended")))
    status, body, _ = await asking
    samples = await node.scrape()
    assert (status, body["error"]["code"]) == (503, "engine_lost")
    assert total(samples, "vllm:request_success_total", finished_reason="error") == 1
    received = total(samples, "wholebatch:received_tokens_total")
    assert received == total(samples, "wholebatch:undelivered_tokens_total", reason="error")


# --- what one request may ask for, and how many may wait ---


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        ({}, Limits(max_num_queued_reqs=2 * 8192, max_num_queued_tokens=2 * 4_194_304)),
        ({"max_num_seqs": 10_000}, Limits(max_num_queued_reqs=2 * 20_000, max_num_queued_tokens=2 * 4_194_304)),
        (
            {"max_num_queued_reqs": 5, "max_num_queued_tokens": 6},
            Limits(max_num_queued_reqs=5, max_num_queued_tokens=6),
        ),
        ({"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}, Limits()),
    ],
)
def test_what_may_wait_is_bounded_by_default_for_each_engine(flags: dict[str, int], limits: Limits):
    assert queue_limits(make_config("/nowhere", num_engines=2, **flags)) == limits


def test_the_terms_of_a_request_are_the_operators_and_the_models():
    terms = terms_of(make_config("/nowhere"), FACTS)
    assert terms == Terms(max_model_len=512, vocab_size=300, max_sequences=2048)
    chosen: dict[str, Any] = {"scheduling_policy": "priority", "max_num_seqs_per_request": 7}
    terms = terms_of(make_config("/nowhere", **chosen), FACTS)
    assert (terms.allows_priority, terms.max_sequences) == (True, 7)
    chosen = {"enable_chunked_prefill": False, "max_num_batched_tokens": 300}
    assert terms_of(make_config("/nowhere", **chosen), FACTS).max_prompt_tokens == 300
