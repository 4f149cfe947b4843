"""P9: series, files and memory do not grow with restarts, users or request contents."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
from pathlib import Path

import psutil

from engine.wire import STOP_SIGNAL
from tests.e2e.harness import Served, served
from tests.e2e.load import asks, run

NUM_SERVERS = 4
NUM_ROUNDS = 4  # of a restart of every API server at once
GROWTH_BYTES = 4 * 2**20  # of the supervisor's memory: allocator's pages, not one record a restart


def files(deployment: Served) -> list[str]:
    """Names of all files; an engine's work socket has its incarnation in its name."""
    paths = deployment.runtime_directory.rglob("*")
    return sorted(p.name.split(".")[0] + ".work" if p.name.endswith(".work") else p.name for p in paths)


def test_restarts_add_no_series_no_file_and_no_memory(tiny_model: Path):
    with served(tiny_model, "--api-server-count", str(NUM_SERVERS)) as deployment:
        supervisor = psutil.Process(deployment.process.pid)
        run(deployment, asks(4, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=4)

        def restart_all(*more: int) -> None:
            victims = [*deployment.pids("api-server"), *more]
            for number, pid in enumerate(victims):
                os.kill(pid, STOP_SIGNAL if number % 2 else signal.SIGKILL)
            deployment.wait_until_restarted(victims)

        restart_all(*deployment.pids("engine"))
        series, kept = set(deployment.balanced_metrics()), files(deployment)
        memory, descriptors = supervisor.memory_info().rss, supervisor.num_fds()
        for _ in range(NUM_ROUNDS):
            restart_all()
        restart_all(*deployment.pids("engine"))
        assert set(deployment.balanced_metrics()) == series
        assert files(deployment) == kept
        assert supervisor.num_fds() <= descriptors + NUM_SERVERS + 1  # the tallies, if the audit had read none before
        assert supervisor.memory_info().rss - memory < GROWTH_BYTES


def test_what_clients_ask_for_adds_no_series(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        series = set(deployment.idle_metrics())
        for number in range(20):
            body = {
                "prompt": f"user {number}",
                "max_tokens": 2,
                "user": f"user-{number}",
                "seed": number,
                "metadata": {"n": str(number)},
            }
            assert deployment.post("/v1/completions", body)[0] == 200
            assert deployment.post(f"/v1/nothing-{number}", {})[0] == 404
            assert deployment.post("/v1/completions", {"prompt": "x", "model": f"model-{number}"})[0] == 404
        try:
            deployment.get("/metrics/engine/99")
        except urllib.error.HTTPError as error:
            assert error.code == 404, json.loads(error.read())  # noqa: PT017
        assert set(deployment.idle_metrics()) == series
