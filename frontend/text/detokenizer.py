"""Token ids to text as they come: whole characters only, stop strings, and which tokens belong to the answer. Pure.

`Detokenizer` is a UTF-8 decoder behind a table of each token's bytes, so a token costs O(its bytes) however long the
text is. The pieces joined are the whole text: what is no UTF-8 becomes U+FFFD, as in a decode of all bytes at once.

Not `tokenizers.decoders.DecodeStream`: it has no end of stream, so a character cut short at the end is lost; it holds
back a U+FFFD that the model meant; and it decodes everything held back again for each token of invalid UTF-8.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence


class Detokenizer:
    """Text of one sequence. `token_bytes` gives a token's bytes, none for a token that is not shown."""

    __slots__ = ("_held", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._held = b""  # the beginning of a character

    def append(self, token_id: int) -> str:
        """Add a token; returns the characters that it completes."""
        raw = self._held + self._token_bytes(token_id)
        text, num_decoded = utf_8_decode(raw, "replace")
        self._held = raw[num_decoded:]
        return text

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character cut short, or nothing."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class Stops:
    """The stop strings of a request, prepared once for all of its sequences. Nothing of it changes."""

    __slots__ = ("borders", "includes_stop", "texts")

    def __init__(self, texts: Sequence[str], *, includes_stop: bool = False) -> None:
        assert all(texts), "an empty stop string stops everywhere"
        self.texts = tuple(texts)
        self.borders = tuple(map(_borders, texts))
        self.includes_stop = includes_stop


def _borders(text: str) -> list[int]:
    """Of each beginning, the length of its longest proper end that is a beginning of the text too.
    Source: Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return borders


class StopStrings:
    """Lets one sequence's text through up to the first stop string; holds back an end that might be the beginning of
    one. A character costs a few steps for each stop string, however long those are.

    Of several stop strings in the same text the one that begins first counts.
    """

    __slots__ = ("_held", "_lengths", "_stops")

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        self._lengths = [0] * len(stops.texts)  # of each stop string's longest beginning at the end of the text so far
        self._held = ""

    @property
    def has_any(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._lengths)

    def append(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was found: then nothing follows)."""
        if not self._lengths:
            return text, False
        held = self._held + text
        found = [(at, stop) for stop in self._stops.texts if (at := held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return held[: at + len(stop) if self._stops.includes_stop else at], True
        for number, stop in enumerate(self._stops.texts):
            self._lengths[number] = _follow(stop, self._stops.borders[number], self._lengths[number], text)
        keep = max(self._lengths)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _follow(stop: str, borders: list[int], length: int, text: str) -> int:
    """The length of the stop string's longest beginning at the end, after more text in which it does not end."""
    for character in text:
        while length and stop[length] != character:
            length = borders[length - 1]
        length += stop[length] == character
    return length


class SequenceText:
    """One sequence from sampled tokens to shown text: detokeniser, stop strings and their order.

    `num_tokens` counts the tokens that belong to the answer: all up to the one that completes a stop string.
    """

    __slots__ = ("_detokenizer", "_min_tokens", "_stops", "has_stopped", "is_searched", "num_characters", "num_tokens")

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, *, min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self.is_searched = stops.has_any  # or else nothing but the engine ends it
        self.has_stopped = False
        self.num_tokens = 0
        self.num_characters = 0  # decoded, shown or held back

    def append(self, token_id: int) -> str:
        """The text that this token makes ready to be shown; sets `has_stopped` at a stop string. Text of the first
        `min_tokens` tokens is not searched."""
        assert not self.has_stopped, "a token after the stop string"
        text = self._detokenizer.append(token_id)
        self.num_tokens += 1
        self.num_characters += len(text)
        if self.num_tokens <= self._min_tokens:
            return text
        shown, self.has_stopped = self._stops.append(text)
        return shown

    def append_all(self, token_ids: Sequence[int]) -> str:
        """`append` of each, where no stop string is searched for."""
        text = "".join(map(self._detokenizer.append, token_ids))
        self.num_tokens += len(token_ids)
        self.num_characters += len(text)
        return text

    def append_unseen(self) -> None:
        """Count a token whose text is not shown: the stop token."""
        self.num_tokens += 1

    def finish(self) -> str:
        """What is still to be shown at the end; nothing after a stop string."""
        if self.has_stopped:
            return ""
        shown, self.has_stopped = self._stops.append(self._detokenizer.flush())
        return shown if self.has_stopped else shown + self._stops.flush()
