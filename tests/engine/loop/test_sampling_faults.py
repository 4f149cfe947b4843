"""A model that computes NaN for some prompts, in an engine without sockets: their sequences end, nothing else does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.device.runner import TorchRunner
from tests.engine.loop.test_conservation import check_laws
from tests.engine.workload import MAX_MODEL_LEN, Engine, Job, Setup
from tests.greedy import load_runner
from tests.tiny_models import write_tiny_llama

SETUP = Setup()
POISON = 13  # the token whose embedding is NaN
SOUND = tuple(
    Job(prompt=tuple(range(20 + row, 25 + 3 * row)), max_tokens=12, ignore_eos=True, api_server=row % 2)
    for row in range(4)
)
POISONED = (Job(prompt=(1, 2, POISON), arrives=2), Job(prompt=(POISON,) * 17, arrives=5, api_server=1))


def load(path: Path) -> TorchRunner:
    return load_runner(path, num_blocks=SETUP.num_blocks, block_size=SETUP.block_size, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    path = write_tiny_llama(tmp_path_factory.mktemp("poisoned"))
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = math.nan
    save_file(weights, path / "model.safetensors")
    return load(path)


@pytest.fixture(params=[0.0, 1.0])
def temperature(request: pytest.FixtureRequest) -> float:
    """Greedy sequences have no logits computed, others have."""
    return float(request.param)


def run(runner: TorchRunner, temperature: float, *jobs: Job) -> Engine:
    engine = Engine(SETUP)
    engine.core._runner = runner
    engine.run([replace(job, temperature=temperature) for job in jobs])
    check_laws(engine)
    return engine


def test_requests_answered_with_nan_end_by_error_and_the_others_never_notice(runner: TorchRunner, temperature: float):
    alone = run(runner, temperature, *SOUND)
    together = run(runner, temperature, *SOUND, *POISONED)
    for row in range(len(SOUND)):
        assert together.output(row) == alone.output(row) != []
    ends = {request_id: finish for (_, request_id), finish in together.finishes.items()}
    assert [ends[row].reason for row in range(6)] == ["length"] * 4 + ["error"] * 2
    assert all("not finite" in (ends[row].message or "") for row in (4, 5))
    assert [together.output(row) for row in (4, 5)] == [[], []]
    assert together.value("wholebatch:sampling_faults_total") == 2
    assert together.value("wholebatch:sequences_finished_total", finished_reason="error") == 2
    assert together.pool.num_free == SETUP.num_blocks


def test_a_model_of_nan_fails_every_request_and_the_engine_goes_on(tmp_path: Path, temperature: float):
    path = write_tiny_llama(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, path / "model.safetensors")
    engine = run(load(path), temperature, *SOUND)
    assert {finish.reason for finish in engine.finishes.values()} == {"error"}
    assert engine.value("wholebatch:sampling_faults_total") == len(SOUND)
    assert engine.value("vllm:generation_tokens_total") == 0
