"""The parts that an answer's text consists of, in the order in which they come. Pure."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """Words for the reader."""

    text: str


class Reasoning(NamedTuple):
    """What the model thinks before it answers."""

    text: str


class Call(NamedTuple):
    """A tool call begins; calls count from 0 within one answer."""

    number: int
    name: str


class Arguments(NamedTuple):
    """The next characters of a call's arguments, which are JSON."""

    number: int
    text: str


Part = Text | Reasoning | Call | Arguments


class Parser(Protocol):
    """Reads one answer. However its text is cut, the parts joined are the same."""

    def feed(self, text: str) -> list[Part]:
        """The parts that this text completes; an end that might be the beginning of a mark is held back."""

    def finish(self) -> list[Part]:
        """What is left when no more text comes."""


class Plain:
    """Reads an answer that is words and nothing else."""

    def feed(self, text: str) -> list[Part]:
        return [Text(text)]

    def finish(self) -> list[Part]:
        return []


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one part, and none without text."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text | Reasoning) and not part.text:
            continue
        if isinstance(part, Text | Reasoning) and type(part) is type(last):
            found[-1] = type(part)(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments) and last.number == part.number:
            found[-1] = Arguments(part.number, last.text + part.text)
        else:
            found.append(part)
    return found


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
