"""The official OpenAI client, as people use it, against a real deployment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.harness import served

KEY = "a-key-only-this-test-knows"


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[openai.OpenAI]:
    with served(tiny_model, "--api-server-count", "2", "--api-key", KEY, "--served-model-name", "tiny") as deployment:
        assert KEY not in deployment.log()
        with openai.OpenAI(base_url=deployment.url + "/v1", api_key=KEY, max_retries=0) as made:
            yield made


def test_it_lists_the_model(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_wrong_key_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_stream_gives_what_the_whole_answer_gives(client: openai.OpenAI):
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24


def test_a_chat_streams_a_role_then_text_then_a_reason(client: openai.OpenAI):
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_repeats_a_sample_and_n_gives_different_ones(client: openai.OpenAI):
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 16, "temperature": 1.0, "seed": 7, "n": 3}
    first = [c.text for c in client.completions.create(**ask).choices]
    again = [c.text for c in client.completions.create(**ask).choices]
    assert first == again
    assert len(set(first)) == 3


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI):
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 32, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    assert len(text) > 12
    stop = text[8:11]
    stopped = client.completions.create(**ask, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs_come_one_per_token_with_alternatives(client: openai.OpenAI):
    ask: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Once",
        "max_tokens": 5,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    old = client.completions.create(**ask, logprobs=2).choices[0].logprobs
    assert old is not None
    assert len(old.token_logprobs or []) == 5
    new = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Once"}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    content = new.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [3] * 5
    assert all(token.logprob == pytest.approx(token.top_logprobs[0].logprob) for token in content)


def test_several_prompts_and_echo(client: openai.OpenAI):
    answer = client.completions.create(model="tiny", prompt=["One", "Two"], max_tokens=4, n=2, echo=True, temperature=0)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text[:3] for c in answer.choices] == ["One", "One", "Two", "Two"]
