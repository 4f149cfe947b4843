"""Calls that a client has asked for, in answers that are constrained to be nothing else. Pure."""

from __future__ import annotations

from frontend.parsing.call_scanner import CallScanner
from frontend.parsing.parts import Arguments, Call, Part, joined

_BETWEEN = " \t\r\n,[]"


class NamedCall:
    """Reads an answer that is the arguments of one tool. Implements `frontend.parsing.parts.Parser`."""

    def __init__(self, name: str) -> None:
        self._begun: list[Part] = [Call(0, name)]

    def feed(self, text: str) -> list[Part]:
        begun, self._begun = self._begun, []
        return [*begun, Arguments(0, text)]

    def finish(self) -> list[Part]:
        return []


class CallList:
    """Reads an answer that is a JSON list of calls. Implements `frontend.parsing.parts.Parser`."""

    def __init__(self) -> None:
        self._scanner = CallScanner(0)
        self._num_calls = 0

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if not self._scanner.raw:
                text = text.lstrip(_BETWEEN)
            found, text = self._scanner.feed(text)
            parts += found
            if self._scanner.is_over:
                self._num_calls += 1
                self._scanner = CallScanner(self._num_calls)
            elif self._scanner.is_broken:
                return joined(parts)
        return joined(parts)

    def finish(self) -> list[Part]:
        return []
