"""P8: no fault of the statistics plane stops, slows or fails a request; each is counted."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import zmq

from engine import wire
from metrics import broadcast
from tests.e2e.harness import ROOT, Samples, Served, served, total, wait_for
from tests.e2e.load import asks, run, steady_load

REQUESTS = asks(24, prompt_tokens=(20, 60), max_tokens=24, vocab=250)
NUM_SUBSCRIBERS = 64


def faults(samples: Samples, process: str, where: str) -> float:
    return total(samples, "wholebatch:bulkhead_errors_total", {"process": process, "where": where})


def rejected(samples: Samples, process: str, kind: str) -> float:
    return total(samples, "wholebatch:wire_rejected_total", {"process": process, "kind": kind})


def uncounted(samples: Samples) -> list[str]:
    """The kinds of fault that were injected and that no process has counted."""
    engine, servers = ["engine-0"], ["api-server-0", "api-server-1"]
    injected = [(engine, where) for where in ("record", "commit", "publish", "process")]
    injected += [(servers, where) for where in ("record", "commit", "heartbeat", "process")]
    missing = [where for names, where in injected if not any(faults(samples, name, where) for name in names)]
    return missing + ["snapshot"] * (not any(rejected(samples, name, "snapshot") for name in servers))


def directory_of(deployment: Served) -> str:
    return str(next(deployment.runtime_directory.iterdir()))


def test_requests_do_not_notice_that_every_part_of_the_statistics_plane_fails_all_the_time(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        right = [seen.text for seen in run(deployment, REQUESTS, at_a_time=6)]
    with served(tiny_model, "--api-server-count", "2", module="tests.e2e.serve_faulty") as deployment:
        seen = run(deployment, REQUESTS, at_a_time=6)
        assert [one.text for one in seen] == right
        assert [one.completion_tokens for one in seen] == [24] * len(REQUESTS)
        wait_for(lambda: not uncounted(deployment.metrics()), "a count of every kind of fault")
        samples = deployment.balanced_metrics()
        rows = deployment.deployment()["processes"]
        log = deployment.log()
    assert {row["incarnation"] for row in rows} == {1}
    assert total(samples, "wholebatch:delivered_tokens_total") == 24 * len(REQUESTS)
    assert total(samples, "vllm:generation_tokens_total") == 24 * len(REQUESTS)
    assert log.count("event=bulkhead") < 30, "logged once a kind"


def test_garbage_on_every_socket_is_counted_and_harms_nobody(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment, ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        beats = stack.enter_context(
            broadcast.connect_heartbeats(context, broadcast.heartbeat_endpoint(directory_of(deployment), 0))
        )
        work = stack.enter_context(context.socket(zmq.DEALER))
        work.set(zmq.LINGER, 0)
        work.connect(wire.work_endpoint(directory_of(deployment), 0, 1))
        with steady_load(deployment, REQUESTS, 3) as clients:
            for garbage in (b"", b"\xc1", b"\x00" * 4096):
                wait_for(partial(sent, beats, garbage), "room for a heartbeat")
                work.send(garbage)
            wait_for(lambda: rejected(deployment.metrics(), "engine-0", "heartbeat") >= 3, "the count")
            wait_for(lambda: rejected(deployment.metrics(), "engine-0", "from_api_server") >= 3, "the count")
        deployment.balanced_metrics()
    assert (clients.broken, clients.different) == ([], [])
    assert clients.finished > 0


def sent(socket: zmq.Socket[bytes], payload: bytes) -> bool:
    try:
        socket.send(payload, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def test_subscribers_that_never_read_slow_nobody_down_and_lose_only_their_own_messages(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment, ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        endpoint = broadcast.snapshot_endpoint(directory_of(deployment), 0)
        for _ in range(NUM_SUBSCRIBERS):
            topics = [broadcast.TOPIC_TALLY, broadcast.TOPIC_ITERATIONS]
            socket = stack.enter_context(broadcast.make_subscriber(context, [endpoint], topics))
            socket.set(zmq.RCVHWM, 1)
        published = total(deployment.metrics(), "wholebatch:snapshots_total")
        with steady_load(deployment, REQUESTS, 4) as clients:
            wait_for(
                lambda: (
                    total(deployment.metrics(), "wholebatch:snapshots_total") > published + broadcast.SUBSCRIBER_HWM
                ),
                "more snapshots than a full queue holds",
            )
        seen = run(deployment, REQUESTS, at_a_time=6)
        samples = deployment.balanced_metrics()
    assert (clients.broken, clients.different) == ([], [])
    assert [one.completion_tokens for one in seen] == [24] * len(REQUESTS)
    assert total(samples, "wholebatch:exporter_up") == 1


@pytest.mark.parametrize(
    "room_bytes",
    [
        pytest.param(512, id="not even for the supervisor's tally"),
        pytest.param(2048, id="not for the engine's"),
        pytest.param(4096, id="not for an API server's"),
    ],
)
def test_a_full_disk_at_the_start_is_one_clear_line(tiny_model: Path, tmp_path: Path, room_bytes: int):
    program = f"""
import resource, sys
from engine.serve import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({room_bytes}, {room_bytes}))
sys.exit(main())
"""
    command = [sys.executable, "-c", program, "--model", str(tiny_model), "--port", "0", "--admin-port", "0"]
    command += ["--runtime-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("engine.serve: ")]
    assert ".tally" in said
    assert "File too large" in said
    assert not list((tmp_path / "run").iterdir())
