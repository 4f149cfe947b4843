"""Conversations to text, by the model's own template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from frontend.text.chat_template import ChatTemplate, ChatTemplateError
from frontend.text.tokenizer import load_tokenizer

NOW = datetime(2031, 5, 6)
HI = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, Any]] = HI, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, now=NOW, **options)


def test_the_default_model_gets_its_own_words(default_model: Path):
    template = load_tokenizer(str(default_model)).chat_template
    assert template is not None
    assert template.render(HI, now=NOW) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_blocks_leave_no_blank_lines():
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}") == "Hi\n"
    )


def test_templates_see_what_transformers_gives_them():
    assert render("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}") == "<s>Hi</s>"
    assert render("{{ strftime_now('%Y-%m-%d') }}") == "2031-05-06"
    assert render("{{ {'ä': '<b>'} | tojson }}") == '{"ä": "<b>"}'
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}.") == "Hi."
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ enable_thinking }}", arguments={"enable_thinking": False}) == "False"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.upper() }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",  # the sandbox
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_that_raises_says_so_to_the_client(source: str):
    with pytest.raises(ChatTemplateError, match="does not take this conversation"):
        render(source)


def test_the_templates_own_words_reach_the_client():
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_is_none_is_named():
    with pytest.raises(ChatTemplateError, match="broken"):
        ChatTemplate("{% if %}", {})
