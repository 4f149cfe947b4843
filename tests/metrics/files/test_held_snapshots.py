"""What an API server may export, as others read it: while it lives, and not what a kill or a freeze left torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics.files import held_snapshots
from metrics.files.banks import StoreError
from metrics.files.held_snapshots import NOTHING, Held, HeldReader, HeldWriter, held_path

ENTRY_BYTES = held_snapshots._ENTRY_BYTES
HELD = Held((3, 77), 12.5)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path)


def reader_in(directory: str) -> HeldReader:
    return HeldReader(directory, num_api_servers=4, num_engines=2)


def test_what_is_held_is_read_by_all_others_until_it_is_let_go(directory: str):
    writer, readers = HeldWriter(directory, 3, 2), [reader_in(directory), reader_in(directory)]
    for reader in readers:
        assert reader.read(3, 0) == NOTHING
    writer.hold(0, HELD)
    writer.hold(1, Held((1, 2), 0.5))
    for reader in readers:
        assert [reader.read(3, engine) for engine in (0, 1)] == [HELD, Held((1, 2), 0.5)]
        assert reader.read(2, 0) is None
    writer.hold(0, NOTHING)
    for reader in readers:
        assert [reader.read(3, engine) for engine in (0, 1)] == [NOTHING, Held((1, 2), 0.5)]
        reader.close()
    writer.close()


def test_who_has_ended_holds_nothing_and_its_successor_nothing_of_it(directory: str):
    reader = reader_in(directory)
    for incarnation in range(3):
        assert reader.read(3, 0) is None
        writer = HeldWriter(directory, 3, 2)
        assert reader.read(3, 0) == NOTHING
        writer.hold(0, Held((1, incarnation), 9.0))
        assert reader.read(3, 0) == Held((1, incarnation), 9.0)
        writer.close()
    assert reader.read(3, 0) is None
    assert os.listdir(directory) == ["api-server-3.held"]
    assert os.path.getsize(held_path(directory, 3)) == 2 * ENTRY_BYTES
    reader.close()


def test_a_killed_process_holds_nothing_from_the_instant_that_its_end_is_seen(directory: str):
    program = (
        "import sys\n"
        "from metrics.files.held_snapshots import Held, HeldWriter\n"
        "writer = HeldWriter(sys.argv[1], 3, 2)\n"
        "writer.hold(0, Held((3, 77), 12.5))\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    reader, root = reader_in(directory), Path(__file__).parents[3]
    for _ in range(3):
        command = [sys.executable, "-c", program, directory]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            assert reader.read(3, 0) == HELD
            descriptor = os.pidfd_open(child.pid)
            os.kill(child.pid, signal.SIGKILL)
            os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
            assert reader.read(3, 0) is None
            os.close(descriptor)
    reader.close()


@given(written=st.integers(0, ENTRY_BYTES))
def test_a_slot_of_which_any_part_was_written_is_the_old_one_or_the_new_one_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, written: int
):
    directory = str(tmp_path_factory.mktemp("held"))
    writer, reader = HeldWriter(directory, 0, 1), HeldReader(directory, 1, 1)
    new = Held((4, 1), 99.0)
    writer.hold(0, new)
    content = Path(held_path(directory, 0)).read_bytes()
    writer.hold(0, HELD)
    with open(held_path(directory, 0), "r+b") as file:
        file.write(content[:written])
    assert reader.read(0, 0) in (HELD, new, None)
    writer.close()
    reader.close()


def test_only_one_process_holds_at_an_index_and_another_leaves_what_it_holds(directory: str):
    writer, reader = HeldWriter(directory, 3, 2), reader_in(directory)
    writer.hold(1, HELD)
    with pytest.raises(StoreError, match="temporarily unavailable"):
        HeldWriter(directory, 3, 2)
    assert reader.read(3, 1) == HELD
    reader.close()
    writer.close()


@pytest.mark.parametrize("size", [0, ENTRY_BYTES, 2 * ENTRY_BYTES - 1, 3 * ENTRY_BYTES])
def test_a_file_of_another_size_says_nothing(directory: str, size: int):
    writer, reader = HeldWriter(directory, 3, 2), reader_in(directory)
    writer.hold(1, HELD)
    assert reader.read(3, 1) == HELD
    os.truncate(held_path(directory, 3), size)
    assert reader.read(3, 1) is None
    reader.close()
    reader = reader_in(directory)
    assert reader.read(3, 1) is None
    reader.close()
    writer.close()
