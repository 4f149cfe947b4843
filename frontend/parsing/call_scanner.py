"""One tool call, `{"name": …, "arguments": {…}}`, read as it comes: its arguments go on before they are complete. Pure.

Arguments are handed on as the model wrote them, unchecked: what a client accumulates is what it would have got whole.
"""

from __future__ import annotations

import json

from frontend.parsing.nesting import Nesting
from frontend.parsing.parts import Arguments, Call, Part

_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Reads one object, from its brace on. `is_over` once it has closed; `is_broken` where it is no call, and `raw` is
    then everything it was fed. A call that has begun does not break."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.raw = ""
        self.is_over = False
        self.is_broken = False
        self.has_begun = False
        self._nesting = Nesting()
        self._key: str | None = None  # of the value that is being read
        self._is_value = False
        self._word = ""  # the key or value that is being read
        self._held = ""  # arguments that came before the name
        self._has_arguments = False

    def feed(self, text: str) -> tuple[list[Part], str]:
        """The parts that this text completes, and what comes after the object."""
        parts: list[Part] = []
        for position, character in enumerate(text):
            if self.is_over or self.is_broken:
                return parts, text[position:]
            if not self.has_begun:
                self.raw += character
            parts += self._take(character)
        return parts, ""

    def _take(self, character: str) -> list[Part]:
        depth, is_string = self._nesting.depth, self._nesting.is_in_string
        self._nesting.follow(character)
        if depth == 0:
            self.is_broken = character != "{"
            return []
        if depth == 1 and not is_string and character in ":,}":
            return self._separate(character)
        if not self._word and character.isspace():
            return []
        if self._is_value and self._key in _ARGUMENTS and not (self._word or character).startswith('"'):
            self._word = self._word or character  # of what is handed on, how it begins
            return self._arguments(character)
        self._word += character
        self.is_broken = not self._is_value and not self._word.startswith('"')
        return []

    def _separate(self, character: str) -> list[Part]:
        """A colon, comma or brace of the call's own object."""
        word, self._word = self._word, ""
        parts: list[Part] = []
        if character == ":" and not self._is_value:
            self._key, self._is_value = _text_of(word), True
            self.is_broken = self._key is None and not self.has_begun
            return parts
        if self._is_value:
            parts = self._value(word)
        self._is_value = False
        if character == "}" and not self.is_broken:
            self.is_over = self.has_begun
            self.is_broken = not self.has_begun
            if self.is_over and not self._has_arguments:
                parts.append(Arguments(self._index, "{}"))
        return parts

    def _value(self, word: str) -> list[Part]:
        if self._key == "name":
            name = _text_of(word)
            if not name or self.has_begun:
                self.is_broken = not self.has_begun
                return []
            self.has_begun = True
            begun: list[Part] = [Call(self._index, name)]
            return begun + ([Arguments(self._index, self._held)] if self._held else [])
        text = _text_of(word) if self._key in _ARGUMENTS else None
        return [] if text is None else self._arguments(text)  # JSON within a text

    def _arguments(self, text: str) -> list[Part]:
        self._has_arguments = True
        if self.has_begun:
            return [Arguments(self._index, text)]
        self._held += text
        return []


def _text_of(word: str) -> str | None:
    """The text that a JSON string stands for; None if it is none."""
    try:
        value = json.loads(word)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
