"""Greedy output equals transformers', token for token, however the engine batches, chunks, caches and preempts.

The full run over the default model is `python -m tests.benchmarks.greedy_equality`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import SchedulerConfig
from engine.device.runner import TorchRunner
from tests.greedy import Comparison, Engine, Expected, Reference, export_gguf, greedily, load_runner, random_prompts
from tests.tiny_models import FAMILIES, write_tiny_llama

LENGTHS = (5, 16, 17, 31, 64, 100, 257, 400, 1, 2, 3, 48)
NUM_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """One model with what is expected of it."""

    runner: TorchRunner
    prompts: list[list[int]]
    expected: list[Expected]

    def check(self, actual: list[list[int]]) -> None:
        comparison = Comparison()
        for prompt, expected, tokens in zip(self.prompts, self.expected, actual, strict=True):
            comparison.add(f"prompt of {len(prompt)}", expected, tokens)
        assert not comparison.faults, comparison.faults
        assert comparison.num_equal >= len(self.prompts) // 2, comparison.ties


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = write_tiny_llama(tmp_path_factory.mktemp("model"), family=request.param, seed=1)
    runner = load_runner(directory)
    reference = Reference(directory)
    prompts = random_prompts(LENGTHS, runner.vocab_size)
    return Case(runner, prompts, [reference.continue_greedily(prompt, NUM_TOKENS) for prompt in prompts])


def test_alone(tiny: Case):
    engine = Engine(tiny.runner)
    tiny.check([engine.generate([prompt], greedily(NUM_TOKENS))[0] for prompt in tiny.prompts])


def test_in_one_batch(tiny: Case):
    tiny.check(Engine(tiny.runner).generate(tiny.prompts, greedily(NUM_TOKENS)))


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 512])
def test_in_chunks(tiny: Case, chunk: int):
    engine = Engine(tiny.runner, SchedulerConfig(long_prefill_token_threshold=chunk))
    tiny.check(engine.generate(tiny.prompts, greedily(NUM_TOKENS)))


def test_under_a_small_token_budget(tiny: Case):
    engine = Engine(tiny.runner, SchedulerConfig(max_num_batched_tokens=40))
    tiny.check(engine.generate(tiny.prompts, greedily(NUM_TOKENS)))


def test_with_a_prefix_cache_cold_and_warm(tiny: Case):
    engine = Engine(tiny.runner, SchedulerConfig(long_prefill_token_threshold=64), caches=True)
    for _ in range(2):
        tiny.check(engine.generate(tiny.prompts, greedily(NUM_TOKENS)))


@pytest.mark.parametrize("caches", [False, True])
def test_when_few_blocks_force_preemption(tiny: Case, caches: bool):
    engine = Engine(tiny.runner, num_blocks=34, caches=caches)
    tiny.check(engine.generate(tiny.prompts, greedily(NUM_TOKENS)))
    assert engine.num_preemptions > 0


def test_int8_says_the_same_alone_in_a_batch_in_chunks_and_preempted(tmp_path: Path):
    """Each row is quantised by itself: what it gives depends on no batch and no schedule."""
    runner = load_runner(write_tiny_llama(tmp_path, seed=1), quantization="int8")
    prompts, sampling = random_prompts(LENGTHS, runner.vocab_size), greedily(NUM_TOKENS)
    alone = [Engine(runner).generate([prompt], sampling)[0] for prompt in prompts]
    few_blocks = Engine(runner, num_blocks=34)
    assert few_blocks.generate(prompts, sampling) == alone
    assert few_blocks.num_preemptions > 0
    assert Engine(runner).generate(prompts, sampling) == alone
    assert Engine(runner, SchedulerConfig(long_prefill_token_threshold=16)).generate(prompts, sampling) == alone


def test_the_default_model_says_what_transformers_says(default_model: Path, tmp_path: Path):
    directory = export_gguf(default_model, tmp_path / "exported")
    reference = Reference(directory)
    runner = load_runner(default_model, num_blocks=128, max_model_len=1024)
    prompts = random_prompts((5, 40, 150), runner.vocab_size)
    case = Case(runner, prompts, [reference.continue_greedily(prompt, 12) for prompt in prompts])
    case.check(Engine(runner, SchedulerConfig(long_prefill_token_threshold=64)).generate(prompts, greedily(12)))
