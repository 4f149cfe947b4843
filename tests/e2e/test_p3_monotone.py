"""P3: no exported counter ever falls, whoever dies; but for a damaged tally, which is announced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from metrics.catalogue import API_SERVER, ENGINE
from tests.e2e.faults import Faults, frozen
from tests.e2e.harness import Samples, Served, served, total, wait_for
from tests.e2e.load import asks, run, steady_load
from tests.e2e.watch import watched


def test_no_counter_falls_and_no_stream_changes_whichever_process_is_killed(tiny_model: Path):
    requests = asks(24, prompt_tokens=(20, 80), max_tokens=24, vocab=250)
    with served(tiny_model, "--api-server-count", "3", "-dp", "2") as deployment:
        faults = Faults(deployment)
        with (
            watched(deployment, num_engines=2, num_api_servers=3) as findings,
            steady_load(deployment, requests, 4) as clients,
        ):
            for role, index in ((API_SERVER, faults.exporter(0)), (ENGINE, 0), (API_SERVER, faults.another(1))):
                faults.kill(role, index)
                faults.settle()
        samples = deployment.balanced_metrics()
    assert findings.scrapes > 0
    assert (findings.fell, findings.twice, findings.stale, clients.different) == ([], [], [], [])
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) >= clients.finished > 0


def counted(samples: Samples) -> dict[object, float]:
    return {k: v for k, v in samples.items() if k[0].endswith("_total") and k[0].startswith(("vllm:", "wholebatch:"))}


def damage(path: Path) -> None:
    """One wrong byte in each half of the file."""
    raw = bytearray(path.read_bytes())
    for position in (len(raw) // 4, 3 * len(raw) // 4):
        raw[position] ^= 0xFF
    path.write_bytes(raw)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def of_another_version(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8] ^= 0xFF
    path.write_bytes(raw)


def tally(deployment: Served, name: str) -> Path:
    return next(deployment.runtime_directory.iterdir()) / f"{name}.tally"


@pytest.mark.parametrize("spoil", [damage, cut, of_another_version])
def test_a_tally_that_cannot_be_trusted_is_set_aside_and_said_so_and_serving_goes_on(tiny_model: Path, spoil):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        run(deployment, asks(8, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=4)
        deployment.idle_metrics()
        faults = Faults(deployment)
        path = tally(deployment, "api-server-1")
        # Frozen supervisor: nobody starts the next incarnation before its predecessor's file is spoilt.
        pid = faults.row(API_SERVER, 1)["pid"]
        with frozen(deployment.process.pid):
            os.kill(pid, signal.SIGKILL)
            spoil(path)
        wait_for(lambda: "event=tally_set_aside" in deployment.log(), "the message")
        faults.settle()
        assert path.with_name(path.name + ".damaged").exists()
        run(deployment, asks(8, prompt_tokens=(20, 40), max_tokens=8, vocab=250, seed=1), at_a_time=4)
        after = deployment.idle_metrics()
        own = total(after, "wholebatch:received_tokens_total")
        assert 8 * 8 <= own <= 16 * 8
        log = deployment.log()
    assert "Traceback" not in log
