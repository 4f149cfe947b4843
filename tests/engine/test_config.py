"""A deployment's directory, as a supervisor makes and removes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.supervisor.directory import DeploymentDirectory, DirectoryError


def test_a_directory_is_private_and_gone_after_its_end(tmp_path: Path):
    runtime = tmp_path / "deep" / "run"
    directory = DeploymentDirectory.create(runtime)
    assert directory.path.parent == runtime
    assert directory.path.stat().st_mode & 0o777 == 0o700
    (directory.path / "engine-0.tally").write_bytes(b"1")
    directory.remove()
    assert not list(runtime.iterdir())


def test_directories_of_living_supervisors_stay_and_those_of_dead_ones_go(tmp_path: Path):
    dead = DeploymentDirectory.create(tmp_path)
    os.close(dead._lock)  # as the kernel does when a process is killed
    alive = DeploymentDirectory.create(tmp_path)
    third = DeploymentDirectory.create(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {alive.path.name, third.path.name}


@pytest.mark.parametrize(("path", "word"), [("file/run", "Not a directory"), ("x" * 90, "too long")])
def test_a_directory_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, path: str, word: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match=word) as refused:
        DeploymentDirectory.create(tmp_path / path)
    assert str(tmp_path / path) in str(refused.value)


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o777)
    with pytest.raises(DirectoryError, match="others may write"):
        DeploymentDirectory.create(tmp_path)
