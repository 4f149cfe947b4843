"""Which snapshots an API server may export, and until when, in a memory-mapped file for all others to see.

Engines broadcast their snapshots to every API server, so that of another's only the position is asked for: who answers
a scrape exports exactly the snapshot at the position that the exporter holds, from those that it has heard itself. One
process writes a file, which has an entry for each engine and one size from the start (P9), and goes from an incarnation
to the next. What ends the exporter's right ends it for every reader (P2):

    time            the instant is on CLOCK_BOOTTIME, which all processes of a host share
    a resignation   the entry is emptied before it is sent
    its end         the writer locks its file, and the kernel lets go of the lock before anybody is told of the end

An entry that is torn, by a kill, a freeze or being read meanwhile, has a wrong checksum and says nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from typing import BinaryIO, Final, NamedTuple

from metrics.catalogue import API_SERVER
from metrics.files.banks import StoreError
from metrics.snapshot import NOWHERE, Position

_CONTENT: Final = struct.Struct("<QQd")  # position (incarnation, sequence), instant
_CRC: Final = struct.Struct("<I4x")
_ENTRY_BYTES: Final = _CONTENT.size + _CRC.size
_FLOCK: Final = struct.Struct("hhqqi4x")  # Source: fcntl(2), 64-bit Linux: type, whence, start, length, pid


def _bytes(start: int, length: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)


class Held(NamedTuple):
    """The position of a snapshot that may be exported before an instant."""

    position: Position
    expires_at: float


NOTHING: Final = Held(NOWHERE, 0.0)


def held_path(directory: str, api_server: int) -> str:
    """The file of one API-server index."""
    return f"{directory}/{API_SERVER}-{api_server}.held"


class HeldWriter:
    """The exporter's side. Raises StoreError where the file system refuses, or another process writes the file."""

    def __init__(self, directory: str, api_server: int, num_engines: int) -> None:
        size = num_engines * _ENTRY_BYTES
        try:
            self._open(held_path(directory, api_server), num_engines, size)
        except OSError as error:
            raise StoreError(f"cannot keep held snapshots in {directory}: {error.strerror or error}") from error

    def _open(self, path: str, num_engines: int, size: int) -> None:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open(path, "a+b"))
            os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is an error here, not a SIGBUS
            self._map = stack.enter_context(mmap.mmap(self._file.fileno(), size))
            # One byte beyond keeps other writers out; the entries' own are what readers ask for.
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _bytes(size, 1))
            for engine in range(num_engines):
                self.hold(engine, NOTHING)  # in place of a predecessor's, before it would seem to live
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _bytes(0, size))
            stack.pop_all()  # it stays open, and locked

    def hold(self, engine: int, held: Held) -> None:
        """Write what is held of an engine from now on."""
        content = _CONTENT.pack(*held.position, held.expires_at)
        offset = engine * _ENTRY_BYTES
        self._map[offset : offset + _ENTRY_BYTES] = content + _CRC.pack(zlib.crc32(content))

    def close(self) -> None:
        """Hold nothing any more, as after the end of the process."""
        self._map.close()
        self._file.close()


class HeldReader:
    """The side of an API server that answers a scrape; it keeps the files mapped between reads."""

    def __init__(self, directory: str, num_api_servers: int, num_engines: int) -> None:
        self._paths = [held_path(directory, index) for index in range(num_api_servers)]
        self._size = num_engines * _ENTRY_BYTES
        self._opened: dict[int, tuple[BinaryIO, mmap.mmap]] = {}

    def read(self, api_server: int, engine: int) -> Held | None:
        """What that API server held of the engine at an instant at which it lived, its time perhaps over; None where
        nothing can be read."""
        opened = self._open(api_server)
        if opened is None:
            return None
        file, mapped = opened
        offset = engine * _ENTRY_BYTES
        entry = mapped[offset : offset + _ENTRY_BYTES]
        incarnation, sequence, expires_at = _CONTENT.unpack_from(entry)
        (crc,) = _CRC.unpack_from(entry, _CONTENT.size)
        if crc != zlib.crc32(entry[: _CONTENT.size]) or not _is_locked(file, self._size):
            return None
        return Held((incarnation, sequence), expires_at)

    def close(self) -> None:
        """Let go of the files."""
        for index in list(self._opened):
            self._close(index)

    def _open(self, api_server: int) -> tuple[BinaryIO, mmap.mmap] | None:
        """None while there is no such file, or it is not of its size."""
        if api_server not in self._opened:
            try:
                file = open(self._paths[api_server], "rb", buffering=0)  # noqa: SIM115
            except OSError:
                return None
            if os.fstat(file.fileno()).st_size != self._size:
                file.close()
                return None
            self._opened[api_server] = file, mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ)
        opened = self._opened[api_server]
        if opened[1].size() != self._size:  # cut short: to read on would be a SIGBUS
            self._close(api_server)
            return None
        return opened

    def _close(self, api_server: int) -> None:
        file, mapped = self._opened.pop(api_server)
        mapped.close()
        file.close()


def _is_locked(file: BinaryIO, size: int) -> bool:
    """Whether the process that wrote it lives."""
    found: bytes = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _bytes(0, size))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
