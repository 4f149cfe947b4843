"""What clients may send, and what each fault is called."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.wire import SamplingParams, Submit
from frontend.api.protocol import ChatRequest, CompletionRequest, GenerationRequest, check_token_ids, parse_request
from frontend.errors import BadRequest

COMPLETION: dict[str, Any] = {"prompt": "a"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(COMPLETION | fields).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | fields).encode())


def sampling(request: GenerationRequest, num_prompt_tokens: int = 3) -> SamplingParams:
    return request.sampling(num_prompt_tokens=num_prompt_tokens, max_model_len=100, vocab_size=1000)


def refusal(request: Any, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        sampling(request(**fields))
    return caught.value


# --- bodies ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"prompt": "a"',
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',  # half of a surrogate pair is no text
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 4300 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 9999 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_a_body_that_is_no_request_is_refused(body: bytes):
    with pytest.raises(BadRequest):
        parse_request(CompletionRequest, body)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "suffix", "tools", "response_format"})


@given(fields=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
def test_any_fields_make_a_request_or_a_bad_request(fields: dict[str, Any]):
    for kind, base in ((CompletionRequest, COMPLETION), (ChatRequest, CHAT)):
        body = json.dumps(base | fields, allow_nan=True).encode()
        with suppress(BadRequest):
            submit = Submit(0, 1, [1], sampling(parse_request(kind, body)))
            assert wire.decode_from_api_server(wire.encode(submit)) == submit


@given(body=st.binary(max_size=60))
def test_any_bytes_make_a_request_or_a_bad_request(body: bytes):
    for kind in (CompletionRequest, ChatRequest):
        with suppress(BadRequest):
            parse_request(kind, body)


# --- parameters ---


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", {"a": 1}),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [""]),
        ("prompt", [True]),
        ("prompt", [1, "a"]),
        ("prompt", [1.5]),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", 98),
        ("temperature", 7),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("top_k", -2),
        ("top_k", 2**40),
        ("n", 0),
        ("n", 10**6),
        ("best_of", 2),
        ("seed", 2**80),
        ("logprobs", 1000),
        ("logprobs", True),
        ("logit_bias", {"5": 1000}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5000": 1}),
        ("logit_bias", {"5": True}),
        ("logit_bias", [5]),
        ("stop", ["a"] * 100),
        ("stop", 3),
        ("stop_token_ids", [5000]),
        ("stop_token_ids", [-1]),
        ("min_tokens", 50),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("priority", 2**70),
        ("stream", 1),
        ("model", 3),
        ("suffix", "x"),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("use_beam_search", True),
    ],
)
def test_a_wrong_parameter_is_named(param: str, value: Any):
    error = refusal(completion, **{param: value})
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("messages", []),
        ("messages", "a"),
        ("messages[0].role", [{"content": "a"}]),
        ("messages[0].role", [{"role": "", "content": "a"}]),
        ("messages[0].content", [{"role": "user", "content": 3}]),
        ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages[0].content", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages[0].tool_calls", [{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
    ],
)
def test_a_wrong_message_is_named_by_its_place(param: str, value: Any):
    assert refusal(chat, messages=value).param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("tool_choice", "required"),
        ("reasoning_effort", "high"),
        ("top_logprobs", 2),
        ("logprobs", 2),
        ("max_completion_tokens", 0),
    ],
)
def test_a_parameter_that_chat_does_not_support_is_named(param: str, value: Any):
    assert refusal(chat, **{param: value}).param == param


def test_echo_with_logprobs_is_named():
    assert refusal(completion, echo=True, logprobs=0).param == "echo"


def test_prompts_times_n_are_bounded():
    assert refusal(completion, prompt=["a"] * 2000, n=2).param == "prompt"


def test_a_parameter_that_asks_for_nothing_is_no_fault():
    completion(suffix=None, best_of=1, response_format={"type": "text"}, logit_bias=None, stop=None, seed=None)
    chat(tools=[], tool_choice="none", audio=None, modalities=["text"], parallel_tool_calls=True, user="me")


def test_a_field_that_nobody_defines_is_ignored():
    completion(nobody_knows_me={"a": [1]})


# --- meanings ---


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [2]], ["a", [2]]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt: Any, prompts: Any):
    assert completion(prompt=prompt).prompt == prompts


def test_parts_of_text_are_joined_and_no_content_is_no_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert [message.content for message in request.messages] == ["a\nb", ""]


def test_fields_of_a_message_reach_the_template():
    request = chat(messages=[{"role": "user", "content": "a", "name": "Ann"}])
    assert request.messages[0].model_dump() == {"role": "user", "content": "a", "name": "Ann"}


def test_defaults_are_openais_whatever_the_model_says():
    assert sampling(completion()) == SamplingParams(max_tokens=16)
    assert sampling(chat()) == SamplingParams(max_tokens=97)


def test_a_default_fits_into_what_the_context_leaves():
    assert sampling(completion(), num_prompt_tokens=95).max_tokens == 5
    assert sampling(chat(), num_prompt_tokens=99).max_tokens == 1


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(BadRequest, match="100 tokens") as caught:
        sampling(chat(), num_prompt_tokens=100)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_every_parameter_reaches_the_engine():
    asked: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "logprobs": 2,
        "ignore_eos": True,
    }
    made = sampling(completion(**asked, logit_bias={"5": -1}, stop_token_ids=[8, 8, 9]))
    assert made == SamplingParams(**asked, logit_bias=((5, -1.0),), stop_token_ids=(8, 9))


def test_the_newer_name_of_max_tokens_wins():
    assert sampling(chat(max_tokens=5, max_completion_tokens=7)).max_tokens == 7


def test_logprobs_of_chat_are_a_switch_and_a_number():
    assert sampling(chat(logprobs=True)).logprobs == 0
    assert sampling(chat(logprobs=True, top_logprobs=3)).logprobs == 3
    assert sampling(chat()).logprobs is None


def test_no_limit_on_top_k_is_said_in_either_way():
    assert sampling(completion(top_k=-1)).top_k == sampling(completion(top_k=0)).top_k == 0


def test_a_token_outside_the_vocabulary_is_refused():
    check_token_ids([0, 999], 1000, "prompt")
    for token in (-1, 1000):
        with pytest.raises(BadRequest, match=str(token)):
            check_token_ids([token], 1000, "prompt")
