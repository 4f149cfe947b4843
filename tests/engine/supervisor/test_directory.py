"""A deployment's directory beside others of its kind: being made, alive, dead, or none at all."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.supervisor.directory import DeploymentDirectory, DirectoryError, default_runtime_directory

NOBODY = 65534
only_root = pytest.mark.xfail(os.getuid() != 0, reason="only root can give a directory away", run=False)


def test_a_lock_is_held_from_the_moment_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep at any instant of another's beginning removes nothing."""
    flock = fcntl.flock

    def flock_with_a_sweep_before(descriptor: int, operation: int) -> None:
        monkeypatch.setattr("engine.supervisor.directory.fcntl.flock", flock)
        DeploymentDirectory.create(tmp_path).remove()
        flock(descriptor, operation)

    monkeypatch.setattr("engine.supervisor.directory.fcntl.flock", flock_with_a_sweep_before)
    directory = DeploymentDirectory.create(tmp_path)
    assert directory.path.is_dir()
    DeploymentDirectory.create(tmp_path).remove()
    assert [path.name for path in directory.path.iterdir()] == ["lock"]
    directory.remove()


def end_as_if_killed(directory: DeploymentDirectory) -> None:
    for descriptor in (directory._lock, directory._directory, directory._runtime):
        os.close(descriptor)


def make_left_over(path: Path) -> Path:
    """What a supervisor that was killed leaves behind."""
    path.mkdir(mode=0o700, parents=True)
    (path / "lock").write_bytes(b"wholebatch deployment %s\n" % path.name.encode())
    (path / "engine-0.tally").write_bytes(b"1")
    return path


def sweep(runtime: Path) -> None:
    DeploymentDirectory.create(runtime).remove()


def test_what_a_dead_supervisor_left_goes_and_what_a_living_one_has_stays(tmp_path: Path):
    dead, alive = DeploymentDirectory.create(tmp_path), DeploymentDirectory.create(tmp_path)
    for directory in (dead, alive):
        (directory.path / "engine-0.tally").write_bytes(b"1")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{directory.path}/engine-0.1.work")
    end_as_if_killed(dead)
    make_left_over(tmp_path / "0123abcd")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [alive.path]
    assert sorted(path.name for path in alive.path.iterdir()) == ["engine-0.1.work", "engine-0.tally", "lock"]
    alive.remove()


# --- what is not ours ---

NAMES = ("0123abcd", "deadbeef", "00000000", "DEADBEEF", "0123abcde", "lock", "lock.new", "docs", "engine-0.tally")
COPIED = b"wholebatch deployment 89abcdef\n"  # under a name that is not in NAMES
Tree = bytes | str | None | dict[str, Any]  # a file, a link to that name elsewhere, a FIFO, a directory
leaves = st.sampled_from([b"", COPIED]) | st.binary(max_size=9) | st.sampled_from(["deadbeef", "deadbeef/lock", "no"])
trees = st.recursive(
    leaves | st.none(), lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=5), max_leaves=12
)


def plant(path: Path, tree: Tree, elsewhere: Path) -> None:
    match tree:
        case bytes():
            path.write_bytes(tree)
        case str():
            path.symlink_to(elsewhere / tree)
        case None:
            os.mkfifo(path, 0o600)
        case dict():
            path.mkdir(mode=0o700, exist_ok=True)
            for name, inner in tree.items():
                plant(path / name, inner, elsewhere)
    past = time.time() - 3600
    os.utime(path, (past, past), follow_symlinks=False)


def seen(path: Path) -> dict[Path, tuple[object, ...]]:
    """All that is below the path, and what it is."""
    found: dict[Path, tuple[object, ...]] = {}
    for inner in sorted(path.rglob("*")):
        is_, content = inner.lstat(), b""
        if inner.is_symlink():
            content = os.readlink(inner).encode()
        elif inner.is_file():
            content = inner.read_bytes()
        found[inner] = (is_.st_ino, is_.st_mode, is_.st_uid, is_.st_mtime_ns, content)
    return found


