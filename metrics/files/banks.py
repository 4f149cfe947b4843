"""The bytes of a tally file: a header, two banks, and the order in which a commit writes them. Pure.

    offset  0   magic, format version, number of cells, layout digest, created time: never rewritten
           56   sequence: the last commit; the one word whose store makes a commit
           64   bank 0, bank 1: sequence, incarnation, CRC, cells; commit s is in bank s % 2

A commit writes the bank that the sequence does not point at, then stores the sequence. A writer killed between any
two bytes therefore leaves the previous commit whole. The CRC covers the header as well, so that no byte of a file can
be wrong unnoticed.

NOTE: a reader that copies while two commits pass sees a torn bank; accepting a bank on the sequence alone tears
(measured), hence sequence before = sequence after *and* CRC.
"""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Final, NamedTuple

from metrics.layout import Layout

MAGIC: Final = b"wbtally\n"
FORMAT_VERSION: Final = 1

_HEADER: Final = struct.Struct("<8sQQ16sd8x")  # magic, version, number of cells, digest, created_unix
_BANK: Final = struct.Struct("<QQQ")  # sequence, incarnation, CRC
SEQUENCE_OFFSET: Final = _HEADER.size
BANKS_OFFSET: Final = SEQUENCE_OFFSET + 8
CELL_BYTES: Final = 8

assert sys.byteorder == "little", "tally files and snapshots hold the machine's own, little-endian float64"


class StoreError(Exception):
    """A tally file that cannot be used or read; the text says why."""


class Bank(NamedTuple):
    """One commit, as read from a file."""

    sequence: int
    incarnation: int
    cells: bytes  # little-endian float64


def file_bytes(num_cells: int) -> int:
    """The size of a file."""
    return BANKS_OFFSET + 2 * bank_bytes(num_cells)


def bank_bytes(num_cells: int) -> int:
    """The size of one bank; a multiple of 8, so that every word is aligned."""
    return _BANK.size + CELL_BYTES * num_cells


def bank_offset(sequence: int, num_cells: int) -> int:
    """Where commit `sequence` is written."""
    return BANKS_OFFSET + sequence % 2 * (_BANK.size + CELL_BYTES * num_cells)


def encode_header(layout: Layout, created_unix: float) -> bytes:
    """The part of a file that is never rewritten."""
    return _HEADER.pack(MAGIC, FORMAT_VERSION, layout.num_cells, layout.digest, created_unix)


def check_header(header: bytes, layout: Layout) -> float:
    """The created time of a file with this header; raises StoreError unless it is one of this format and layout."""
    if len(header) != _HEADER.size:
        raise StoreError(f"header of {len(header)} bytes, not {_HEADER.size}")
    magic, version, num_cells, digest, created_unix = _HEADER.unpack(header)
    if magic != MAGIC:
        raise StoreError(f"no tally file: it begins with {magic!r}")
    if version != FORMAT_VERSION:
        raise StoreError(f"format version {version}, not {FORMAT_VERSION}")
    if digest != layout.digest or num_cells != layout.num_cells:
        raise StoreError(f"another layout: {digest.hex()} of {num_cells} cells, not {layout.digest.hex()}")
    return float(created_unix)


def encode_bank(header_crc: int, bank: Bank) -> bytes:
    """One commit's bank, `header_crc` being the CRC of the file's header."""
    head = _BANK.pack(bank.sequence, bank.incarnation, _crc(header_crc, *bank))
    return head + bank.cells


def _crc(header_crc: int, sequence: int, incarnation: int, cells: bytes | memoryview) -> int:
    return zlib.crc32(cells, zlib.crc32(_BANK.pack(sequence, incarnation, 0), header_crc))


class Memory:
    """A tally file's bytes, mapped or not, and the only ways in which they are written and read while in use."""

    __slots__ = ("_bytes", "_words", "num_cells")

    def __init__(self, buffer: memoryview, num_cells: int) -> None:
        assert len(buffer) == file_bytes(num_cells)
        self.num_cells = num_cells
        self._bytes = buffer
        self._words = buffer.cast("Q")

    def write(self, offset: int, data: bytes) -> None:
        self._bytes[offset : offset + len(data)] = data

    def flip(self, sequence: int) -> None:
        """Store the sequence: one aligned 8-byte store."""
        self._words[SEQUENCE_OFFSET // 8] = sequence

    def sequence(self) -> int:
        return self._words[SEQUENCE_OFFSET // 8]

    def copy(self, offset: int, size: int) -> bytes:
        return bytes(self._bytes[offset : offset + size])

    def head(self, offset: int) -> tuple[int, int, int]:
        """Read a bank's sequence, incarnation and CRC."""
        return _BANK.unpack_from(self._bytes, offset)

    def copy_into(self, buffer: memoryview, offset: int) -> None:
        """Copy as many bytes as the buffer has."""
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def release(self) -> None:
        """Let go of the buffer, so that its map can be closed."""
        self._words.release()
        self._bytes.release()


def read_header(memory: Memory, layout: Layout) -> tuple[float, int]:
    """Read (created_unix, CRC of the header); raises StoreError."""
    header = memory.copy(0, _HEADER.size)
    return check_header(header, layout), zlib.crc32(header)


def commit(memory: Memory, header_crc: int, bank: Bank) -> None:
    """Write the bank, then make it the one that counts."""
    memory.write(bank_offset(bank.sequence, memory.num_cells), encode_bank(header_crc, bank))
    # Stores of one processor are seen in order on x86; elsewhere a reader that sees the flip too early finds a wrong
    # CRC and tries again, and a killed writer's stores are all there before anybody opens the file anew.
    memory.flip(bank.sequence)


def read(memory: Memory, header_crc: int, cells: memoryview) -> tuple[int, int] | None:
    """Read the last commit's cells, as bytes, and return its sequence and incarnation. None where one passed meanwhile
    or the bytes are damaged, and the cells are anything: try again, a bounded number of times."""
    sequence = memory.sequence()
    offset = bank_offset(sequence, memory.num_cells)
    committed, incarnation, crc = memory.head(offset)
    memory.copy_into(cells, offset + _BANK.size)
    if memory.sequence() != sequence:
        return None
    if committed != sequence or crc != _crc(header_crc, committed, incarnation, cells):
        return None
    return committed, incarnation
