"""What browsers are told about pages of other origins."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.cors import Cors
from tests.frontend.deployments import ask, one

PAGE = "http://app.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
PATH = "/v1/chat/completions"


def cors(*origins: str, methods=("*",), headers=("*",), allows_credentials: bool = False) -> Cors:
    return Cors(origins=origins, methods=methods, headers=headers, allows_credentials=allows_credentials)


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (cors(), None),
        (cors("http://other.example"), None),
        (cors(PAGE, "http://other.example"), PAGE),
        (cors("*"), "*"),
        (cors(PAGE + ".evil"), None),
    ],
)
def test_only_pages_of_allowed_origins_may_read_an_answer(allowed: Cors, said: str | None):
    assert allowed.of_answer({"Origin": PAGE}).get("Access-Control-Allow-Origin") == said
    assert allowed.of_answer({}) == {}
    assert bool(allowed.of_preflight(PREFLIGHT, "POST")) == (said is not None)


def test_a_preflight_is_told_the_methods_and_headers_that_the_operator_names_or_those_it_asks_for():
    said = cors("*").of_preflight(PREFLIGHT, "POST")
    assert said["Access-Control-Allow-Methods"] == "POST"
    assert said["Access-Control-Allow-Headers"] == "authorization,content-type"
    said = cors("*", methods=("GET", "POST"), headers=("authorization",)).of_preflight(PREFLIGHT, "POST")
    assert said["Access-Control-Allow-Methods"] == "GET, POST"
    assert said["Access-Control-Allow-Headers"] == "authorization"
    assert "Access-Control-Allow-Headers" not in cors("*").of_preflight({"Origin": PAGE}, "POST")


def test_cookies_are_allowed_only_by_the_operator():
    assert "Access-Control-Allow-Credentials" not in cors(PAGE).of_answer(PREFLIGHT)
    assert cors(PAGE, allows_credentials=True).of_answer(PREFLIGHT)["Access-Control-Allow-Credentials"] == "true"


async def test_a_preflight_needs_no_key_and_the_request_after_it_does(deploy: Any):
    node = await one(deploy, allowed_origins=[PAGE], api_keys=["secret"])
    status, _, headers = await ask(node, "OPTIONS", PATH, headers=PREFLIGHT)
    assert (status, headers["Access-Control-Allow-Origin"], headers["Allow"]) == (204, PAGE, "POST")
    status, _, headers = await ask(node, "POST", PATH, headers={"Origin": PAGE}, json={})
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, PAGE)
    assert (await ask(node, "OPTIONS", "/v1/nothing", headers=PREFLIGHT))[0] == 401


async def test_without_flags_no_page_of_another_origin_may_use_the_api(deploy: Any):
    node = await one(deploy)
    status, _, headers = await ask(node, "OPTIONS", PATH, headers=PREFLIGHT)
    assert (status, headers["Allow"]) == (204, "POST")
    assert not [name for name in headers if name.startswith("Access-Control")]
    status, _, headers = await ask(node, "GET", "/v1/models", headers={"Origin": PAGE})
    assert status == 200
    assert not [name for name in headers if name.startswith("Access-Control")]
