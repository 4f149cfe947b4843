"""What this process uses (process_*, python_*), from /proc and the garbage collector into its tally, once a second.

Counters go on across incarnations, as all counters of a tally do: what is counted is growth since the process began.
Where /proc does not tell (it is not Linux, or access is refused), the figures stay as they are.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
from typing import Final

from metrics.catalogue import GENERATIONS, PYTHON_INFO_LABELS
from metrics.tally import Tally

_GC_COUNTERS: Final = {
    "collected": "python_gc_objects_collected_total",
    "uncollectable": "python_gc_objects_uncollectable_total",
    "collections": "python_gc_collections_total",
}


class ProcessMetrics:
    """Figures of the calling process. `update` costs some 20 µs."""

    __slots__ = ("_cells", "_page_bytes", "_proc", "_seen", "_started_unix", "_tally", "_tick_hz")

    def __init__(self, tally: Tally, *, proc: str = "/proc") -> None:
        layout = tally.layout
        names = (
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_virtual_memory_bytes",
            "process_start_time_seconds",
            "process_open_fds",
            "process_max_fds",
        )
        self._tally = tally
        self._cells = {(name, ""): layout.cell(name) for name in names}
        for name in _GC_COUNTERS.values():
            self._cells |= {(name, g): layout.cell(name, generation=g) for g in GENERATIONS}
        self._seen: dict[tuple[str, str], float] = {}  # this process's own part of each counter
        self._proc = proc
        self._tick_hz = os.sysconf("SC_CLK_TCK")
        self._page_bytes = resource.getpagesize()
        self._started_unix: float | None = None

    def update(self) -> None:
        """Bring the tally's figures up to date."""
        try:
            self._update_from_stat()
            self._set("process_open_fds", len(os.listdir(f"{self._proc}/self/fd")))
        except (OSError, ValueError, IndexError):
            pass  # no such /proc here
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY:
            self._set("process_max_fds", limit)
        for generation, figures in enumerate(gc.get_stats()):
            for key, name in _GC_COUNTERS.items():
                self._grow(name, str(generation), figures[key])

    def _update_from_stat(self) -> None:
        with open(f"{self._proc}/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # what precedes is the pid and a name with any characters
        # Source: proc_pid_stat(5); `fields` begins with its third field.
        self._grow("process_cpu_seconds_total", "", (int(fields[11]) + int(fields[12])) / self._tick_hz)
        self._set("process_virtual_memory_bytes", int(fields[20]))
        self._set("process_resident_memory_bytes", int(fields[21]) * self._page_bytes)
        if self._started_unix is None:
            self._started_unix = self._boot_unix() + int(fields[19]) / self._tick_hz
        self._set("process_start_time_seconds", self._started_unix)

    def _boot_unix(self) -> float:
        with open(f"{self._proc}/stat", "rb") as file:
            return float(next(line for line in file if line.startswith(b"btime ")).split()[1])

    def _set(self, name: str, value: float) -> None:
        self._tally.set(self._cells[name, ""], value)

    def _grow(self, name: str, generation: str, value: float) -> None:
        key = (name, generation)
        self._tally.inc(self._cells[key], max(0.0, value - self._seen.get(key, 0.0)))
        self._seen[key] = value


def python_info() -> dict[str, str]:
    """The labels of python_info for this interpreter."""
    major, minor, patchlevel = platform.python_version_tuple()
    values = (platform.python_implementation(), major, minor, patchlevel, platform.python_version())
    return dict(zip(PYTHON_INFO_LABELS, values, strict=True))
