"""Files that survive kills: every cut of a commit, every interleaving of reader and writer, every damaged byte."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metrics.catalogue import ENGINE, SUPERVISOR
from metrics.files import banks
from metrics.files.banks import Bank, Memory
from metrics.files.store import StoreError, Tallies, TallyReader, TallyStore, tally_path
from metrics.layout import Layout, Shape, build_layout

SHAPE = Shape(num_engines=1, num_api_servers=1, max_model_len=100)
LAYOUT = build_layout(SUPERVISOR, SHAPE)  # the smallest
OTHER = build_layout(ENGINE, SHAPE)
COUNTER = LAYOUT.cell("process_cpu_seconds_total")
GAUGE = LAYOUT.cell("process_open_fds")
FILE_BYTES = banks.file_bytes(LAYOUT.num_cells)
BANK_BYTES = banks.bank_bytes(LAYOUT.num_cells)
HEADER = banks.encode_header(LAYOUT, 5.0)
HEADER_CRC = zlib.crc32(HEADER)


class KilledError(Exception):
    """The process dies here."""


class CuttingMemory(Memory):
    """A file whose writer is killed after so many bytes; the flip is one store, and happens or does not."""

    __slots__ = ("budget",)

    def __init__(self, buffer: memoryview, num_cells: int, budget: int) -> None:
        super().__init__(buffer, num_cells)
        self.budget = budget

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset, data[: self.budget])
        self.budget -= len(data)
        if self.budget < 0:
            raise KilledError

    def flip(self, sequence: int) -> None:
        if self.budget < 1:
            raise KilledError
        self.budget -= 1
        super().flip(sequence)


class RecordingMemory(Memory):
    """Splits what is written into steps instead of writing it."""

    __slots__ = ("piece", "steps")

    def __init__(self, num_cells: int, piece: int) -> None:
        super().__init__(memoryview(bytearray(banks.file_bytes(num_cells))), num_cells)
        self.piece = piece
        self.steps: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), self.piece):
            self.steps.append((offset + start, data[start : start + self.piece]))

    def flip(self, sequence: int) -> None:
        self.steps.append((banks.SEQUENCE_OFFSET, sequence.to_bytes(8, "little")))


class InterleavedMemory(Memory):
    """A reader's memory: at every point of its reading, and within its copy, the writer gets on by some steps."""

    __slots__ = ("buffer", "cut", "steps", "turns")

    def __init__(
        self, buffer: bytearray, num_cells: int, steps: Iterator[tuple[int, bytes]], turns: list[int], cut: int
    ) -> None:
        super().__init__(memoryview(buffer), num_cells)
        self.buffer = buffer
        self.steps = steps
        self.turns = turns
        self.cut = cut

    def writer_goes_on(self) -> None:
        for _ in range(self.turns.pop() if self.turns else 0):
            for offset, data in [next(self.steps, (0, b""))]:
                self.buffer[offset : offset + len(data)] = data

    def sequence(self) -> int:
        self.writer_goes_on()
        sequence = super().sequence()
        self.writer_goes_on()
        return sequence

    def head(self, offset: int) -> tuple[int, int, int]:
        head = super().head(offset)
        self.writer_goes_on()
        return head

    def copy_into(self, buffer: memoryview, offset: int) -> None:
        cut = self.cut % len(buffer)
        super().copy_into(buffer[:cut], offset)
        self.writer_goes_on()
        super().copy_into(buffer[cut:], offset + cut)


def cells_of(number: int) -> bytes:
    """Cells that tell which commit they are of, everywhere."""
    return np.full(LAYOUT.num_cells, float(number)).tobytes()


def read(memory: Memory) -> Bank | None:
    cells = bytearray(8 * LAYOUT.num_cells)
    found = banks.read(memory, HEADER_CRC, memoryview(cells))
    return None if found is None else Bank(*found, bytes(cells))


def fresh_buffer() -> bytearray:
    buffer = bytearray(FILE_BYTES)
    buffer[: len(HEADER)] = HEADER
    banks.commit(Memory(memoryview(buffer), LAYOUT.num_cells), HEADER_CRC, Bank(1, 1, cells_of(1)))
    return buffer


# --- crash consistency ---


