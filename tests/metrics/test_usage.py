"""Figures of this process, beside the client library's own."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from metrics.catalogue import SUPERVISOR
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from metrics.usage import ProcessMetrics, python_info

LAYOUT = build_layout(SUPERVISOR, Shape(num_engines=1, num_api_servers=1, max_model_len=1))
STAT = "4242 (a) b( c) S 1 2 3 4 5 6 7 8 9 10 {utime} {stime} 15 16 17 18 19 20 500 8192 3 " + " ".join(["0"] * 28)


def test_the_figures_are_those_of_the_client_library():
    tally = Tally(LAYOUT)
    ProcessMetrics(tally).update()
    theirs = {
        s.name: s.value for family in ProcessCollector(registry=CollectorRegistry()).collect() for s in family.samples
    }
    for name, value in theirs.items():
        ours = tally.cells[LAYOUT.cell(name)]
        assert ours == (
            value if name in ("process_start_time_seconds", "process_max_fds") else pytest.approx(value, rel=0.1, abs=3)
        )


def fake_proc(directory: Path, utime: int, stime: int) -> None:
    (directory / "self" / "fd").mkdir(parents=True, exist_ok=True)
    (directory / "self" / "fd" / "0").touch()
    (directory / "self" / "stat").write_text(STAT.format(utime=utime, stime=stime))
    (directory / "stat").write_text("cpu 1 2 3\nbtime 1000\n")


def test_cpu_time_goes_on_across_incarnations(tmp_path: Path):
    tally, cell = Tally(LAYOUT), LAYOUT.cell("process_cpu_seconds_total")
    fake_proc(tmp_path, 300, 100)
    first = ProcessMetrics(tally, proc=str(tmp_path))
    first.update()
    first.update()
    assert tally.cells[cell] == 4.0
    fake_proc(tmp_path, 350, 100)
    first.update()
    assert tally.cells[cell] == 4.5
    fake_proc(tmp_path, 10, 0)  # the next incarnation began anew
    ProcessMetrics(tally, proc=str(tmp_path)).update()
    assert tally.cells[cell] == pytest.approx(4.6)
    assert tally.cells[LAYOUT.cell("process_start_time_seconds")] == 1005.0
    assert tally.cells[LAYOUT.cell("process_virtual_memory_bytes")] == 8192
    assert tally.cells[LAYOUT.cell("process_open_fds")] == 1


def test_without_proc_the_other_figures_stand(tmp_path: Path):
    tally = Tally(LAYOUT)
    gc.collect()
    ProcessMetrics(tally, proc=str(tmp_path / "nowhere")).update()
    assert tally.cells[LAYOUT.cell("process_cpu_seconds_total")] == 0
    assert tally.cells[LAYOUT.cell("python_gc_collections_total", generation="2")] >= 1
    assert tally.cells[LAYOUT.cell("process_max_fds")] > 0


def test_python_info_has_the_client_librarys_labels():
    (family,) = PlatformCollector(registry=None).collect()
    assert python_info() == family.samples[0].labels
