"""A deployment's directory: one fresh private sub-directory of the runtime directory for each start of a supervisor.

It holds tallies and sockets. Its `lock` file is locked for as long as its supervisor lives; directories whose lock is
free are left over from supervisors that are gone, and are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

# Source: unix(7): sun_path holds 108 bytes with the NUL that ends it.
MAX_SOCKET_PATH_BYTES: Final = 107
LONGEST_SOCKET: Final = "/engine-255.9999999.work"
ABANDONED_S: Final = 60.0  # a directory that never got a lock, after so long


class DirectoryError(OSError):
    """A runtime directory that cannot be used; the text names it and says why."""


def default_runtime_directory() -> Path:
    """In shared memory where there is some: tallies outlive processes, not hosts."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    return base / f"wholebatch-{os.getuid()}"


class DeploymentDirectory:
    """Made and locked by `create`; `remove` at the end."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, runtime: Path) -> DeploymentDirectory:
        """Raises DirectoryError."""
        if len(f"{runtime}/12345678{LONGEST_SOCKET}".encode()) > MAX_SOCKET_PATH_BYTES:
            raise DirectoryError(f"runtime directory {runtime}: the path is too long for sockets in it")
        try:
            runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(runtime)
            _sweep(runtime)
            path = runtime / secrets.token_hex(4)
            path.mkdir(mode=0o700)
            lock = _lock(path)
        except OSError as error:
            if isinstance(error, DirectoryError):
                raise
            raise DirectoryError(f"cannot use runtime directory {runtime}: {error.strerror or error}") from error
        return cls(path, lock)

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _lock(path: Path) -> int:
    """The lock gets its name when it is locked, so that nobody else's sweep finds it free."""
    unnamed = path / "lock.new"
    lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unnamed.rename(path / "lock")
    return lock


def _check_private(runtime: Path) -> None:
    found = runtime.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise DirectoryError(f"runtime directory {runtime} belongs to somebody else, or others may write to it")


def _sweep(runtime: Path) -> None:
    """Remove what supervisors that are gone left behind."""
    for path in runtime.iterdir():
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            with contextlib.suppress(OSError):  # somebody else sweeps, too
                if path.is_dir() and time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # its supervisor lives
        finally:
            os.close(lock)
