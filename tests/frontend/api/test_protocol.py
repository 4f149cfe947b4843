"""What clients may send, and what each fault is called."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completion
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine import wire
from engine.wire import SamplingParams, Submit
from frontend.api.protocol import (
    MAX_MESSAGES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Hints,
    Terms,
    check_token_ids,
    parse_request,
)
from frontend.errors import BadRequest

COMPLETION: dict[str, Any] = {"prompt": "a"}
TERMS = Terms(max_model_len=100, vocab_size=1000, max_sequences=256)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(COMPLETION | fields).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | fields).encode())


def sampling(request: GenerationRequest, num_prompt_tokens: int = 3) -> SamplingParams:
    return request.sampling(num_prompt_tokens, TERMS)


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
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "suffix", "response_format"})


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
        ("max_tokens", 101),
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
        ("messages[0].tool_calls[0].function", [{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
    ],
)
def test_a_wrong_message_is_named_by_its_place(param: str, value: Any):
    assert refusal(chat, messages=value).param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("top_logprobs", 2),
        ("logprobs", 2),
        ("max_completion_tokens", 0),
    ],
)
def test_a_parameter_that_chat_does_not_support_is_named(param: str, value: Any):
    assert refusal(chat, **{param: value}).param == param


def test_echo_with_logprobs_is_named():
    assert refusal(completion, echo=True, logprobs=0).param == "echo"


def test_a_parameter_that_asks_for_nothing_is_no_fault():
    completion(suffix=None, best_of=1, response_format={"type": "text"}, logit_bias=None, stop=None, seed=None)
    chat(tools=[], tool_choice="none", audio=None, modalities=["text"], parallel_tool_calls=True, user="me")


def refused_by(terms: Terms, request: GenerationRequest) -> str | None:
    """The parameter at fault, where there is one."""
    try:
        request.check_terms(terms)
        request.sampling(3, terms)
    except BadRequest as error:
        return error.param
    return None


@pytest.mark.parametrize(("prompts", "n", "param"), [(4, 2, None), (4, 3, "n"), (9, 1, "prompt"), (1, 9, "n")])
def test_a_request_for_more_sequences_than_the_operator_allows_is_refused(prompts: int, n: int, param: str | None):
    assert refused_by(replace(TERMS, max_sequences=8), completion(prompt=["a"] * prompts, n=n)) == param


def test_a_priority_is_refused_where_the_operator_does_not_let_clients_choose():
    assert refused_by(TERMS, chat(priority=0)) is None
    assert refused_by(TERMS, chat(priority=-1)) == "priority"
    assert refused_by(replace(TERMS, allows_priority=True), chat(priority=-1)) is None


def test_a_prompt_that_no_iteration_takes_whole_is_refused_where_prompts_are_not_cut():
    assert refused_by(replace(TERMS, max_prompt_tokens=3), completion()) is None
    assert refused_by(replace(TERMS, max_prompt_tokens=2), completion()) == "prompt"


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5, ["a"], True])
def test_a_cache_salt_is_a_text_of_bounded_length(salt: Any):
    assert refusal(completion, cache_salt=salt).param == "cache_salt"
    assert completion(cache_salt="x" * 1024).cache_salt == "x" * 1024


ASKING: dict[str, Any] = {
    "logprob_token_ids": [5],
    "prompt_logprobs": 0,
    "repetition_detection": {"max_pattern_size": 8},
    "vllm_xargs": {"a": 1},
    "watermarking": True,
    "thinking_token_budget": 5,
    "stream_interval": 4,
    "request_id": "mine",
    "length_penalty": 2.0,
    "spaces_between_special_tokens": False,
    "stream_options": {"include_usage": True},  # without stream
}


@pytest.mark.parametrize("name", ASKING)
def test_a_field_that_asks_for_what_is_not_there_is_refused_by_its_name(name: str):
    for request in (completion, chat):
        assert refusal(request, **{name: ASKING[name]}).param == name


# What vLLM 0.32 knows; OpenAI's are asked of its own package.
VLLM = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template chat_template_kwargs
    continue_final_message documents echo ec_transfer_params ignore_eos include_reasoning include_stop_str_in_output
    kv_transfer_params length_penalty logprob_token_ids media_io_kwargs min_p min_tokens mm_processor_kwargs priority
    prompt_embeds prompt_logprobs reasoning_effort repetition_detection repetition_penalty request_id response_format
    return_mm_kwargs return_prompt_text return_token_ids return_token_offsets return_tokens_as_token_ids
    routed_experts_prompt_start session_id skip_special_tokens spaces_between_special_tokens stop_token_ids
    stream_interval structured_outputs suffix thinking_token_budget top_k truncate_prompt_tokens truncation_side
    use_beam_search user vllm_xargs watermarking
"""
CHATS_ALONE = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents media_io_kwargs
    mm_processor_kwargs return_prompt_text