@given(st.dictionaries(st.sampled_from(NAMES), trees, max_size=6))
@example({"docs": {}, "0123abcd": {"lock": b""}, "deadbeef": {}, "00000000": {"lock.new": b""}})
@example({"deadbeef": "deadbeef"})
@example({"DEADBEEF": {"lock": b"wholebatch deployment DEADBEEF\n"}})
@example({"0123abcd": "deadbeef", "deadbeef": {"lock": "deadbeef/lock"}, "00000000": {"lock": None}})
@example({"0123abcd": {"lock": COPIED, "engine-0.tally": b"1"}, "deadbeef": {"lock": {}}})
def test_what_we_did_not_make_survives_byte_for_byte(tree: dict[str, Tree]):
    with tempfile.TemporaryDirectory() as made:
        runtime, elsewhere = Path(made, "run"), Path(made, "elsewhere")
        make_left_over(elsewhere / "deadbeef")  # that a link leads to one makes the link no more ours
        plant(runtime, tree, elsewhere)
        before = seen(Path(made))
        before.pop(runtime)  # its time of change is that of what came and went
        directory = DeploymentDirectory.create(runtime)
        (directory.path / "engine-0.tally").write_bytes(b"1")
        directory.remove()
        after = seen(Path(made))
        after.pop(runtime)
        assert after == before


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_may_enter_is_not_ours(tmp_path: Path, mode: int):
    make_left_over(tmp_path / "0123abcd").chmod(mode)
    before = seen(tmp_path)
    sweep(tmp_path)
    assert seen(tmp_path) == before


def test_a_directory_in_one_of_ours_stays_and_so_does_the_proof_that_the_outer_one_is_ours(tmp_path: Path):
    directory = DeploymentDirectory.create(tmp_path)
    (directory.path / "engine-0.tally").write_bytes(b"1")
    (directory.path / "docs").mkdir()
    (directory.path / "docs" / "precious").write_text("x")
    directory.remove()
    sweep(tmp_path)
    assert sorted(path.name for path in directory.path.rglob("*")) == ["docs", "lock", "precious"]
    (directory.path / "docs" / "precious").unlink()
    (directory.path / "docs").rmdir()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_link_in_one_of_ours_goes_and_what_it_leads_to_stays(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "note").write_text("x")
    directory = DeploymentDirectory.create(tmp_path / "run")
    (directory.path / "link").symlink_to(tmp_path / "precious")
    directory.remove()
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "precious" / "note").exists()


@pytest.mark.parametrize("what", ["a left-over", "a link", "an empty directory"])
def test_what_has_taken_our_directory_s_place_stays(tmp_path: Path, what: str):
    directory = DeploymentDirectory.create(tmp_path / "run")
    (directory.path / "engine-0.tally").write_bytes(b"1")
    moved = directory.path.rename(tmp_path / "moved")
    other = make_left_over(tmp_path / "other" / directory.path.name)
    match what:
        case "a left-over":
            other.rename(directory.path)
        case "a link":
            directory.path.symlink_to(other)
        case _:
            directory.path.mkdir(mode=0o700)
    before = seen(tmp_path / "run")
    directory.remove()
    assert seen(tmp_path / "run") == before
    assert (other if what != "a left-over" else directory.path).joinpath("lock").exists()
    assert not list(moved.iterdir()), "what we made is found wherever it is"


def test_a_directory_that_is_gone_already_is_removed_in_silence(tmp_path: Path):
    directory = DeploymentDirectory.create(tmp_path)
    (directory.path / "lock").unlink()
    directory.path.rmdir()
    directory.remove()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_locked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.supervisor.directory.fcntl.flock", refuse)
    with pytest.raises(DirectoryError, match="No locks available"):
        DeploymentDirectory.create(tmp_path)
    assert not list(tmp_path.iterdir())


# --- a runtime directory that somebody else could exchange ---


