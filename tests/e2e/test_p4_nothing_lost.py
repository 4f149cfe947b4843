"""P4: what a process counted survives its death; a freeze loses nothing at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from metrics.catalogue import API_SERVER, ENGINE, SUPERVISOR
from tests.e2e.faults import Faults
from tests.e2e.harness import served, total
from tests.e2e.load import Ask, asks, steady_load, stream

FREEZE_S = 3.0
ROUNDS = 3


def test_whoever_saw_the_end_of_an_answer_is_counted_though_everything_died_at_once(tiny_model: Path):
    ask = Ask(tuple(range(20, 50)), 16)
    with served(tiny_model, "--api-server-count", "1") as deployment:
        for _ in range(ROUNDS):
            children = deployment.pids(API_SERVER) + deployment.pids(ENGINE)
            assert stream(deployment, ask).completion_tokens == 16
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            deployment.wait_until_restarted(children)
        samples = deployment.balanced_metrics()
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) == ROUNDS
    assert total(samples, "wholebatch:delivered_tokens_total") == ROUNDS * 16
    assert total(samples, "vllm:generation_tokens_total") == ROUNDS * 16
    assert total(samples, "vllm:request_generation_tokens_sum") == ROUNDS * 16
    assert total(samples, "wholebatch:sequences_finished_total", {"finished_reason": "length"}) == ROUNDS


def test_a_freeze_of_any_process_loses_no_request_and_changes_no_token(tiny_model: Path):
    requests = asks(24, prompt_tokens=(20, 80), max_tokens=64, vocab=250)
    with served(tiny_model, "--api-server-count", "3") as deployment:
        faults = Faults(deployment)
        with steady_load(deployment, requests, 6) as clients:
            exporter = faults.exporter()
            others = [index for index in range(3) if index != exporter]
            for role, index in ((API_SERVER, exporter), (API_SERVER, others[0]), (ENGINE, 0), (SUPERVISOR, 0)):
                faults.freeze(role, index, FREEZE_S)
                faults.settle()
        samples = deployment.balanced_metrics()
        rows = deployment.deployment()["processes"]
    assert (clients.broken, clients.different) == ([], [])
    assert {row["incarnation"] for row in rows} == {1}
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) == clients.finished
    assert total(samples, "wholebatch:delivered_tokens_total") == clients.tokens == 64 * clients.finished


def test_a_restart_of_all_api_servers_one_after_another_loses_no_request(tiny_model: Path):
    requests = asks(24, prompt_tokens=(20, 80), max_tokens=32, vocab=250)
    with served(tiny_model, "--api-server-count", "3") as deployment:
        faults = Faults(deployment)
        with steady_load(deployment, requests, 6) as clients:
            faults.restart_all()
        samples = deployment.balanced_metrics()
        rows = deployment.deployment()["processes"]
    assert (clients.broken, clients.different) == ([], [])
    assert [row["incarnation"] for row in rows if row["role"] == API_SERVER] == [2, 2, 2]
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) == clients.finished
    assert total(samples, "wholebatch:delivered_tokens_total") == clients.tokens
