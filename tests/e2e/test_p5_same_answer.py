"""P5: the public port means the whole deployment, whichever API server answers; admin ports mean one process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.harness import Samples, Served, served, total
from tests.e2e.load import asks, run, stream

MOVING = (
    "process_",
    "python_",
    "wholebatch:snapshots_total",
    "wholebatch:stale_snapshots",
    "wholebatch:iteration_stage",
)


def settled(samples: Samples) -> Samples:
    """Without what moves on an idle deployment, and without what `process` labels."""
    return {key: value for key, value in samples.items() if not key[0].startswith(MOVING)}


def admin_urls(deployment: Served) -> list[str]:
    return [p["admin_url"] for p in deployment.deployment()["processes"] if p["role"] == "api-server"]


def test_every_api_server_gives_the_same_answer_and_the_admin_ports_sum_to_it(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "4", "-dp", "2") as deployment:
        run(deployment, asks(24, prompt_tokens=(20, 60), max_tokens=8, vocab=250), at_a_time=12)
        whole = settled(deployment.idle_metrics())
        for _ in range(12):
            assert settled(deployment.metrics()) == whole
        parts = [settled(deployment.metrics(url + "/metrics")) for url in admin_urls(deployment)]
    for (name, labels), value in whole.items():
        if name.endswith(("_total", "_bucket", "_sum", "_count")) and "process" not in dict(labels):
            summed = sum(part.get((name, labels), 0.0) for part in parts)
            assert abs(summed - value) <= 1e-9 * max(1.0, abs(value)), (name, labels)
    for engine in ("0", "1"):
        holders = [
            p for p in parts if any(n == "wholebatch:iterations_total" and ("engine", engine) in k for n, k in p)
        ]
        assert len(holders) == 1


def test_both_engines_work_and_each_has_its_own_series(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2", "-dp", "2") as deployment:
        run(deployment, asks(24, prompt_tokens=(20, 60), max_tokens=16, vocab=250), at_a_time=12)
        samples = deployment.idle_metrics()
        one = deployment.metrics("/metrics/engine/1")
    for engine in ("0", "1"):
        assert total(samples, "wholebatch:sequences_finished_total", {"engine": engine}) > 0
    assert total(samples, "vllm:generation_tokens_total") == 24 * 16
    assert total(one, "vllm:generation_tokens_total", {"engine": "1"}) > 0
    assert total(one, "vllm:generation_tokens_total", {"engine": "0"}) == 0


def test_load_is_that_of_the_whole_deployment(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "3") as deployment:
        stream(deployment, asks(1, prompt_tokens=(20, 20), max_tokens=4, vocab=250)[0])
        deployment.idle_metrics()
        assert [json.loads(deployment.get("/load"))["server_load"] for _ in range(6)] == [0] * 6
