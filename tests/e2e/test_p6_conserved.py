"""P6: after each kind of death the books close: every law is exact, what was open is under its stated reason."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metrics.catalogue import API_SERVER, ENGINE
from metrics.catalogue.metric import AUDIT_LAWS
from tests.e2e.faults import Faults
from tests.e2e.harness import ROOT, Samples, Served, served, total, wait_for
from tests.e2e.load import BROKEN, Ask, BrokenRequestError, asks, run, stream

LONG = Ask(tuple(range(20, 60)), 1800)
SUBMITTED = "wholebatch:sequences_submitted_total"
ENDED = "wholebatch:sequences_ended_total"
FINISHED = "wholebatch:sequences_finished_total"


@pytest.fixture
def deployment(tiny_model: Path) -> Iterator[Served]:
    """One API server and one engine: it is known whose request it is that runs."""
    with served(tiny_model, "--api-server-count", "1") as one:
        run(one, asks(4, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=4)
        yield one


@contextmanager
def long_request(deployment: Served) -> Iterator[list[Exception]]:
    """One that has tokens already, inside; on leaving it has ended: what the client was told."""
    told: list[Exception] = []

    def ask() -> None:
        try:
            stream(deployment, LONG)
        except BROKEN as error:
            told.append(error)

    before = total(deployment.idle_metrics(), "wholebatch:delivered_tokens_total")
    client = threading.Thread(target=ask)
    client.start()
    wait_for(lambda: total(deployment.metrics(), "wholebatch:delivered_tokens_total") > before, "a token")
    yield told
    client.join(120)
    assert not client.is_alive(), "the client hangs"


def killed(role: str) -> Callable[[Served], None]:
    def kill(deployment: Served) -> None:
        victims = deployment.pids(role)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        deployment.wait_until_restarted(victims)

    return kill


def audit(deployment: Served) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "metrics.audit", "--url", deployment.url, "--wait", "60"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def assert_audited(deployment: Served, samples: Samples) -> None:
    """What the command says, and what the supervisor has found."""
    done = audit(deployment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "idle: laws are exact" in done.stdout
    own = {labels: value for (name, labels), value in samples.items() if name == "wholebatch:audit_violations_total"}
    assert own == {frozenset({("process", "supervisor-0"), ("law", law)}): 0.0 for law in AUDIT_LAWS}


def test_the_requests_and_tokens_of_a_killed_api_server_are_lost_with_it(deployment: Served):
    with long_request(deployment) as told:
        killed(API_SERVER)(deployment)
    assert isinstance(told[0], BrokenRequestError | ConnectionError | http.client.HTTPException)
    samples = deployment.balanced_metrics()
    assert total(samples, ENDED, {"finished_reason": "server_lost"}) == 1
    assert total(samples, FINISHED, {"finished_reason": "abort"}) == 1
    assert total(samples, SUBMITTED) == total(samples, "wholebatch:sequences_accepted_total") == 5
    sent = total(samples, "wholebatch:tokens_sent_total")
    assert sent == total(samples, "vllm:generation_tokens_total")
    assert sent < 4 * 8 + LONG.max_tokens
    lost = total(samples, "wholebatch:lost_tokens_total", {"reason": "server_lost"})
    lost += total(samples, "wholebatch:undelivered_tokens_total", {"reason": "server_lost"})
    assert sent - total(samples, "wholebatch:delivered_tokens_total") == lost
    assert_audited(deployment, samples)


def test_the_requests_of_a_killed_engine_end_by_error_and_the_client_is_told(deployment: Served):
    with long_request(deployment) as told:
        killed(ENGINE)(deployment)
    assert "the engine ended while it worked on the request" in str(told[0])
    samples = deployment.balanced_metrics()
    assert total(samples, ENDED, {"finished_reason": "error"}) == 1
    assert total(samples, FINISHED, {"finished_reason": "error"}) == 1
    assert total(samples, "vllm:request_success_total", {"finished_reason": "error"}) == 1
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) == 4
    assert total(samples, "wholebatch:lost_tokens_total", {"reason": "server_lost"}) == 0
    run(deployment, asks(4, prompt_tokens=(20, 40), max_tokens=8, vocab=250), at_a_time=4)
    after = deployment.balanced_metrics()
    assert total(after, "vllm:request_success_total", {"finished_reason": "length"}) == 8
    assert_audited(deployment, after)


def test_the_books_close_when_every_child_is_killed_at_once(deployment: Served):
    with long_request(deployment):
        victims = deployment.pids(API_SERVER) + deployment.pids(ENGINE)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        deployment.wait_until_restarted(victims)
    samples = deployment.balanced_metrics()
    assert total(samples, ENDED, {"finished_reason": "server_lost"}) == 1
    assert total(samples, FINISHED, {"finished_reason": "error"}) == 1
    assert_audited(deployment, samples)


def test_a_process_that_is_frozen_for_too_long_is_killed_and_the_books_close(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "1", "--freeze-timeout", "2") as deployment:
        for role in (API_SERVER, ENGINE):
            victims = deployment.pids(role)
            with long_request(deployment):
                os.kill(victims[0], signal.SIGSTOP)
                wait_for(lambda: deployment.log().count("why='frozen'") == 1 + (role == ENGINE), "the kill")  # noqa: B023
                deployment.wait_until_restarted(victims)
        samples = deployment.balanced_metrics()
        faults = Faults(deployment)
        assert [faults.row(role, 0)["incarnation"] for role in (API_SERVER, ENGINE)] == [2, 2]
    assert total(samples, ENDED, {"finished_reason": "server_lost"}) == 1
    assert total(samples, ENDED, {"finished_reason": "error"}) == 1


def test_an_audit_of_nothing_says_so():
    command = [sys.executable, "-m", "metrics.audit", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
