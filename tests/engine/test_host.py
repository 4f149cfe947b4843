"""What a process may use is the least of what the host has and of every limit on the groups above the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import host
from engine.host import available_bytes, available_cores, share

GIB = 2**30
MEMINFO = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {8 * GIB // 1024} kB\n"}
UNIFIED = {"proc/self/cgroup": "0::/\n"}
SERVICE = {"proc/self/cgroup": "0::/system.slice/wholebatch.service\n"}
FIRST = {"proc/self/cgroup": "9:name=systemd:/\n5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n"}

MEMORY: dict[str, tuple[dict[str, str], int]] = {
    "nothing told": ({}, 16 * GIB),
    "no groups": (MEMINFO, 8 * GIB),
    "no limit": (MEMINFO | UNIFIED | {"groups/memory.max": "max\n"}, 8 * GIB),
    "a limit over what is left": (MEMINFO | UNIFIED | {"groups/memory.max": f"{9 * GIB}\n"}, 8 * GIB),
    "a container": (MEMINFO | UNIFIED | {"groups/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    "a container that sees the host's path": (
        MEMINFO | {"proc/self/cgroup": "0::/../../pod/a:b\n", "groups/memory.max": f"{2 * GIB}\n"},
        2 * GIB,
    ),
    "a service in a slice with less": (
        MEMINFO
        | SERVICE
        | {
            "groups/system.slice/memory.max": f"{3 * GIB}\n",
            "groups/system.slice/wholebatch.service/memory.max": f"{4 * GIB}\n",
        },
        3 * GIB,
    ),
    "version 1": (
        MEMINFO
        | FIRST
        | {
            "groups/memory/docker/1/memory.limit_in_bytes": f"{GIB}\n",
            "groups/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        },
        GIB,
    ),
}

CORES: dict[str, tuple[dict[str, str], int]] = {
    "nothing told": ({}, 6),
    "no quota": (UNIFIED | {"groups/cpu.max": "max 100000\n"}, 6),
    "a quota over the cores": (UNIFIED | {"groups/cpu.max": "900000 100000\n"}, 6),
    "a container": (UNIFIED | {"groups/cpu.max": "350000 100000\n"}, 3),
    "less than a core": (UNIFIED | {"groups/cpu.max": "50000 100000\n"}, 1),
    "a service in a slice with less": (
        SERVICE
        | {
            "groups/system.slice/cpu.max": "200000 100000\n",
            "groups/system.slice/wholebatch.service/cpu.max": "400000 100000\n",
        },
        2,
    ),
    "version 1": (
        FIRST
        | {
            "groups/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "200000\n",
            "groups/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            "groups/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "groups/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
}


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "groups").mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "groups"


@pytest.mark.parametrize(("files", "expected"), MEMORY.values(), ids=MEMORY.keys())
def test_bytes(tmp_path: Path, files: dict[str, str], expected: int):
    assert available_bytes(*write(tmp_path, files)) == expected


@pytest.mark.parametrize(("files", "expected"), CORES.values(), ids=CORES.keys())
def test_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert available_cores(*write(tmp_path, files)) == expected


def test_engines_share_both_evenly_and_have_a_core_each_at_least(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "available_cores", lambda: 6)
    monkeypatch.setattr(host, "available_bytes", lambda: 8 * GIB)
    assert (share(), share(4), share(8)) == ((6, 8 * GIB), (1, 2 * GIB), (1, GIB))


def test_on_this_host_there_are_some_of_both():
    assert available_bytes() > 0
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