@pytest.mark.parametrize("of", ["run", "way/run"])
def test_a_link_on_the_way_is_refused_and_named(tmp_path: Path, of: str):
    left_over = make_left_over(tmp_path / "elsewhere" / "run" / "0123abcd")
    link = tmp_path / of.partition("/")[0]
    link.symlink_to(tmp_path / "elsewhere" / ("run" if of == "run" else ""))
    with pytest.raises(DirectoryError, match=f"{link} is a link"):
        DeploymentDirectory.create(tmp_path / of)
    assert left_over.exists()


def test_a_link_to_nothing_is_refused_and_nothing_is_made_there(tmp_path: Path):
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DirectoryError, match="is a link"):
        DeploymentDirectory.create(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("mode", "is_refused"), [(0o777, True), (0o775, True), (0o1777, False), (0o755, False)])
def test_others_may_not_rename_on_the_way(tmp_path: Path, mode: int, is_refused: bool):
    (tmp_path / "way").mkdir()
    (tmp_path / "way").chmod(mode)
    if is_refused:
        with pytest.raises(DirectoryError, match=f"others may write to {tmp_path}/way, and rename"):
            DeploymentDirectory.create(tmp_path / "way" / "run")
    else:
        sweep(tmp_path / "way" / "run")


@pytest.mark.parametrize("mode", [0o770, 0o1777, 0o702])
def test_a_sticky_directory_is_a_way_and_no_runtime_directory(tmp_path: Path, mode: int):
    tmp_path.chmod(mode)
    with pytest.raises(DirectoryError, match="others may write"):
        DeploymentDirectory.create(tmp_path)


def test_what_is_made_on_the_way_is_private_whatever_the_mask(tmp_path: Path):
    mask = os.umask(0)
    try:
        sweep(tmp_path / "deep" / "run")
    finally:
        os.umask(mask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.rglob("*"))] == [0o700, 0o700]


def test_the_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.supervisor.directory.os.getuid", lambda: os.geteuid() + 1)
    with pytest.raises(DirectoryError, match="belongs to somebody else"):
        DeploymentDirectory.create(tmp_path)
    assert not list(tmp_path.iterdir())


@only_root
def test_a_directory_in_another_user_s_is_refused(tmp_path: Path):
    (tmp_path / "theirs" / "run").mkdir(parents=True)
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    with pytest.raises(DirectoryError, match=f"{tmp_path}/theirs belongs to somebody else"):
        DeploymentDirectory.create(tmp_path / "theirs" / "run")


@only_root
@pytest.mark.parametrize("sticky", [0o755, 0o1777])
def test_another_user_s_runtime_directory_is_refused(tmp_path: Path, sticky: int):
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", NOBODY, NOBODY)
    tmp_path.chmod(sticky)
    with pytest.raises(DirectoryError, match="run belongs to somebody else"):
        DeploymentDirectory.create(tmp_path / "run")


@only_root
def test_another_user_s_directory_in_ours_stays(tmp_path: Path):
    os.chown(make_left_over(tmp_path / "0123abcd"), NOBODY, NOBODY)
    before = seen(tmp_path)
    sweep(tmp_path)
    assert seen(tmp_path) == before


def test_every_start_has_a_directory_of_its_own(tmp_path: Path):
    directories = [DeploymentDirectory.create(tmp_path) for _ in range(20)]
    assert len({directory.path for directory in directories}) == 20
    assert len(list(tmp_path.iterdir())) == 20
    for directory in directories:
        directory.remove()
    assert not list(tmp_path.iterdir())


def test_a_directory_whose_longest_socket_just_fits_is_taken_and_no_longer_one(tmp_path: Path):
    room = 107 - len(f"{tmp_path}//12345678/engine-255.9999999.work")
    DeploymentDirectory.create(tmp_path / ("x" * room)).remove()
    with pytest.raises(DirectoryError, match="too long"):
        DeploymentDirectory.create(tmp_path / ("x" * (room + 1)))


def test_the_default_is_one_directory_for_each_user():
    path = default_runtime_directory()
    assert path.name == f"wholebatch-{os.getuid()}"
    assert stat.S_ISDIR(path.parent.stat().st_mode)
