"""A whole vLLM with our part in it: two engine cores, two API servers, real requests, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.export_model import save_tokenizer, write_tiny_model
from tests.benchmarks.sides import VLLM_WITH_US, vllm
from tests.vllm.logged import LOG_VARIABLE

NUM_REQUESTS = 24
PROMPT = 100
GENERATED = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "iterations"


@pytest.fixture(scope="module")
def url(model: Path, log: Path) -> Iterator[str]:
    flags = (
        "--data-parallel-size",
        "2",
        "--api-server-count",
        "2",
        "--enforce-eager",
        "--max-num-batched-tokens",
        "256",
    )
    named = ("--scheduler-cls", "tests.vllm.logged.Logged")
    more = {LOG_VARIABLE: str(log), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with vllm(Path(sys.prefix), model, *flags, *named, program=VLLM_WITH_US, more=more) as side:
        yield side.url


def fetch(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


def samples(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(fetch(f"{url}/metrics")):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


def by_engine(url: str, name: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for (found, labels), value in samples(url).items():
        if found == name:
            engine = dict(labels)["engine"]
            totals[engine] = totals.get(engine, 0) + value
    return totals


def ask(url: str, number: int) -> None:
    prompt = [(number * 31 + position) % 4000 + 10 for position in range(PROMPT)]
    body = {"model": "model", "prompt": prompt, "max_tokens": GENERATED, "ignore_eos": True, "temperature": 0}
    answer = json.loads(fetch(f"{url}/v1/completions", body))
    assert answer["usage"]["completion_tokens"] == GENERATED


def test_each_engine_cores_iterations_are_whole_whoever_answers(url: str, log: Path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, [url] * NUM_REQUESTS, range(NUM_REQUESTS)))
    logged = {index: [int(line) for line in log.with_suffix(f".{index}").read_text().split()] for index in "01"}
    name = "wholebatch:iteration_scheduled_tokens"
    for _ in range(10):  # both API servers take their turns
        assert by_engine(url, f"{name}_count") == {index: len(lines) for index, lines in logged.items()}
        assert by_engine(url, f"{name}_sum") == {index: sum(lines) for index, lines in logged.items()}
        assert by_engine(url, "vllm:iteration_tokens_total_count") == {i: len(lines) for i, lines in logged.items()}
    tokens = by_engine(url, "vllm:iteration_tokens_total_sum")
    assert sum(tokens.values()) == NUM_REQUESTS * (PROMPT + GENERATED)
    assert min(tokens.values()) > 0


def test_everything_else_is_vllms_and_every_process_is_there(url: str):
    found = samples(url)
    names = {name for name, _ in found}
    assert {"vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_count"} <= names
    processes = {dict(labels)["process"] for name, labels in found if name == "process_resident_memory_bytes"}
    assert processes == {"engine-0", "engine-1", "api-server-0", "api-server-1"}
    errors = [value for (name, _), value in found.items() if name == "wholebatch:vllm_hook_errors_total"]
    assert errors
    assert not any(errors)


def test_other_paths_are_answered_as_ever(url: str):
    assert json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"] == "model"
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{url}/v1/completions", {"model": "no such model", "prompt": "x"})
    assert refused.value.code == 404


def test_without_vllms_command_it_says_what_it_is_for():
    command = [sys.executable, "-m", VLLM_WITH_US, "bench"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_its_directory_goes_with_it(model: Path, tmp_path: Path):
    runtime = Path(f"/dev/shm/wholebatch-{os.getuid()}")
    before = set(runtime.glob("*")) if runtime.exists() else set()
    with vllm(Path(sys.prefix), model, "--enforce-eager", program=VLLM_WITH_US) as side:
        made = set(runtime.glob("*")) - before
        assert len(made) == 1
        ask(side.url, 1)
        assert by_engine(side.url, "vllm:iteration_tokens_total_count") == {"0": GENERATED}
        assert side.pid is not None
        os.kill(side.pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while set(runtime.glob("*")) & made:
            assert time.monotonic() < deadline, "the directory is still there"
            time.sleep(0.1)
