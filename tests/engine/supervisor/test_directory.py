"""A deployment's directory beside others of its kind: being made, alive, dead, or none at all."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path

import pytest

from engine.supervisor.directory import ABANDONED_S, DeploymentDirectory, DirectoryError, default_runtime_directory


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


def test_what_was_abandoned_before_it_had_a_lock_goes_after_a_minute(tmp_path: Path):
    young, old = tmp_path / "young", tmp_path / "old"
    for path in (young, old):
        path.mkdir()
        (path / "engine-0.tally").write_bytes(b"1")
    past = time.time() - ABANDONED_S - 1
    os.utime(old, (past, past))
    DeploymentDirectory.create(tmp_path).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["young"]


def test_files_and_links_in_the_runtime_directory_are_left_alone(tmp_path: Path):
    runtime, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    runtime.mkdir(mode=0o700)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (elsewhere / "lock").write_text("")
    (runtime / "note").write_text("x")
    (runtime / "link").symlink_to(elsewhere)
    DeploymentDirectory.create(runtime).remove()
    assert (elsewhere / "precious").exists()
    assert (runtime / "note").exists()


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
