"""A tally that survives its process: a memory-mapped file of two banks, committed by one store. Its format is `banks`.

One process writes a file, for as long as it lives; its next incarnation opens the same file and goes on counting.
Any other process may read it, without a lock. What is killed, at any instruction, leaves its last commit behind.

A file that cannot be trusted (damaged, cut short, of another format or layout) is renamed aside, to one name, and a new
one begun: `set_aside` says why, and the new `created_unix` announces the reset. It is not left at its size, by which
those who have it mapped notice. Nothing is written to the disk's own time: the file outlives processes, not the host.
"""

from __future__ import annotations

import mmap
import os
from array import array
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from metrics.files import banks
from metrics.files.banks import Bank, Memory, StoreError
from metrics.layout import Layout
from metrics.tally import GaugesOnly, Tally

__all__ = ["StoreError", "Tallies", "TallyReader", "TallyReading", "TallyStore", "tally_path"]

UNREAD: Final = -1  # no sequence
MAX_READ_ATTEMPTS: Final = 100  # each fails only if a commit passes during a copy of some kilobytes


def tally_path(directory: str, role: str, index: int) -> str:
    """The file of one process index."""
    return f"{directory}/{role}-{index}.tally"


class TallyStore:
    """The writer's side. Not safe for two threads, but `committed` may be read from another."""

    __slots__ = (
        "_opened",
        "committed",
        "created_unix",
        "incarnation",
        "sequence",
        "set_aside",
        "tally",
    )

    def __init__(
        self, opened: _Opened, tally: Tally, *, incarnation: int, sequence: int, set_aside: str | None = None
    ) -> None:
        """Use `open`."""
        self._opened = opened
        self.created_unix = opened.created_unix
        self.tally = tally
        self.incarnation = incarnation
        self.sequence = sequence
        self.committed: tuple[int, bytes] = (sequence, b"")  # (sequence, cells) of the last commit
        self.set_aside = set_aside  # why the file found was not continued

    @classmethod
    def open(
        cls, path: str, layout: Layout, *, incarnation: int, now_unix: float, gauges_only: bool = False
    ) -> TallyStore:
        """Continue the file, its gauges reset, or begin it. The incarnation is in the file when this returns.

        Raises StoreError where the file system refuses, or the file is of this incarnation or a later one.
        """
        make = GaugesOnly if gauges_only else Tally
        set_aside = None
        try:
            if os.path.exists(path):
                try:
                    return cls._continue(path, layout, make, incarnation)
                except _UntrustedError as error:
                    set_aside = f"{error}; set aside as {path}.damaged, counting begins anew"
            return cls._begin(path, layout, make, incarnation, now_unix, set_aside)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from error

    def commit(self) -> None:
        """Make what was counted so far durable. Costs 1.5 µs for an engine's tally (measured), whatever was counted."""
        sequence = self.sequence + 1
        cells = self.tally.cells.tobytes()
        banks.commit(self._opened.memory, self._opened.header_crc, Bank(sequence, self.incarnation, cells))
        self.sequence = sequence
        self.committed = (sequence, cells)

    def close(self) -> None:
        """Let go of the file. Not needed for durability."""
        self._opened.close()

    @classmethod
    def _continue(cls, path: str, layout: Layout, make: type[Tally], incarnation: int) -> TallyStore:
        with open(path, "r+b") as file:
            opened = _map(file.fileno(), layout, writable=True)
        cells = array("d", bytes(banks.CELL_BYTES * layout.num_cells))
        read = banks.read(opened.memory, opened.header_crc, memoryview(cells).cast("B"))
        if read is None:
            opened.close()
            raise _UntrustedError(f"{path}: the checksum does not match")
        sequence, last = read
        if last >= incarnation:
            opened.close()
            raise StoreError(f"{path}: incarnation {incarnation} comes after {last}, which wrote the file")
        store = cls(opened, make(layout, cells), incarnation=incarnation, sequence=sequence)
        store.commit()
        return store

    @classmethod
    def _begin(
        cls, path: str, layout: Layout, make: type[Tally], incarnation: int, now_unix: float, set_aside: str | None
    ) -> TallyStore:
        """The file gets its name when it is whole, so that no kill leaves half of one."""
        unfinished = f"{path}.new"
        size = banks.file_bytes(layout.num_cells)
        with open(unfinished, "w+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a SIGBUS later
            except OSError:
                os.unlink(unfinished)
                raise
            file.write(banks.encode_header(layout, now_unix))
            file.flush()
            opened = _map(file.fileno(), layout, writable=True)
        store = cls(opened, make(layout), incarnation=incarnation, sequence=0, set_aside=set_aside)
        store.commit()
        if set_aside is not None:
            if os.path.getsize(path) == size:
                os.truncate(path, size + 1)
            os.replace(path, f"{path}.damaged")
        os.replace(unfinished, path)
        return store


class TallyReading(NamedTuple):
    """One commit of some process, as it was in its file."""

    incarnation: int
    created_unix: float
    sequence: int
    cells: npt.NDArray[np.float64]  # (num_cells,), not writable


class TallyReader:
    """The reader's side; keeps the file mapped between reads, and notices when it has been replaced."""

    __slots__ = ("_last", "_layout", "_opened", "_path", "_sequence", "_size", "created_unix", "incarnation")

    def __init__(self, path: str, layout: Layout) -> None:
        """The file need not exist yet."""
        self._path = path
        self._layout = layout
        self._size = banks.file_bytes(layout.num_cells)
        self._opened: _Opened | None = None
        self._sequence = UNREAD  # of the last commit that was read from the file that is open
        self._last: TallyReading | None = None
        self.incarnation = 0  # of the last commit that was read
        self.created_unix = 0.0

    def read(self) -> TallyReading:
        """The last commit; the same object as before where there was none since. Raises StoreError: no such file, not
        one of this layout, damaged."""
        cells = np.empty(self._layout.num_cells)
        if self.read_into(cells.data.cast("B")) or self._last is None:
            cells.flags.writeable = False
            self._last = TallyReading(self.incarnation, self.created_unix, self._sequence, cells)
        return self._last

    def read_into(self, cells: memoryview) -> bool:
        """Read the last commit's cells, as bytes, unless it is the one read before: False. Raises StoreError, and then
        the cells are anything."""
        opened = self._opened
        if opened is None or opened.map.size() != self._size:  # Measured: 0.2 µs, to look at the path 1.1
            opened = self._open()
        if opened.memory.sequence() == self._sequence:
            return False
        for _ in range(MAX_READ_ATTEMPTS):
            read = banks.read(opened.memory, opened.header_crc, cells)
            if read is not None:
                self._sequence, self.incarnation = read
                self.created_unix = opened.created_unix
                return True
        self.close()
        raise StoreError(f"{self._path}: no consistent commit in {MAX_READ_ATTEMPTS} attempts")

    @property
    def is_to_come(self) -> bool:
        """Whether there is no file because its process has never been started. Where the directory is gone, too, as
        when a session's shared memory is cleared, there was one."""
        return not os.path.exists(self._path) and os.path.isdir(os.path.dirname(self._path))

    def close(self) -> None:
        """Let go of the file; the next `read` opens it anew."""
        self._sequence = UNREAD
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> _Opened:
        self.close()
        try:
            with open(self._path, "rb") as file:
                self._opened = _map(file.fileno(), self._layout, writable=False)
        except (OSError, _UntrustedError) as error:
            raise StoreError(f"{self._path}: {error}") from error
        return self._opened


class Tallies:
    """The reader's side of all tallies of one role: the last commits as the rows of one matrix."""

    __slots__ = ("_readers", "_rows", "cells", "created_unix", "incarnations")

    def __init__(self, directory: str, role: str, num: int, layout: Layout) -> None:
        """The files need not exist yet."""
        self._readers = [TallyReader(tally_path(directory, role, index), layout) for index in range(num)]
        self.cells = np.zeros((num, layout.num_cells))
        self._rows = [row.data.cast("B") for row in self.cells]
        # By index; 0, as the cells are, where there is no such file yet.
        self.incarnations = [0] * num
        self.created_unix = np.zeros(num)

    def read(self) -> None:
        """Bring all up to date. Costs 0.5 µs for a tally that has not changed, 3 µs for another.

        Raises StoreError where one cannot be read now: taken for zeros, its counters would fall (P3)."""
        for index, (reader, row) in enumerate(zip(self._readers, self._rows, strict=True)):
            try:
                if not reader.read_into(row):
                    continue
                self.incarnations[index], self.created_unix[index] = reader.incarnation, reader.created_unix
            except StoreError:
                if self.incarnations[index] or not reader.is_to_come:
                    raise


class _UntrustedError(Exception):
    """A file that is not to be continued."""


@dataclass(frozen=True, slots=True)
class _Opened:
    map: mmap.mmap
    memory: Memory
    created_unix: float
    header_crc: int

    def close(self) -> None:
        self.memory.release()
        self.map.close()


def _map(descriptor: int, layout: Layout, *, writable: bool) -> _Opened:
    size = os.fstat(descriptor).st_size
    if size != banks.file_bytes(layout.num_cells):
        raise _UntrustedError(f"size is {size} bytes, not {banks.file_bytes(layout.num_cells)}")
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    memory = Memory(memoryview(mapped), layout.num_cells)
    try:
        created_unix, header_crc = banks.read_header(memory, layout)
    except StoreError as error:
        memory.release()
        mapped.close()
        raise _UntrustedError(str(error)) from error
    return _Opened(mapped, memory, created_unix, header_crc)
