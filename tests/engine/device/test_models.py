"""The decoder against transformers' logits, and the kernels against their definitions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.device.kernels import kernels_for
from engine.device.kernels.attention import gather as numba_gather
from engine.device.kernels.interface import FlatBatch, Kernels
from engine.device.kernels.numba_ops import NumbaKernels
from engine.device.kernels.torch_ops import TorchKernels
from engine.device.kernels.torch_ops import gather as torch_gather
from engine.device.models.llama import FlatInput, LlamaModel
from engine.device.weights.load import open_checkpoint
from engine.device.weights.rotation import RotatedCheckpoint, cosine_basis
from tests.greedy import Reference, random_prompts
from tests.tiny_models import FAMILIES, write_tiny_llama

CPU = torch.device("cpu")
TORCH, NUMBA = TorchKernels(CPU), NumbaKernels()
with_kernels = pytest.mark.parametrize("kernels", [TORCH, NUMBA], ids=["torch", "numba"])
BLOCK_SIZE = 4


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, quantization: str | None = None, is_rotated: bool = False
) -> LlamaModel:
    checkpoint = open_checkpoint(str(path))
    return LlamaModel(
        RotatedCheckpoint(checkpoint) if is_rotated else checkpoint,
        kernels_for(CPU, dtype),
        dtype=dtype,
        device=CPU,
        max_model_len=512,
        progress=lambda line: None,
        quantization=quantization,
    )


def logits_of_prompts(model: LlamaModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """All positions' logits, the prompts run as one flat batch in blocks of no particular order."""
    spec = model.spec
    tables, slots, free = [], [], list(range(200))
    random.Random(0).shuffle(free)
    for prompt in prompts:
        table = [free.pop() for _ in range(-(-len(prompt) // BLOCK_SIZE))]
        tables.append(table)
        slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(len(prompt))]
    lengths = [len(prompt) for prompt in prompts]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    caches = torch.zeros(spec.num_layers, 200, BLOCK_SIZE, 2, spec.num_kv_heads, spec.head_dim, dtype=model.dtype)
    batch = FlatBatch(query_starts=starts, lengths=lengths, block_tables=tables)
    inputs = FlatInput(
        token_ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.tensor([position for length in lengths for position in range(length)]),
        slots=torch.tensor(slots),
        sampled_rows=None,
        plan=kernels_for(CPU, model.dtype).plan(batch, BLOCK_SIZE),
    )
    return list(model.head.logits(model.forward(inputs, caches)).split(lengths))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_references(tmp_path: Path, family: str):
    directory = write_tiny_llama(tmp_path, family=family, seed=3)
    reference = Reference(directory)
    prompts = random_prompts((1, 5, 300, 16), 512, seed=1)
    for prompt, logits in zip(prompts, logits_of_prompts(load_model(directory), prompts), strict=True):
        torch.testing.assert_close(logits, reference.logits(prompt), rtol=1e-3, atol=1e-3)


def test_linear_rope_scaling_is_the_references(tmp_path: Path):
    directory = write_tiny_llama(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    (prompt,) = random_prompts((100,), 512)
    (logits,) = logits_of_prompts(load_model(directory), [prompt])
    torch.testing.assert_close(logits, Reference(directory).logits(prompt), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_near_float32(tmp_path: Path):
    directory = write_tiny_llama(tmp_path)
    (prompt,) = random_prompts((50,), 512)
    (exact,) = logits_of_prompts(load_model(directory), [prompt])
    (near,) = logits_of_prompts(load_model(directory, torch.bfloat16), [prompt])
    assert near.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, near).min() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_model_is_the_same_model(tmp_path: Path, family: str):
    """With norms whose weights are not all 1, as a trained model's are."""
    directory = write_tiny_llama(tmp_path, family=family)
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] += torch.rand(tensors[name].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    (prompt,) = random_prompts((50,), 512)
    (exact,) = logits_of_prompts(load_model(directory), [prompt])
    (rotated,) = logits_of_prompts(load_model(directory, is_rotated=True), [prompt])
    torch.testing.assert_close(rotated, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 64, 576])
def test_the_cosine_basis_is_orthogonal(size: int):
    basis = cosine_basis(size)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_near_float32(tmp_path: Path, family: str):
    directory = write_tiny_llama(tmp_path, family=family)
    (prompt,) = random_prompts((50,), 512)
    (exact,) = logits_of_prompts(load_model(directory), [prompt])
    (near,) = logits_of_prompts(load_model(directory, quantization="int8", is_rotated=True), [prompt])
    assert torch.nn.functional.cosine_similarity(exact, near).min() > 0.98


# --- attention ---


@dataclass(frozen=True)
class Part:
    """One sequence: what is in the cache before, and what is new."""

    start: int
    num_tokens: int


parts = st.lists(st.builds(Part, st.integers(0, 70), st.sampled_from((1, 1, 1, 2, 5, 17))), min_size=1, max_size=12)


def naive_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """q (rows, heads, d) of one sequence, keys and values (positions, kv heads, d); one row and head at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen_keys = keys[: start + row + 1, head // group].double()
            weights = (seen_keys @ q[row, head].double() * q.shape[2] ** -0.5).softmax(0)
            out[row, head] = weights @ values[: start + row + 1, head // group].double()
    return out


@dataclass(frozen=True)
class Shape:
    """Of a model's attention and its cache."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    block_size: int = BLOCK_SIZE


def check_attention(kernels: Kernels, parts: list[Part], shape: Shape, seed: int, *, before: float = torch.nan) -> None:
    """Whatever else the cache holds (`before`: a faulted sequence's NaN, too), and wherever a sequence's blocks lie."""
    num_heads, num_kv_heads, head_dim, block_size = (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
    )
    generator = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-(p.start + p.num_tokens) // block_size) for p in parts) + 3
    cache = torch.full((num_blocks, block_size, 2, num_kv_heads, head_dim), before)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    starts, lengths, tables, new, slots, expected = [0], [], [], [], [], []
    for part in parts:
        length = part.start + part.num_tokens
        table = [free.pop() for _ in range(-(-length // block_size))]
        qkv = torch.randn(length, num_heads + 2 * num_kv_heads, head_dim, generator=generator) * 3
        places = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(length)])
        store(kernels, qkv[: part.start].flatten(1), cache, places[: part.start])
        q, keys, values = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
        expected.append(naive_attention(q[part.start :], keys, values, part.start).flatten(1))
        new.append(qkv[part.start :].flatten(1))
        slots.append(places[part.start :])
        starts.append(starts[-1] + part.num_tokens)
        lengths.append(length)
        tables.append(table)
    qkv = torch.cat(new)
    store(kernels, qkv, cache, torch.cat(slots))
    plan = kernels.plan(FlatBatch(query_starts=starts, lengths=lengths, block_tables=tables), block_size)
    attended = kernels.attention(kernels.array(qkv), num_heads, kernels.array(cache), plan)
    torch.testing.assert_close(kernels.tensor(attended), torch.cat(expected), rtol=1e-4, atol=1e-4)


def store(kernels: Kernels, qkv: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """K and V into the cache, turned by no angle."""
    num_kv_heads, head_dim = cache.shape[3:]
    cos, sin = torch.ones(len(qkv), head_dim), torch.zeros(len(qkv), head_dim)
    arrays = [kernels.array(tensor) for tensor in (cos, sin, cache, slots)]
    kernels.rotate_and_store(kernels.array(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, *arrays)


@with_kernels
@settings(max_examples=60)
@given(parts=parts, num_kv_heads=st.sampled_from((1, 2, 4)), seed=st.integers(0, 1000))
def test_paged_attention_is_attention(kernels: Kernels, parts: list[Part], num_kv_heads: int, seed: int):
    check_attention(kernels, parts, Shape(num_kv_heads=num_kv_heads), seed)


@with_kernels
@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.builds(Part, st.integers(0, 70), st.sampled_from((1, 1, 3, 17))), min_size=1, max_size=4),
    shape=st.builds(
        Shape,
        st.sampled_from((3, 6, 9, 21)),
        st.sampled_from((1, 3)),
        st.sampled_from((6, 20, 64, 80)),
        st.sampled_from((1, 5, 16, 32)),
    ),
)
def test_it_is_so_for_other_shapes_of_models_and_blocks(kernels: Kernels, parts: list[Part], shape: Shape):
    check_attention(kernels, parts, shape, 0)


@pytest.mark.parametrize("start", [0, 1, 14, 15, 16, 31, 32])
def test_nothing_that_lies_in_a_block_behind_the_sequence_is_attended(start: int):
    """At and around the edges of blocks: a block's last owner left what is no number."""
    check_attention(NUMBA, [Part(start, 1), Part(start + 1, 1)], Shape(9, 3, 64, 16), 0, before=torch.nan)


@with_kernels
@pytest.mark.parametrize("starts", [(9, 10, 11), (3, 7, 11), (40, 3, 41, 2), (5, 90, 6, 88, 7, 30)])
def test_a_batch_of_decodes_keeps_its_order(kernels: Kernels, starts: tuple[int, ...]):
    """One group of similar lengths, full blocks among them, and several groups."""
    check_attention(kernels, [Part(start, 1) for start in starts], Shape(), 0)


@with_kernels
def test_many_positions_are_attended_by_several_threads_as_by_one(kernels: Kernels):
    check_attention(kernels, [Part(start, 1) for start in range(40, 120)], Shape(), 0)


# --- few rows, and as many as are shared out among threads ---

sizes = pytest.mark.parametrize("num_rows", [1, 5, 5000])


@sizes
@with_kernels
def test_each_pair_of_halves_is_turned_by_its_angle_and_stored_in_its_slot_and_no_other(
    kernels: Kernels, num_rows: int
):
    """Three query heads, two of keys, two of values."""
    angles = torch.rand(num_rows, 2) * 6
    qkv = torch.randn(num_rows, 7 * 4)
    x = qkv.clone().view(num_rows, 7, 4)
    cos, sin = torch.cat((angles.cos(), angles.cos()), 1), torch.cat((-angles.sin(), angles.sin()), 1)
    pairs = torch.view_as_complex(torch.stack((x[:, :5, :2], x[:, :5, 2:]), -1))
    turned = pairs * torch.polar(torch.ones(num_rows, 1, 2), angles.unsqueeze(1))
    expected = torch.cat((torch.cat((turned.real, turned.imag), -1), x[:, 5:]), 1)
    cache = torch.zeros(num_rows + 2, BLOCK_SIZE, 2, 2, 4)
    slots = torch.randperm((num_rows + 2) * BLOCK_SIZE)[:num_rows]
    kernels.rotate_and_store(*(kernels.array(t) if torch.is_tensor(t) else t for t in (qkv, 3, cos, sin, cache, slots)))
    torch.testing.assert_close(qkv.view(num_rows, 7, 4), expected)
    gather = numba_gather if isinstance(kernels, NumbaKernels) else torch_gather
    rows = gather(cache, torch.arange(len(cache))).permute(2, 0, 1, 3).flatten(1)  # by slot
    assert torch.equal(rows[slots], qkv[:, 3 * 4 :])
    assert rows.count_nonzero() == num_rows * 16


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def check_add_rms_norm(kernels: Kernels, num_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, more, weight = (torch.randn(*shape, 16).to(dtype) for shape in ((num_rows,), (num_rows,), ()))
    added = hidden + more
    for part in (more, None):
        residual = None if part is None else kernels.array(part)
        got = kernels.add_rms_norm(kernels.array(hidden), residual, kernels.array(weight), 1e-5)
        assert torch.equal(hidden, added)
        torch.testing.assert_close(kernels.tensor(got).double(), norm(added, weight), rtol=tolerance, atol=tolerance)


@sizes
@with_kernels
def test_add_rms_norm_adds_and_is_the_norm(kernels: Kernels, num_rows: int):
    check_add_rms_norm(kernels, num_rows, torch.float32, 1e-5)


def test_add_rms_norm_of_bfloat16_adds_and_is_the_norm():
    check_add_rms_norm(TORCH, 5, torch.bfloat16, 2e-2)


@sizes
@with_kernels
def test_heads_are_normed_each_by_itself_and_no_others(kernels: Kernels, num_rows: int):
    qkv, weight = torch.randn(num_rows, 5, 8), torch.randn(8)
    expected = torch.cat((qkv[:, :1], norm(qkv[:, 1:3], weight).float(), qkv[:, 3:]), 1)
    flat = qkv.flatten(1)
    kernels.norm_heads(kernels.array(flat), range(1, 3), kernels.array(weight), 1e-5)
    torch.testing.assert_close(flat.view(qkv.shape), expected, rtol=1e-5, atol=1e-5)


@sizes
@with_kernels
def test_silu_and_mul_gates_the_second_half_by_the_first(kernels: Kernels, num_rows: int):
    gate, up = torch.randn(num_rows, 8) * 20, torch.randn(num_rows, 8)
    expected = gate / (1 + (-gate).exp()) * up
    got = kernels.silu_and_mul(kernels.array(torch.cat((gate, up), -1)))
    torch.testing.assert_close(kernels.tensor(got), expected)
