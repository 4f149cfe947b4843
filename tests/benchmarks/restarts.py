"""What 500 restarts leave behind: files, series, the supervisor's memory and descriptors, beside those after 5.

API servers and engines of a tiny model, all killed at once, again and again; each round counts as many restarts as
there are processes. `python -m tests.benchmarks.restarts 50` does fewer.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.benchmarks.report import document, table
from tests.e2e.harness import Served, served, violations
from tests.e2e.load import asks, run
from tests.tiny_models import write_tiny_llama

NUM_SERVERS = 8
NUM_ENGINES = 2
NUM_RESTARTS = 500
FIRST = 5
ROUNDS_AN_ENGINE = 5  # engines load torch: they are in every fifth round


def state(deployment: Served, supervisor: psutil.Process, restarts: int) -> dict[str, object]:
    """Read everything that could have grown."""
    samples = deployment.balanced_metrics()
    paths = [path for path in deployment.runtime_directory.rglob("*") if path.is_file() or path.is_socket()]
    return {
        "restarts": restarts,
        "series": len(samples),
        "files": len(paths),
        "bytes of files": sum(path.stat().st_size for path in paths),
        "supervisor's memory, KiB": supervisor.memory_info().rss // 1024,
        "supervisor's descriptors": supervisor.num_fds(),
        "violations": len(violations(samples)),
    }


def measure(deployment: Served, wanted: int) -> list[dict[str, object]]:
    """States along the way, the first after at least FIRST restarts."""
    supervisor = psutil.Process(deployment.process.pid)
    requests = asks(8, prompt_tokens=(20, 40), max_tokens=8, vocab=250)
    states: list[dict[str, object]] = []
    done = number = 0
    while done < wanted:
        victims = deployment.pids("api-server")
        victims += deployment.pids("engine") if number % ROUNDS_AN_ENGINE == 0 else []
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        deployment.wait_until_restarted(victims)
        done, number = done + len(victims), number + 1
        run(deployment, requests, at_a_time=4)
        if not states or done >= wanted or done // 100 > (done - len(victims)) // 100:
            states.append(state(deployment, supervisor, done))
            print(states[-1], flush=True)
    return states


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_RESTARTS
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        flags = ("--api-server-count", str(NUM_SERVERS), "-dp", str(NUM_ENGINES))
        with served(model, *flags) as deployment:
            states = measure(deployment, wanted)
    table("After so many restarts", list(states[0]), [list(one.values()) for one in states])
    document("restarts", {"states": states, "seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()