@example(kills=[0])
@example(kills=[BANK_BYTES])
@example(kills=[BANK_BYTES + 1])
@given(kills=st.lists(st.integers(0, 3 * (BANK_BYTES + 1)), min_size=1, max_size=4))
def test_a_writer_killed_after_any_byte_leaves_its_last_commit(kills: list[int]):
    """Each incarnation commits until it is killed; the next one goes on from what it finds."""
    buffer = fresh_buffer()
    committed = 1
    for budget in kills:
        memory = CuttingMemory(memoryview(buffer), LAYOUT.num_cells, budget)
        with contextlib.suppress(KilledError):
            while True:
                banks.commit(memory, HEADER_CRC, Bank(committed + 1, 1, cells_of(committed + 1)))
                committed += 1
        assert read(memory) == Bank(committed, 1, cells_of(committed))
        assert memory.budget <= 0


@settings(max_examples=300)
@given(
    turns=st.lists(st.integers(0, 60), max_size=12), cut=st.integers(0, BANK_BYTES), piece=st.sampled_from([8, 37, 400])
)
def test_a_reader_at_any_interleaving_reads_a_commit_or_nothing(turns: list[int], cut: int, piece: int):
    recording = RecordingMemory(LAYOUT.num_cells, piece)
    for number in range(2, 8):
        banks.commit(recording, HEADER_CRC, Bank(number, 1, cells_of(number)))
    memory = InterleavedMemory(fresh_buffer(), LAYOUT.num_cells, iter(recording.steps), turns, cut)
    latest = 0
    for _ in range(3):
        bank = read(memory)
        if bank is not None:
            assert bank.cells == cells_of(bank.sequence)  # whole
            assert bank.sequence >= latest  # never back
            latest = bank.sequence
    bank = read(memory) or read(memory)
    assert turns or bank is not None  # a writer that rests is read


def test_a_reader_tries_again_when_a_commit_passes_while_it_copies():
    recording = RecordingMemory(LAYOUT.num_cells, BANK_BYTES)
    banks.commit(recording, HEADER_CRC, Bank(2, 1, cells_of(2)))
    turns = [2, 0, 0, 0]  # taken from the end: nothing until the head is read, the whole commit within the copy
    memory = InterleavedMemory(fresh_buffer(), LAYOUT.num_cells, iter(recording.steps), turns, BANK_BYTES // 2)
    assert read(memory) is None
    assert read(memory) == Bank(2, 1, cells_of(2))


def test_a_real_process_killed_at_any_moment_loses_nothing_it_committed(tmp_path: Path):
    """The child says which commit it made, after it made it: nothing said may be missing afterwards."""
    program = (
        "import sys\n"
        "from metrics.layout import Shape, build_layout\n"
        "from metrics.files.store import TallyStore\n"
        "layout = build_layout('supervisor', Shape(num_engines=1, num_api_servers=1, max_model_len=100))\n"
        "store = TallyStore.open(sys.argv[1], layout, incarnation=int(sys.argv[2]), now_unix=5.0)\n"
        "counters = [i for i in range(layout.num_cells) if not layout.gauges[i]]\n"
        "while True:\n"
        "    for cell in counters: store.tally.inc(cell)\n"
        "    store.commit()\n"
        "    print(store.sequence, flush=True)\n"
    )
    path = str(tmp_path / "a.tally")
    reader = TallyReader(path, LAYOUT)
    said, sequence = 0, 0
    for incarnation in (1, 2, 3):
        command = [sys.executable, "-c", program, path, str(incarnation)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], bufsize=0) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline:
                reading = reader.read()
                assert reading.sequence >= sequence
                sequence = reading.sequence
            os.kill(child.pid, signal.SIGKILL)
            said = max(said, *(int(line) for line in child.stdout.read().split(b"\n")[:-1]))
        reading = reader.read()
        assert reading.incarnation == incarnation
        assert reading.sequence >= said
        counted = set(reading.cells[~LAYOUT.gauges].tolist())
        assert counted == {reading.sequence - incarnation}  # each opening is a commit that counts nothing


# --- opening ---


