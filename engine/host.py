"""The memory and the cores that this process may use: the host's, within the limits of its control groups, cgroups(7).

Containers are limited so, and services of systemd; what the host has in all says nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_UNKNOWN: Final = 16 * 2**30  # bytes, where /proc tells nothing
_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")


class Share(NamedTuple):
    """What one of several engines on this host may use."""

    num_cores: int  # 1 or more
    num_bytes: int


def share(num_engines: int = 1) -> Share:
    """What one engine may use when all engines of this host share it evenly."""
    return Share(max(1, available_cores() // num_engines), available_bytes() // num_engines)


def available_bytes(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """The least of what the kernel could give out without swapping and of every limit above this process.

    A limit counts whole: what its group uses already is mostly file cache, which yields."""
    found = [int(line.split()[1]) * 1024 for line in _lines(proc / "meminfo") if line.startswith("MemAvailable:")]
    for group, is_version_2 in _groups(proc, groups, "memory"):
        found += _numbers(group / ("memory.max" if is_version_2 else "memory.limit_in_bytes"))
    return min(found, default=_UNKNOWN)


def available_cores(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Whole cores, at least one: the least of those the process may run on and of every quota above it.

    A thread beyond a quota makes all of them wait until the next period."""
    found = [len(os.sched_getaffinity(0))]
    for group, is_version_2 in _groups(proc, groups, "cpu"):
        if is_version_2:
            quota = _numbers(group / "cpu.max")
        else:
            quota = _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
        if len(quota) == 2:  # microseconds in each period of so many; one without a quota has no first number
            found.append(max(1, quota[0] // quota[1]))
    return min(found)


def _groups(proc: Path, groups: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The directories of this process's group and of all above it, and whether they are of version 2."""
    for line in _lines(proc / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        is_version_2 = number == "0"
        if is_version_2 or controller in controllers.split(","):
            root = groups if is_version_2 else groups / controllers
            # In a container the path may be the host's and lead nowhere; the root is the container's group then.
            group = root / path.lstrip("/")
            for directory in (group, *group.parents):
                yield directory, is_version_2
                if directory == root:
                    break


def _numbers(path: Path) -> list[int]:
    """Those that a file holds; none of one that is not there."""
    return [int(word) for line in _lines(path) for word in line.split() if word.isdigit()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
