"""Starting, ending, and what happens to requests and counters when a process dies in between."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.e2e.harness import Samples, Served, served, total, wait_for
from tests.e2e.load import Ask, asks, run, stream

PROMPT = tuple(range(20, 60))


def fallen(earlier: Samples, later: Samples) -> dict[object, tuple[float, float]]:
    """Counters and buckets that are lower, or gone."""
    ends = ("_total", "_bucket", "_count")
    ours = {k: v for k, v in earlier.items() if k[0].endswith(ends) and k[0].startswith(("vllm:", "wholebatch:"))}
    return {k: (v, later.get(k, 0.0)) for k, v in ours.items() if later.get(k, 0.0) < v}


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_and_leaves_nothing(tiny_model: Path, ending: signal.Signals):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        family = psutil.Process(deployment.process.pid).children(recursive=True)
        assert len(family) == 3
        assert len(list(deployment.runtime_directory.iterdir())) == 1
        deployment.process.send_signal(ending)
        assert deployment.process.wait(30) == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        assert not list(deployment.runtime_directory.iterdir())
        assert "Traceback" not in deployment.log()


def test_a_request_that_runs_when_the_end_comes_is_answered(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        answers: list[int | None] = []
        client = threading.Thread(target=lambda: answers.append(stream(deployment, Ask(PROMPT, 300)).completion_tokens))
        client.start()
        wait_for(lambda: total(deployment.metrics(), "vllm:generation_tokens_total") > 0, "a token")
        deployment.process.send_signal(signal.SIGTERM)
        client.join()
        assert answers == [300]


def test_a_signal_to_every_process_drains_as_one_to_the_supervisor_does(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        answers: list[int | None] = []
        client = threading.Thread(target=lambda: answers.append(stream(deployment, Ask(PROMPT, 300)).completion_tokens))
        client.start()
        wait_for(lambda: total(deployment.metrics(), "vllm:generation_tokens_total") > 0, "a token")
        supervisor = psutil.Process(deployment.process.pid)
        for process in (*supervisor.children(recursive=True), supervisor):
            process.send_signal(signal.SIGTERM)
        client.join()
        assert answers == [300]
        assert deployment.process.wait(30) == 0


def test_while_it_drains_nobody_is_let_in_and_what_outlasts_the_drain_ends_with_an_error_event(tiny_model: Path):
    flags = ("--drain-timeout", "3", "--max-model-len", "2048")
    with served(tiny_model, "--api-server-count", "2", *flags) as deployment:
        lines: list[str] = []
        client = threading.Thread(target=lambda: lines.extend(endless(deployment)))
        client.start()
        wait_for(lambda: lines or total(deployment.metrics(), "vllm:generation_tokens_total") > 0, "a token")
        os.kill(deployment.pids("engine")[0], signal.SIGSTOP)  # so that it does outlast the drain
        try:
            deployment.process.send_signal(signal.SIGTERM)
            wait_for(lambda: is_refused(deployment), "a connection that is refused")
            client.join()
        finally:
            for process in psutil.Process(deployment.process.pid).children():
                process.send_signal(signal.SIGCONT)
        assert deployment.process.wait(30) == 0
    assert '"code":"engine_lost"' in lines[-1]


def endless(deployment: Served) -> list[str]:
    """The events of a stream that goes on as long as it may."""
    host, port = urlsplit(deployment.url).hostname, urlsplit(deployment.url).port
    body = {"prompt": list(PROMPT), "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with closing(http.client.HTTPConnection(str(host), port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            return [line.decode().strip() for line in response if line.startswith(b"data: ")]


def is_refused(deployment: Served) -> bool:
    parts = urlsplit(deployment.url)
    try:
        socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_children_end_when_the_supervisor_is_killed(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        family = psutil.Process(deployment.process.pid).children(recursive=True)
        deployment.process.kill()
        deployment.process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def test_a_killed_engine_comes_back_its_waiting_requests_get_an_error_and_the_books_close(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        run(deployment, asks(6, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=6)
        before = deployment.idle_metrics()
        results: list[tuple[int, object]] = []
        body = {"prompt": list(PROMPT), "max_tokens": 1500, "ignore_eos": True}
        client = threading.Thread(target=lambda: results.append(deployment.post("/v1/completions", body)))
        client.start()
        done = total(before, "vllm:generation_tokens_total")
        wait_for(lambda: total(deployment.metrics(), "vllm:generation_tokens_total") > done, "a token")
        victim = deployment.pids("engine")[0]
        os.kill(victim, signal.SIGKILL)
        client.join()
        assert results[0][0] == 503
        wait_for(lambda: deployment.pids("engine")[0] != victim, "a new engine")
        after = deployment.idle_metrics()
        assert not fallen(before, after)
        run(deployment, asks(6, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=6)
        samples = deployment.idle_metrics()
    generated = total(samples, "vllm:generation_tokens_total")
    received = total(samples, "wholebatch:received_tokens_total")
    assert generated == received + total(samples, "wholebatch:lost_tokens_total")
    given = total(samples, "wholebatch:delivered_tokens_total") + total(samples, "wholebatch:undelivered_tokens_total")
    assert received == given
    assert total(samples, "wholebatch:sequences_accepted_total") == total(
        samples, "wholebatch:sequences_finished_total"
    )
    assert total(samples, "wholebatch:sequences_submitted_total") == total(samples, "wholebatch:sequences_ended_total")
