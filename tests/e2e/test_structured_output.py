"""Answers of a given form from a real deployment: every finished one is valid, with preemption, n and a seed, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.harness import Served, served, total

MODEL = "tiny"
FEW_BLOCKS = ("--num-gpu-blocks-override", "44", "--max-model-len", "640")  # so that sequences are preempted


@pytest.fixture(scope="module")
def deployment(tiny_model: Path) -> Iterator[Served]:
    with served(tiny_model, "--api-server-count", "2", "--served-model-name", MODEL, *FEW_BLOCKS) as made:
        yield made


@pytest.fixture(scope="module")
def client(deployment: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Of bounded values, so that most answers finish."""
    leaf: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -9, "maximum": 99},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["x", 1, None]},
            {"const": {"k": [1, 2]}},
            {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 5}]},
        ]
    )

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        fields = st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3)
        objects = fields.map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        )
        arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3})
        return objects | arrays

    return st.recursive(leaf, grow, max_leaves=5)


def ask(client: openai.OpenAI, schema: dict[str, Any], seed: int, **options: Any) -> list[Any]:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "JSON"}],
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}},
        temperature=1.0,
        seed=seed,
        max_tokens=120,
        **options,
    )
    return list(answer.choices)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 2**31))
def test_a_finished_answer_is_valid_whatever_the_model_would_rather_say(
    client: openai.OpenAI, schema: dict[str, Any], seed: int
):
    for choice in ask(client, schema, seed, n=2):
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)


BOUNDED = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 60, "maxLength": 80}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_answers_that_are_preempted_are_valid(client: openai.OpenAI, deployment: Served):
    def one(seed: int) -> Any:
        return ask(client, BOUNDED, seed, logprobs=True)[0]

    with ThreadPoolExecutor(12) as pool:
        choices = list(pool.map(one, range(24)))
    finished = [choice for choice in choices if choice.finish_reason == "stop"]
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content), BOUNDED)
        assert choice.logprobs is not None
    assert len(finished) >= 12
    samples = deployment.balanced_metrics()
    assert total(samples, "vllm:num_preemptions_total") > 0
    assert total(samples, "wholebatch:sampling_faults_total") == 0


def test_a_seed_gives_the_same_answer_alone_and_among_others(client: openai.OpenAI):
    alone = ask(client, BOUNDED, 5)[0].message.content
    with ThreadPoolExecutor(8) as pool:
        among = list(pool.map(lambda seed: ask(client, BOUNDED, seed)[0].message.content, [5, 1, 2, 5, 3, 4]))
    assert among[0] == among[3] == alone


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_has_arguments_of_its_tools_schema_streamed_and_not(client: openai.OpenAI, choice: Any):
    options: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 100,
    }
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    calls: list[str] = []
    for found in (whole, streamed):
        assert found.message.tool_calls is not None
        (call,) = found.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
        calls.append(call.function.arguments)
    assert calls[0] == calls[1]
    assert whole.finish_reason == streamed.finish_reason


def test_a_schema_that_is_not_supported_is_refused_and_serves_nobody_worse(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="not"):
        ask(client, {"type": "object", "properties": {"a": {"not": {}}}}, 1)
    assert ask(client, {"enum": ["ok"]}, 1)[0].message.content == '"ok"'
