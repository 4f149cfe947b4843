"""The runner: hand-made batches give the tokens they should, and what it cannot do it says in one line."""

from __future__ import annotations

import inspect
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.device.runner import TorchRunner
from engine.device.weights import ModelError
from engine.host import Share
from engine.schedule.batch import Batch, ScheduledSequence
from engine.wire.sampling import SamplingParams
from tests.greedy import Reference, load_runner, random_prompts
from tests.tiny_models import write_tiny_llama

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
BLOCK_BYTES = 2 * 16 * 2 * 2 * 16 * 4  # layers, block size, K and V, KV heads, head size, float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runner(model: Path) -> TorchRunner:
    return load_runner(model, num_blocks=128)


def load(path: Path, *, cache: CacheConfig | None = None, **options: object) -> TorchRunner:
    """With one thread; options of ModelConfig and of `load`."""
    of_load = inspect.signature(TorchRunner.load).parameters
    given = {name: options.pop(name) for name in list(options) if name in of_load}
    config = ModelConfig(path=str(path), **options)  # type: ignore[arg-type]
    return TorchRunner.load(config, cache or CacheConfig(), SchedulerConfig(), num_threads=1, **given)  # type: ignore[arg-type]


def sequence(tokens: list[int], start: int, num_tokens: int, blocks: list[int], number: int = 0) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=number,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        start=start,
        num_tokens=num_tokens,
        block_table=blocks,
        sampling=GREEDY,
    )


def run(runner: TorchRunner, *sequences: ScheduledSequence) -> list[int]:
    return [found.token_id for found in runner.run(Batch(list(sequences)))]


def next_token(reference: Reference, tokens: list[int]) -> int:
    return reference.continue_greedily(tokens, 1).token_ids[0]


def test_decodes_and_chunks_of_several_sequences_mix_in_one_batch(model: Path, runner: TorchRunner):
    reference = Reference(model)
    one, two, three, four = random_prompts((20, 50, 33, 7), runner.vocab_size)
    blocks = [[9, 3], [5, 1, 7, 0], [2, 8, 4], [6]]
    assert run(runner, sequence(one, 0, 19, blocks[0]), sequence(two, 0, 16, blocks[1])) == []
    assert run(runner, sequence(two, 16, 10, blocks[1]), sequence(three, 0, 32, blocks[2])) == []
    tokens = run(
        runner,
        sequence(one, 19, 1, blocks[0]),  # decode
        sequence(two, 26, 10, blocks[1]),  # a chunk in the middle: no token
        sequence(four, 0, 7, blocks[3]),  # a whole prompt
        sequence(three, 32, 1, blocks[2]),  # decode, on a block's first slot
    )
    assert tokens == [next_token(reference, prompt) for prompt in (one, four, three)]
    assert run(runner, sequence(two, 36, 14, blocks[1])) == [next_token(reference, two)]


def test_a_block_table_may_be_longer_than_what_is_computed(model: Path, runner: TorchRunner):
    (prompt,) = random_prompts((20,), runner.vocab_size, seed=5)
    assert run(runner, sequence(prompt, 0, 20, [1, 2, 3, 4])) == [next_token(Reference(model), prompt)]


def test_blocks_can_be_shared_between_sequences(model: Path, runner: TorchRunner):
    reference = Reference(model)
    (prompt,) = random_prompts((16,), runner.vocab_size, seed=6)
    a, b = [*prompt, 5, 6, 7], [*prompt, 400, 3]
    run(runner, sequence(prompt, 0, 16, [11]))
    tokens = run(runner, sequence(a, 16, 3, [11, 12]), sequence(b, 16, 2, [11, 13]))
    assert tokens == [next_token(reference, a), next_token(reference, b)]


def test_logprobs_come_with_the_token(runner: TorchRunner):
    (prompt,) = random_prompts((9,), runner.vocab_size)
    asked = sequence(prompt, 0, 9, [0])
    asked.sampling = replace(GREEDY, logprobs=3)
    ((token, logprobs, _),) = runner.run(Batch([asked]))
    assert logprobs is not None
    assert logprobs.rank == 1
    assert logprobs.top[0] == (token, logprobs.logprob)
    assert len(logprobs.top) == 3


def test_what_it_says_of_itself(runner: TorchRunner):
    assert (runner.num_blocks, runner.block_size, runner.max_model_len) == (128, 16, 2048)
    assert (runner.vocab_size, runner.eos_token_ids, runner.cache_dtype) == (512, frozenset({1}), "float32")


# --- how much ---


def test_bytes_for_the_cache_become_blocks(model: Path):
    cache = CacheConfig(kv_cache_memory_bytes=150 * BLOCK_BYTES + 7)
    assert load(model, cache=cache).num_blocks == 150


def test_the_default_cache_is_no_larger_than_can_be_used(model: Path):
    assert load(model).num_blocks <= 256 * 128


