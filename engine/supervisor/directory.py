"""A deployment's directory: one fresh private sub-directory of the runtime directory for each start of a supervisor.

It holds tallies and sockets, no directories. Its `lock` file is locked for as long as its supervisor lives, and the
file's content says that we made the directory. Directories whose lock is free are left over from supervisors that are
gone, and are removed.

Nothing else is removed, whatever the runtime directory holds: what has no such content stays, and so does a directory
in a directory. A supervisor that is killed before its lock has its content leaves an almost empty directory for ever.

The runtime directory is ours, nobody else may write to it, and on the way to it no other user but root can rename. No
part of its path is a link, not even one of our own: who may change a link is not asked, and the path that every child
uses is the one that was checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Final

# Source: unix(7): sun_path holds 108 bytes with the NUL that ends it.
MAX_SOCKET_PATH_BYTES: Final = 107
LONGEST_SOCKET: Final = "/engine-255.9999999.work"
LOCK: Final = "lock"

_NAME: Final = re.compile("[0-9a-f]{8}")
_PASS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW  # may be done where we may not list
_LIST: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class DirectoryError(OSError):
    """A runtime directory that cannot be used; the text names it and says why."""


def default_runtime_directory() -> Path:
    """In shared memory where there is some: tallies outlive processes, not hosts. Raises DirectoryError."""
    try:
        base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise DirectoryError(
            f"no place for a runtime directory, name one with --runtime-dir: {error.strerror}"
        ) from error
    return base / f"wholebatch-{os.getuid()}"


class DeploymentDirectory:
    """Made and locked by `create`; `remove` at the end."""

    def __init__(self, path: Path, runtime: int, directory: int, lock: int) -> None:
        self.path = path
        self._runtime = runtime
        self._directory = directory
        self._lock = lock

    @classmethod
    def create(cls, runtime: Path) -> DeploymentDirectory:
        """Make the directory, marked as ours; raises DirectoryError."""
        if len(f"{runtime}/12345678{LONGEST_SOCKET}".encode()) > MAX_SOCKET_PATH_BYTES:
            raise DirectoryError(f"runtime directory {runtime}: the path is too long for sockets in it")
        try:
            with contextlib.ExitStack() as undo:
                opened = _open_runtime(runtime)
                undo.callback(os.close, opened)
                _sweep(opened)
                name = secrets.token_hex(4)
                os.mkdir(name, 0o700, dir_fd=opened)
                directory = os.open(name, _LIST, dir_fd=opened)
                undo.callback(os.close, directory)
                undo.callback(_remove, opened, name, directory)
                lock = _lock(name, directory)
                undo.pop_all()
        except OSError as error:
            if isinstance(error, DirectoryError):
                raise
            raise DirectoryError(f"cannot use runtime directory {runtime}: {error.strerror or error}") from error
        return cls(runtime / name, opened, directory, lock)

    def remove(self) -> None:
        """With all files in it; whatever has taken its place meanwhile stays."""
        _remove(self._runtime, self.path.name, self._directory)
        for descriptor in (self._lock, self._directory, self._runtime):
            os.close(descriptor)


def _open_runtime(runtime: Path) -> int:
    """Open it, made where it is not there. Raises DirectoryError: somebody else could put another in its place."""
    root, *names = runtime.absolute().parts
    path, opened = Path(root), os.open(root, _PASS)
    try:
        for name in names:
            _check_way(runtime, path, os.fstat(opened))
            path /= name
            inner = _enter(runtime, path, opened)
            os.close(opened)
            opened = inner
        _check_private(runtime, os.fstat(opened))
        return os.open(".", _LIST, dir_fd=opened)
    finally:
        os.close(opened)


def _enter(runtime: Path, path: Path, parent: int) -> int:
    """The directory of that path, whose parent is open."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.lstat(path.name, dir_fd=parent).st_mode):
            raise DirectoryError(f"runtime directory {runtime}: {path} is a link; name the directory that it leads to")
        return os.open(path.name, _PASS, dir_fd=parent)
    with contextlib.suppress(FileExistsError):  # another supervisor starts, too
        os.mkdir(path.name, 0o700, dir_fd=parent)
    return os.open(path.name, _PASS, dir_fd=parent)


def _check_way(runtime: Path, path: Path, found: os.stat_result) -> None:
    """Nobody but root and us can rename what is in this directory, but what is theirs."""
    if found.st_uid not in (0, os.getuid()):
        raise DirectoryError(f"runtime directory {runtime}: {path} belongs to somebody else, who may rename in it")
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        raise DirectoryError(f"runtime directory {runtime}: others may write to {path}, and rename in it")


def _check_private(runtime: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
        raise DirectoryError(f"runtime directory {runtime} belongs to somebody else, or others may write to it")


def _content(name: str) -> bytes:
    """What a lock holds: a copy under another name is not ours."""
    return f"wholebatch deployment {name}\n".encode()


def _lock(name: str, directory: int) -> int:
    """The lock gets its content when it is locked, so that nobody else's sweep finds it ours and free."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, _content(name))
    except OSError:
        os.close(lock)
        raise
    return lock


def _sweep(runtime: int) -> None:
    """Remove what supervisors that are gone left behind."""
    for name in filter(_NAME.fullmatch, os.listdir(runtime)):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):  # not ours, alive, or swept by another
            directory = os.open(name, _LIST, dir_fd=runtime)
            opened.callback(os.close, directory)
            found = os.fstat(directory)
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                continue
            lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            opened.callback(os.close, lock)
            if os.pread(lock, 64, 0) != _content(name):
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(runtime, name, directory)


def _remove(runtime: int, name: str, directory: int) -> None:
    """Remove the files in a directory that is proven to be ours, then itself if the name is still its own. What cannot
    be removed is left to the next sweep, and the lock, which proves it, goes last."""
    with contextlib.suppress(OSError):
        for file in set(os.listdir(directory)) - {LOCK}:
            with contextlib.suppress(IsADirectoryError):  # we make none
                os.unlink(file, dir_fd=directory)
        if os.listdir(directory) == [LOCK]:
            os.unlink(LOCK, dir_fd=directory)
        if os.path.samestat(os.fstat(directory), os.lstat(name, dir_fd=runtime)):
            os.rmdir(name, dir_fd=runtime)