"""
COMPLETIONS_ALONE = "suffix prompt_embeds"
CHATS_OWN = set(openai_chat.CompletionCreateParamsBase.__annotations__)
COMPLETIONS_OWN = set(openai_completion.CompletionCreateParamsBase.__annotations__)


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [(CompletionRequest, COMPLETIONS_OWN, CHATS_ALONE), (ChatRequest, CHATS_OWN, COMPLETIONS_ALONE)],
)
def test_no_field_that_is_known_is_ignored_in_silence(kind: type[GenerationRequest], own: set[str], others: str):
    known = own | set(VLLM.split()) - set(others.split())
    assert known - set(kind.model_fields) - set(kind.UNSUPPORTED) == set()


def test_a_hint_is_accepted_whatever_it_says():
    for name in Hints.model_fields:
        for value in ("x", 1, {"a": [1]}, None, False):
            completion(**{name: value})
            chat(**{name: value})


def test_echo_alone_is_the_one_reason_for_no_tokens():
    request = completion(max_tokens=0, echo=True)
    assert request.asks_for_echo_alone
    assert sampling(request) == SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    assert refusal(completion, max_tokens=0).param == "max_tokens"
    assert refusal(completion, max_tokens=0, echo=True, min_tokens=1).param == "min_tokens"
    assert refusal(chat, max_tokens=0).param == "max_tokens"


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
    assert request.messages[0].model_dump(exclude_none=True) == {"role": "user", "content": "a", "name": "Ann"}


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


MANY: dict[str, tuple[type[GenerationRequest], str]] = {
    "messages": (ChatRequest, '{"messages":[' + ",".join(['{"role":"u"}'] * (MAX_MESSAGES + 1)) + "]}"),
    "messages, wrong ones": (ChatRequest, '{"messages":[' + ",".join(["1"] * 150_000) + "]}"),
    "parts": (ChatRequest, json.dumps({"messages": [{"role": "u", "content": [{"type": "text", "text": ""}] * 1025}]})),
    "prompts": (CompletionRequest, '{"prompt":[' + ",".join(["[1]"] * 2049) + "]}"),
    "fields": (CompletionRequest, '{"prompt":"a",' + ",".join(f'"{i:x}":1' for i in range(257)) + "}"),
    "template arguments": (
        ChatRequest,
        json.dumps({"messages": [{"role": "u"}], "chat_template_kwargs": {f"{i:x}": 1 for i in range(257)}}),
    ),
    "characters of a stop string": (CompletionRequest, json.dumps({"prompt": "a", "stop": ["x" * 1025]})),
    "values": (CompletionRequest, '{"prompt":[' + ",".join(["1"] * 200_002) + "]}"),
}


@pytest.mark.parametrize("what", MANY)
def test_more_than_a_request_can_need_is_refused_by_its_number(what: str):
    kind, body = MANY[what]
    with pytest.raises(BadRequest):
        parse_request(kind, body.encode())


def test_only_the_first_of_many_faults_is_made():
    """All of them would take a gigabyte for a body of four megabytes."""
    body = b'{"messages":[' + b",".join([b"1"] * 15_000) + b"]}"
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("number", [8, 8.0])
def test_a_whole_number_may_be_written_with_a_point(number: float):
    request = parse_request(CompletionRequest, json.dumps({"prompt": "a", "max_tokens": number, "n": 1.0}).encode())
    assert (request.max_tokens, request.n) == (8, 1)
    with pytest.raises(BadRequest, match="max_tokens"):
        parse_request(CompletionRequest, b'{"prompt": "a", "max_tokens": 8.5}')
