"""Tool calls among an answer's words, in the formats that models are trained on. Pure.

    Hermes, Qwen    words <tool_call>{"name": "f", "arguments": {}}</tool_call> words
    Llama 3         <|python_tag|>{"name": "f", "parameters": {}}; {"name": …      or without the tag, from the start
    Mistral         words [TOOL_CALLS][{"name": "f", "arguments": {}}, …]          newer: [TOOL_CALLS]f[ARGS]{}

What looks like a call and is none (no name, no JSON) is words, as the model wrote it. White space around calls is
nobody's.
"""

from __future__ import annotations

from frontend.parsing.call_scanner import CallScanner
from frontend.parsing.formats import ToolFormat
from frontend.parsing.nesting import Nesting
from frontend.parsing.parts import Arguments, Call, Part, Text, held_back, joined

_SEPARATORS = " \t\r\n,;"  # between calls
_ARGS = "[ARGS]"


class ToolCallParser:
    """Reads one answer. Implements `frontend.parsing.parts.Parser`."""

    def __init__(self, shape: ToolFormat) -> None:
        self._shape = shape
        self._num_calls = 0
        self._rest = ""  # not yet decided
        self._is_inside = False
        self._raw = ""  # what stands for words should nothing inside be a call
        self._scanner: CallScanner | None = None
        self._bare: _BareArguments | None = None
        self._has_said_anything = False
        self._is_after_call = False

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        return self._read(is_last=False)

    def finish(self) -> list[Part]:
        parts = self._read(is_last=True)
        if self._scanner is not None and not self._scanner.has_begun:
            parts.append(Text(self._raw + self._scanner.raw))
        elif self._is_inside and self._raw and self._scanner is None:
            parts.append(Text(self._raw))
        return joined(parts)

    def _read(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            before = (self._rest, self._is_inside, self._scanner, self._bare)
            if self._scanner is not None:
                parts += self._scan(self._scanner)
            elif self._bare is not None:
                parts += self._read_bare(self._bare)
            elif self._is_inside:
                parts += self._between(is_last)
            else:
                parts += self._outside(is_last)
            if before == (self._rest, self._is_inside, self._scanner, self._bare):
                return joined(parts)

    def _outside(self, is_last: bool) -> list[Part]:
        """Words, up to the mark."""
        shape, rest = self._shape, self._rest
        if self._is_after_call:
            rest = rest.lstrip()
            self._is_after_call = not rest
        if shape.starts_bare and not self._has_said_anything and rest.lstrip().startswith("{"):
            self._enter(rest[: len(rest) - len(rest.lstrip())], rest.lstrip())
            return []
        at = rest.find(shape.opening)
        if at >= 0:
            self._enter(shape.opening, rest[at + len(shape.opening) :])
            return self._words(rest[:at].rstrip())
        end = len(rest)
        if not is_last:
            end -= held_back(rest, shape.opening)
            end = len(rest[:end].rstrip())
        self._rest = rest[end:]
        return self._words(rest[:end])

    def _words(self, text: str) -> list[Part]:
        self._has_said_anything = self._has_said_anything or bool(text)
        return [Text(text)] if text else []

    def _enter(self, mark: str, rest: str) -> None:
        self._is_inside, self._raw, self._rest = True, mark, rest

    def _leave(self, rest: str) -> None:
        self._is_inside, self._raw, self._rest = False, "", rest
        self._has_said_anything = True

    def _between(self, is_last: bool) -> list[Part]:
        """Before a call, between two, or after the last one."""
        self._skip(_SEPARATORS)
        for mark in (self._shape.opening, self._shape.closing):
            if mark and self._rest.startswith(mark):
                return self._mark(mark)
            if mark and self._rest and mark.startswith(self._rest):
                if is_last and not self._raw:
                    self._rest = ""  # the answer was cut short within it
                if not is_last or not self._raw:
                    return []  # perhaps it is one
        self._skip(_SEPARATORS + "[]")
        if self._rest.startswith("{"):
            self._scanner = CallScanner(self._num_calls)
            return []
        if not self._rest:
            return []
        return self._named(self._rest, is_last) if self._shape.has_bare_names else self._give_up()

    def _skip(self, characters: str) -> None:
        kept = self._rest.lstrip(characters)
        self._raw += self._rest[: len(self._rest) - len(kept)] if self._raw else ""
        self._rest = kept

    def _mark(self, mark: str) -> list[Part]:
        """Another opening, or the closing."""
        raw = self._raw
        rest = self._rest[len(mark) :]
        if mark == self._shape.opening:
            self._enter(mark, rest)
            return [Text(raw)] if raw else []
        self._leave(rest)
        self._is_after_call = not raw
        return [Text(raw + mark)] if raw else []

    def _give_up(self, raw: str = "") -> list[Part]:
        """There is no call here: words, up to the next mark."""
        text = self._raw + raw
        self._leave(self._rest)
        return [Text(text)] if text else []

    def _named(self, kept: str, is_last: bool) -> list[Part]:
        """`name{…}` or `name[ARGS]{…}`."""
        name, brace, after = kept.partition("{")
        name = name.removesuffix(_ARGS)
        if brace and name and _is_name(name):
            self._bare = _BareArguments(self._num_calls)
            self._num_calls += 1
            self._rest, self._raw = "{" + after, ""
            return [Call(self._bare.number, name)]
        if brace or is_last or not _is_name(name.replace("[", "").replace("]", "")):
            return self._give_up()
        return []

    def _read_bare(self, arguments: _BareArguments) -> list[Part]:
        parts, self._rest = arguments.feed(self._rest)
        if arguments.is_over:
            self._bare = None
        return parts

    def _scan(self, scanner: CallScanner) -> list[Part]:
        parts, self._rest = scanner.feed(self._rest)
        if scanner.has_begun:
            self._raw = ""
        if scanner.is_over:
            self._num_calls += 1
            self._scanner = None
        elif scanner.is_broken:
            self._scanner = None
            parts += self._give_up(scanner.raw)
        return parts


class _BareArguments:
    """An object of arguments by itself, from its brace on."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_over = False
        self._nesting = Nesting()

    def feed(self, text: str) -> tuple[list[Part], str]:
        for position, character in enumerate(text):
            self._nesting.follow(character)
            if self._nesting.depth == 0:
                self.is_over = True
                return [Arguments(self.number, text[: position + 1])], text[position + 1 :]
        return ([Arguments(self.number, text)] if text else []), ""


def _is_name(text: str) -> bool:
    return all(character.isalnum() or character in "_-." for character in text)
