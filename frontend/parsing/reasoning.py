"""Reasoning at the beginning of an answer, `<think>…</think>`, apart from what follows. Pure."""

from __future__ import annotations

from enum import Enum, auto

from frontend.parsing.parts import Parser, Part, Reasoning, held_back, joined

OPENING = "<think>"
CLOSING = "</think>"


class _Place(Enum):
    BEFORE = auto()
    INSIDE = auto()
    AFTER = auto()


class ReasoningParser:
    """Reads one answer; `then` reads what is no reasoning. Implements `frontend.parsing.parts.Parser`.

    `is_inside`: the prompt ended with the opening mark, so that the answer begins with reasoning. White space around
    the marks is nobody's.
    """

    def __init__(self, then: Parser, *, is_inside: bool = False) -> None:
        self._then = then
        self._place = _Place.INSIDE if is_inside else _Place.BEFORE
        self._rest = ""
        self._has_begun = False  # to reason, or after it, to answer

    def feed(self, text: str) -> list[Part]:
        return joined(self._read(text, is_last=False))

    def finish(self) -> list[Part]:
        return joined([*self._read("", is_last=True), *self._then.finish()])

    def _read(self, text: str, *, is_last: bool) -> list[Part]:
        self._rest += text
        parts: list[Part] = []
        if self._place is _Place.BEFORE:
            parts += self._before(is_last)
        if self._place is _Place.INSIDE:
            parts += self._inside(is_last)
        if self._place is _Place.AFTER:
            parts += self._after()
        return parts

    def _before(self, is_last: bool) -> list[Part]:
        begun = self._rest.lstrip()
        if begun.startswith(OPENING):
            self._place, self._rest = _Place.INSIDE, begun[len(OPENING) :]
        elif begun and (is_last or not OPENING.startswith(begun)):
            self._place, self._has_begun = _Place.AFTER, True
        elif is_last:
            return self._then.feed(self._take_rest())
        return []

    def _inside(self, is_last: bool) -> list[Part]:
        if not self._has_begun:
            self._rest = self._rest.lstrip()
            self._has_begun = bool(self._rest)
        at = self._rest.find(CLOSING)
        if at >= 0:
            thought, self._rest = self._rest[:at].rstrip(), self._rest[at + len(CLOSING) :]
            self._place, self._has_begun = _Place.AFTER, False
            return [Reasoning(thought)]
        end = len(self._rest)
        if not is_last:
            end = len(self._rest[: end - held_back(self._rest, CLOSING)].rstrip())
        thought, self._rest = self._rest[:end], self._rest[end:]
        return [Reasoning(thought)]

    def _after(self) -> list[Part]:
        if not self._has_begun:
            self._rest = self._rest.lstrip()
            self._has_begun = bool(self._rest)
        return self._then.feed(self._take_rest())

    def _take_rest(self) -> str:
        rest, self._rest = self._rest, ""
        return rest