def test_the_default_cache_takes_a_quarter_of_the_engines_share_of_memory(model: Path):
    assert load(model, host_share=Share(1, 600 * BLOCK_BYTES)).num_blocks == 150


def test_what_is_fixed_by_an_earlier_engine_is_taken_as_it_is(model: Path):
    runner = load(model, cache=CacheConfig(num_gpu_blocks_override=500), max_model_len_fixed=160, num_blocks_fixed=10)
    assert (runner.num_blocks, runner.max_model_len) == (10, 160)


def test_reserving_a_cache_costs_no_memory_until_it_is_written(model: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(model, cache=CacheConfig(kv_cache_memory_bytes=2**31))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: an eighth of it


def test_a_cache_that_holds_no_whole_sequence_says_what_to_change(model: Path):
    with pytest.raises(ModelError, match=r"--max-model-len.*--num-gpu-blocks-override 128") as caught:
        load(model, cache=CacheConfig(num_gpu_blocks_override=127))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="holds 0 tokens"):
        load(model, cache=CacheConfig(kv_cache_memory_bytes=10))


def test_a_length_beyond_the_models_is_refused(model: Path):
    assert load(model, max_model_len=2048).max_model_len == 2048
    with pytest.raises(ModelError, match="max_model_len 2049"):
        load(model, max_model_len=2049)
    with pytest.raises(ModelError, match="max_model_len 4096"):
        load(model, max_model_len_fixed=4096)


def test_a_sliding_window_caps_the_length_and_says_so(tmp_path: Path):
    path = write_tiny_llama(tmp_path, family="mistral", sliding_window=512)
    lines: list[str] = []
    assert load(path, progress=lines.append).max_model_len == 512
    assert any("sliding window of 512" in line for line in lines)
    with pytest.raises(ModelError, match="sliding window of 512"):
        load(path, max_model_len=1024)


@pytest.mark.parametrize("option", [{"dtype": "int3"}, {"device": "tpu"}])
def test_an_unknown_option_is_refused_by_name(model: Path, option: dict[str, Any]):
    with pytest.raises(ModelError, match=next(iter(option.values()))):
        load(model, **option)


def test_int8_says_what_it_is_not_for(model: Path):
    with pytest.raises(ModelError, match="not with dtype bfloat16"):
        load(model, quantization="int8", dtype="bfloat16")
    with pytest.raises(ModelError, match="int3"):
        load(model, quantization="int3")


def test_the_log_says_how_weights_are_held(model: Path):
    lines: list[str] = []
    runner = load(model, quantization="int8", progress=lines.append)
    assert "dtype float32, quantization int8, on cpu" in lines
    assert runner.cache_dtype == "float32"


def test_half_precision_weights_and_cache(model: Path):
    runner = load(model, dtype="bfloat16", cache=CacheConfig(num_gpu_blocks_override=128))
    assert runner.cache_dtype == "bfloat16"
    assert len(run(runner, sequence([1, 2, 3], 0, 3, [4]))) == 1


def test_loading_reports_its_progress(model: Path):
    lines: list[str] = []
    load(model, progress=lines.append)
    assert lines[0].startswith("loading")
    assert any("2 of 2 layers" in line for line in lines)
    assert any("KV cache" in line for line in lines)
    assert lines[-1].startswith("computing first batches")


@pytest.mark.parametrize(("few_weights", "num_threads", "num_used"), [(10**9, None, 1), (0, None, 2), (10**9, 3, 3)])
def test_threads_are_the_callers_choice_or_suit_the_model(
    monkeypatch: pytest.MonkeyPatch, model: Path, few_weights: int, num_threads: int | None, num_used: int
):
    monkeypatch.setattr("engine.device.runner._FEW_WEIGHTS", few_weights)
    before = torch.get_num_threads()
    try:
        config = ModelConfig(path=str(model))
        TorchRunner.load(config, CacheConfig(), SchedulerConfig(), num_threads=num_threads, host_share=Share(2, 2**30))
        assert torch.get_num_threads() == num_used
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_hidden_states_that_are_not_finite_give_faults_and_no_tokens(tmp_path: Path, quantization: str | None):
    path = write_tiny_llama(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(math.nan)
    save_file(weights, path / "model.safetensors")
    broken = load(path, quantization=quantization, max_model_len=64)
    rows = [
        replace(sequence([1, 2, 3], 0, 3, [row], number=row), sampling=sampling)
        for row, sampling in enumerate((GREEDY, replace(GREEDY, temperature=1.0), replace(GREEDY, logprobs=2)))
    ]
    assert all(found.fault is not None for found in broken.run(Batch(rows)))


def test_end_tokens_beyond_the_vocabulary_are_ignored_and_said(tmp_path: Path):
    said: list[str] = []
    path = write_tiny_llama(tmp_path, eos_token_id=[1, 70_000])
    runner = load(path, max_model_len=64, progress=said.append)
    assert runner.eos_token_ids == {1}
    assert "end tokens [70000] are beyond the vocabulary: ignored" in said