def open_store(path: str, incarnation: int, layout: Layout = LAYOUT, now_unix: float = 5.0) -> TallyStore:
    return TallyStore.open(path, layout, incarnation=incarnation, now_unix=now_unix)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("inc"), st.integers(0, 10)),
        st.tuples(st.just("set"), st.integers(0, 10)),
        st.just(("commit", 0)),
        st.just(("killed", 0)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(steps)
def test_counters_never_fall_across_kills_and_gauges_start_anew(taken: list[tuple[str, int]]):
    with tempfile.TemporaryDirectory() as directory:
        path = tally_path(directory, SUPERVISOR, 0)
        store, reader, incarnation = open_store(path, 1), TallyReader(path, LAYOUT), 1
        working, durable = [0.0, 0.0], [0.0, 0.0]
        for step, value in taken:
            if step == "inc":
                store.tally.inc(COUNTER, value)
                working[0] += value
            elif step == "set":
                store.tally.set(GAUGE, value)
                working[1] = value
            elif step == "commit":
                store.commit()
                durable = working[:]
            else:
                incarnation += 1
                store.close()
                store = open_store(path, incarnation, now_unix=9.0)
                working = durable = [durable[0], 0.0]
                working = working[:]
            reading = reader.read()
            assert [reading.cells[COUNTER], reading.cells[GAUGE]] == durable
            assert (reading.incarnation, reading.created_unix) == (incarnation, 5.0)
            assert (reading.sequence, reading.cells.tobytes()) == store.committed
        assert os.listdir(directory) == ["supervisor-0.tally"]
        store.close()
        reader.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    store = open_store(str(tmp_path / "a.tally"), 1)
    store.tally.inc(COUNTER, 7)
    store.commit()
    store.close()
    return str(tmp_path / "a.tally")


def assert_set_aside(path: str, reason: str) -> None:
    damaged = Path(path).read_bytes()
    with pytest.raises(StoreError, match=re.escape(path) + ".*" + reason):
        TallyReader(path, LAYOUT).read()
    store = open_store(path, 2, now_unix=6.0)
    assert store.set_aside is not None
    assert reason in store.set_aside
    assert store.created_unix == 6.0
    assert sum(store.tally.cells) == 0
    kept = Path(f"{path}.damaged").read_bytes()
    assert kept.startswith(damaged)
    assert len(kept) != FILE_BYTES
    assert TallyReader(path, LAYOUT).read().created_unix == 6.0
    store.close()


@pytest.mark.parametrize("byte", [*range(0, 64, 5), *range(64, FILE_BYTES, 41)])
def test_no_damaged_byte_is_trusted(path: str, byte: int):
    content = bytearray(Path(path).read_bytes())
    content[byte] ^= 0x10
    Path(path).write_bytes(content)
    idle = banks.bank_offset(1, LAYOUT.num_cells)  # the last commit is the second
    if idle <= byte < idle + BANK_BYTES:
        store = open_store(path, 2)
        assert (store.set_aside, store.tally.cells[COUNTER]) == (None, 7)
    else:
        assert_set_aside(path, "")


@pytest.mark.parametrize("size", [0, 1, 40, 64, 100, FILE_BYTES - 1])
def test_a_file_cut_short_is_set_aside(path: str, size: int):
    os.truncate(path, size)
    assert_set_aside(path, f"size is {size} bytes")


def test_a_file_of_another_layout_is_set_aside(path: str):
    other = bytearray(Path(path).read_bytes())
    header = banks.encode_header(build_layout(SUPERVISOR, SHAPE), 5.0).replace(LAYOUT.digest, OTHER.digest)
    other[: len(header)] = header
    Path(path).write_bytes(other)
    assert_set_aside(path, "another layout")


def test_a_file_of_another_version_is_set_aside(path: str):
    other = bytearray(Path(path).read_bytes())
    other[8] = banks.FORMAT_VERSION + 1
    Path(path).write_bytes(other)
    assert_set_aside(path, "format version 2")


def test_files_do_not_grow_in_number_however_often_they_are_damaged(path: str):
    for incarnation in range(2, 8):
        os.truncate(path, 10)
        open_store(path, incarnation).close()
    assert sorted(os.listdir(Path(path).parent)) == ["a.tally", "a.tally.damaged"]


def test_a_kill_while_a_file_is_begun_leaves_no_half_file(path: str):
    os.rename(path, f"{path}.new")
    os.truncate(f"{path}.new", 50)  # as a predecessor left it
    with pytest.raises(StoreError, match="No such file"):
        TallyReader(path, LAYOUT).read()
    store = open_store(path, 2)
    assert (store.set_aside, sum(store.tally.cells)) == (None, 0)


def test_an_incarnation_is_never_used_twice(path: str):
    with pytest.raises(StoreError, match="incarnation 1 comes after 1"):
        open_store(path, 1)
    open_store(path, 5).close()
    with pytest.raises(StoreError, match="incarnation 4 comes after 5"):
        open_store(path, 4)


def test_the_incarnation_is_durable_before_anything_is_counted(path: str):
    store = open_store(path, 2)
    assert TallyReader(path, LAYOUT).read().incarnation == 2
    assert store.committed == (store.sequence, store.tally.cells.tobytes())


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    with pytest.raises(StoreError, match="No such file or directory"):
        open_store(str(tmp_path / "missing" / "a.tally"), 1)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left"):
        open_store(str(tmp_path / "a.tally"), 1)
    assert os.listdir(tmp_path) == []


def test_a_reader_notices_that_the_file_was_replaced(path: str):
    reader = TallyReader(path, LAYOUT)
    assert reader.read().cells[COUNTER] == 7
    with open(path, "r+b") as file:
        file.seek(banks.bank_offset(2, LAYOUT.num_cells) + BANK_BYTES - 1)  # the last commit is the second
        file.write(b"!")
    assert reader.read().cells[COUNTER] == 7
    store = open_store(path, 2, now_unix=8.0)
    assert store.set_aside is not None
    assert (reader.read().created_unix, reader.read().cells[COUNTER]) == (8.0, 0)


def test_a_reader_refuses_a_file_that_is_cut_while_it_is_mapped(path: str):
    reader = TallyReader(path, LAYOUT)
    reader.read()
    os.truncate(path, 0)
    with pytest.raises(StoreError, match="size is 0 bytes"):
        reader.read()


def test_tallies_are_the_rows_of_one_matrix_and_0_where_there_is_none(tmp_path: Path):
    tallies = Tallies(str(tmp_path), SUPERVISOR, 3, LAYOUT)
    stores = {
        index: open_store(tally_path(str(tmp_path), SUPERVISOR, index), 4 + index, now_unix=index) for index in (0, 2)
    }
    for number in range(1, 4):
        for index, store in stores.items():
            store.tally.inc(COUNTER, 10 + index)
            store.commit()
        tallies.read()
        assert tallies.cells[:, COUNTER].tolist() == [10 * number, 0, 12 * number]
        assert (tallies.incarnations, tallies.created_unix.tolist()) == ([4, 0, 6], [0, 0, 2])
    os.truncate(tally_path(str(tmp_path), SUPERVISOR, 2), 0)
    with pytest.raises(StoreError, match="size is 0 bytes"):
        tallies.read()
    open_store(tally_path(str(tmp_path), SUPERVISOR, 2), 7, now_unix=9.0)
    tallies.read()
    assert (tallies.incarnations, tallies.created_unix[2]) == ([4, 0, 7], 9.0)


def test_what_cannot_be_read_now_is_an_error_and_never_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = tmp_path / "deployment"
    directory.mkdir()
    store = open_store(tally_path(str(directory), SUPERVISOR, 0), 4)
    store.tally.inc(COUNTER, 10)
    store.commit()

    def no_descriptor(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_descriptor)
        with pytest.raises(StoreError, match="Too many open files"):
            Tallies(str(directory), SUPERVISOR, 1, LAYOUT).read()
    Tallies(str(directory), SUPERVISOR, 2, LAYOUT).read()  # index 1 has never been started
    shutil.rmtree(directory)
    with pytest.raises(StoreError, match="No such file"):
        Tallies(str(directory), SUPERVISOR, 1, LAYOUT).read()


def test_a_reading_is_the_same_object_until_something_is_committed(path: str):
    store = open_store(path, 2)
    reader = TallyReader(path, LAYOUT)
    first = reader.read()
    store.tally.inc(COUNTER)
    assert reader.read() is first
    store.commit()
    second = reader.read()
    assert (first.cells[COUNTER], second.cells[COUNTER]) == (7.0, 8.0)
    assert reader.read() is second
    open_store(path, 3)
    assert reader.read().incarnation == 3


def test_a_reader_may_come_before_the_file(tmp_path: Path):
    reader = TallyReader(str(tmp_path / "a.tally"), LAYOUT)
    with pytest.raises(StoreError):
        reader.read()
    store = open_store(str(tmp_path / "a.tally"), 1)
    assert reader.read().sequence == store.sequence


def test_without_statistics_a_store_keeps_gauges_only(tmp_path: Path):
    store = TallyStore.open(str(tmp_path / "a.tally"), LAYOUT, incarnation=1, now_unix=5.0, gauges_only=True)
    store.tally.inc(COUNTER)
    store.tally.set(GAUGE, 3)
    store.commit()
    reading = TallyReader(str(tmp_path / "a.tally"), LAYOUT).read()
    assert (reading.cells[COUNTER], reading.cells[GAUGE]) == (0, 3)
