"""Reads a GGUF file's metadata: the key-value pairs ahead of the tensors, nothing else.

Not the `gguf` library's reader: that one makes a numpy view of every string of the token and merge lists.
Measured: 1.6 s there, 0.05 s here for a vocabulary of 49,152 tokens (2 cores, four API servers starting at once).
Source: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any, Final

MAGIC: Final = b"GGUF"
MAX_COUNT: Final = 1 << 24  # pairs in a file, items in an array: more is a damaged file, not a vocabulary

_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_LENGTH: Final = struct.Struct("<Q")


class GGUFError(ValueError):
    """A file that is no GGUF file of a version known here, or is damaged."""


class _Cursor:
    """A place in the file's bytes that moves as values are read."""

    __slots__ = ("at", "raw")

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw = raw
        self.at = 0

    def scalar(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self.raw, self.at)
        self.at += kind.size
        return value

    def count(self) -> int:
        number: int = self.scalar(_LENGTH)
        if number > MAX_COUNT:
            raise GGUFError(f"a count of {number} at byte {self.at - 8}")
        return number

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        raw, at, unpack = self.raw, self.at, _LENGTH.unpack_from
        found = []
        for _ in range(count):
            (length,) = unpack(raw, at)
            end = at + 8 + length
            if end > len(raw):
                raise GGUFError(f"a string of {length} bytes at byte {at} runs past the end of the file")
            found.append(raw[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise GGUFError(f"a value of unknown type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar(_SCALARS[4]), self.count()
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise GGUFError(f"an array of type {kind} at byte {self.at}")
        items = struct.unpack_from(f"<{count}{_SCALARS[kind].format[1:]}", self.raw, self.at)
        self.at += count * _SCALARS[kind].size
        return list(items)


def read_metadata(path: str) -> dict[str, Any]:
    """Every key with its value; arrays are lists. Raises GGUFError, and OSError for a file that cannot be read."""
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise GGUFError(f"{path} does not begin with {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            try:
                return _pairs(_Cursor(raw))
            except (struct.error, GGUFError) as error:
                raise GGUFError(f"{path} is damaged: {error}") from error


def _pairs(cursor: _Cursor) -> dict[str, Any]:
    cursor.at = len(MAGIC)
    version = cursor.scalar(_SCALARS[4])
    if version not in (2, 3):
        raise GGUFError(f"GGUF version {version}, known are 2 and 3")
    cursor.count()  # tensors
    pairs = {}
    for _ in range(cursor.count()):
        key = cursor.string()
        pairs[key] = cursor.value(cursor.scalar(_SCALARS[4]))
    return pairs
