"""Which texts are control tokens, how they are hidden and found again, and that looking for them costs little."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from frontend.text.control_tokens import ControlTokens

TEXTS = ["<|im_start|>", "<|im_end|>", "<s>", "[INST]", "<|im_start|>x", *(f"<|reserved_{n}|>" for n in range(300))]
TOKENS = ControlTokens(TEXTS)
written = st.lists(st.sampled_from([*TEXTS[:6], "<", "|im_start|>", "words", "é"]), max_size=6).map("".join)
values = st.recursive(written, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(written, inner, max_size=3))


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return [text for each in inner for text in texts_in(each)]


@given(values)
def test_what_is_hidden_is_nowhere_and_comes_back_as_it_was(value: Any):
    hidden_value, hidden = TOKENS.hide(value, "nonce")
    assert not any(TOKENS.is_in(text) for text in texts_in(hidden_value))
    assert [hidden.restore(text) for text in texts_in(hidden_value)] == texts_in(value)
    assert bool(hidden.by_word) is any(TOKENS.is_in(text) for text in texts_in(value))


@given(written)
def test_a_text_is_cut_at_its_control_tokens_and_nowhere_else(text: str):
    parts = TOKENS.cut(text)
    assert "".join(part for part, _ in parts) == text
    assert all((part in TEXTS) is is_control for part, is_control in parts)
    assert not any(TOKENS.is_in(part) for part, is_control in parts if not is_control)


def test_the_longest_of_several_that_begin_alike_is_meant():
    assert TOKENS.cut("<|im_start|>xy") == [("<|im_start|>x", True), ("y", False)]
    assert TOKENS.cut("<|im_start|>y") == [("<|im_start|>", True), ("y", False)]


def test_a_vocabulary_without_control_tokens_has_nothing_to_hide():
    none = ControlTokens([])
    assert none.hide(["<s>"], "n")[0] == ["<s>"]
    assert none.cut("<s>") == [("<s>", False)]
