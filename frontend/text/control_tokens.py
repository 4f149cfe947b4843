"""Control tokens in what users write stay the text that they are; the template's own are control tokens. Pure.

A chat template writes control tokens around each turn, and a tokenizer takes every text of that form for the token. So
what looks like one in a message is hidden behind a word that nobody can guess, the conversation is rendered, and the
text is then cut at the control tokens that are left, which are the template's: what lies between is tokenised as plain
text, with the hidden texts back in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hidden:
    """What was hidden in one conversation, by the word that stands for it."""

    by_word: dict[str, str] = field(default_factory=dict)

    def restore(self, text: str) -> str:
        """The text with everything in its place."""
        for word, hidden in self.by_word.items():
            text = text.replace(word, hidden)
        return text


class ControlTokens:
    """The texts of one tokenizer's control tokens."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(filter(None, texts))
        self._pattern = re.compile(_any_of(self._texts)) if self._texts else None

    def is_in(self, text: str) -> bool:
        """Whether the text holds any."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def hide(self, values: Any, nonce: str) -> tuple[Any, Hidden]:
        """The values, of JSON, with a word in place of each control token's text. Nobody else may know `nonce`."""
        words = {text: f"{nonce}x{number}x" for number, text in enumerate(self._texts)}
        found = Hidden()

        def word_for(match: re.Match[str]) -> str:
            word = words[match[0]]
            found.by_word[word] = match[0]
            return word

        def within(value: Any) -> Any:
            if isinstance(value, str):
                return value if self._pattern is None else self._pattern.sub(word_for, value)
            if isinstance(value, Mapping):
                return {within(key): within(inner) for key, inner in value.items()}
            return [within(inner) for inner in value] if isinstance(value, list) else value

        return within(values), found

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """The text in parts, in order, and of each whether it is a control token."""
        parts: list[tuple[str, bool]] = []
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            parts += [(text[end : match.start()], False), (match[0], True)]
            end = match.end()
        return [(part, is_control) for part, is_control in (*parts, (text[end:], False)) if part]


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts at a place. Common beginnings are looked at once, so that to search
    costs no more for hundreds of texts that begin alike than for one."""
    by_first: dict[str, list[str]] = {}
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in by_first.items()]
    if not branches:
        return ""
    ends_here = "" in texts
    return f"(?:{'|'.join(branches)}){'?' if ends_here else ''}"
