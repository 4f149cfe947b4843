"""P2: at every instant at most one API server exports an engine's series; none passes old values off as new."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

from frontend.scrape.exporter import boottime
from metrics.files.held_snapshots import HeldReader
from tests.e2e.faults import Faults, frozen
from tests.e2e.harness import Served, served, total, wait_for
from tests.e2e.load import asks, run, steady_load
from tests.e2e.watch import watched

WITNESS = "wholebatch:iterations_total"
NUM_SERVERS = 3
NUM_LOOKS = 40


def admin_url(deployment: Served, index: int) -> str:
    rows = json.loads(deployment.get("/deployment"))["processes"]
    return next(str(p["admin_url"]) for p in rows if p["role"] == "api-server" and p["index"] == index)


def exports(deployment: Served, url: str) -> bool:
    """Whether that process's own answer has the engine's series."""
    return any(name == WITNESS for name, _ in deployment.metrics(url + "/metrics"))


def held(deployment: Served, index: int) -> bool:
    """Whether that process says that it may export the engine's series."""
    [directory] = [path for path in deployment.runtime_directory.iterdir() if path.is_dir()]
    reader = HeldReader(str(directory), NUM_SERVERS, num_engines=1)
    found = reader.read(index, 0)
    reader.close()
    return found is not None and boottime() < found.expires_at


def exported_term(deployment: Served, url: str) -> float | None:
    """The term at which that process exports the engine's series; None where it does not."""
    samples = deployment.metrics(url + "/metrics")
    return total(samples, "wholebatch:exporter_term") if any(name == WITNESS for name, _ in samples) else None


def test_a_frozen_exporter_that_wakes_up_exports_nothing_that_another_holds(tiny_model: Path):
    with served(tiny_model, "--api-server-count", str(NUM_SERVERS)) as deployment:
        run(deployment, asks(6, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=6)
        faults = Faults(deployment)
        first = faults.exporter()
        urls = [admin_url(deployment, index) for index in range(NUM_SERVERS)]
        pid = faults.row("api-server", first)["pid"]
        assert exports(deployment, urls[first])
        with frozen(pid):
            others = [index for index in range(NUM_SERVERS) if index != first]
            [heir] = wait_for(lambda: [index for index in others if held(deployment, index)], "another exporter")
            assert not held(deployment, first)
            term = wait_for(lambda: exported_term(deployment, urls[heir]), "its answer")
        for _ in range(NUM_LOOKS):
            # It may be granted the series again, later: then at a greater term, and the other has stopped.
            assert sum(held(deployment, index) for index in range(NUM_SERVERS)) <= 1
            again = exported_term(deployment, urls[first])
            assert again is None or again > term
        assert wait_for(lambda: sum(exports(deployment, url) for url in urls) == 1, "one exporter")


def another_exporter(faults: Faults, first: int) -> bool:
    return faults.exporter() != first


def test_when_the_exporter_is_killed_another_takes_over_and_no_answer_has_a_series_twice_or_an_old_value(
    tiny_model: Path,
):
    requests = asks(16, prompt_tokens=(20, 60), max_tokens=16, vocab=250)
    with served(tiny_model, "--api-server-count", str(NUM_SERVERS)) as deployment:
        faults = Faults(deployment)
        with (
            watched(deployment, num_engines=1, num_api_servers=NUM_SERVERS) as findings,
            steady_load(deployment, requests, 4),
        ):
            for _ in range(2):
                first = faults.exporter()
                os.kill(faults.row("api-server", first)["pid"], signal.SIGKILL)
                wait_for(partial(another_exporter, faults, first), "another exporter")
                faults.settle()
        deployment.balanced_metrics()
    assert findings.scrapes > 0
    assert (findings.twice, findings.stale, findings.fell) == ([], [], [])
    assert findings.looks["0"][-1].is_there


def test_an_exporter_that_is_told_to_end_hands_the_series_over_before_it_goes(tiny_model: Path):
    with served(tiny_model, "--api-server-count", str(NUM_SERVERS)) as deployment:
        run(deployment, asks(6, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=6)
        faults = Faults(deployment)
        with watched(deployment, num_engines=1, num_api_servers=NUM_SERVERS) as findings:
            first = faults.exporter()
            faults.restart("api-server", first)
            wait_for(lambda: findings.looks["0"][-1].is_there, "the series")
        assert f"process=api-server-{first} event=stopped" in deployment.log()
    assert (findings.twice, findings.stale, findings.fell) == ([], [], [])


def test_the_series_of_a_frozen_engine_are_left_out_and_come_back(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        run(deployment, asks(4, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=4)
        pid = deployment.pids("engine")[0]

        def is_up() -> bool:
            samples = deployment.metrics()
            up = next(value for (name, _), value in samples.items() if name == "wholebatch:exporter_up")
            assert (up == 1.0) == any(name == WITNESS for name, _ in samples)
            return up == 1.0

        assert wait_for(is_up, "the series")
        with frozen(pid):
            wait_for(lambda: not is_up(), "an answer without the series")
        wait_for(is_up, "the series again")
        assert deployment.pids("engine") == [pid]
