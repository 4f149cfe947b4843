"""Every way of holding a matrix gives the product; int8 within what its scales allow, and row by row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.device.kernels import packed
from engine.device.kernels.interface import Linear
from engine.device.kernels.linear import (
    OneDNNInt8Linear,
    PanelInt8Linear,
    PanelLinear,
    has_int8_products,
    quantize_weight,
)

needs_int8_products = pytest.mark.skipif(not has_int8_products(), reason="a processor without sums of int8 products")
needs_int8 = pytest.mark.skipif(packed.INT8_LEVELS is None, reason="a processor without AVX2")

INT8 = [
    pytest.param(OneDNNInt8Linear, 127, marks=needs_int8_products, id="onednn"),
    pytest.param(PanelInt8Linear, packed.INT8_LEVELS, marks=needs_int8, id="panels"),
]
shapes = st.tuples(st.sampled_from((1, 2, 7, 31, 128, 129, 300)), st.integers(1, 130), st.integers(1, 130))
Make = Callable[[torch.Tensor, torch.Tensor | None], Linear]


def draw(
    shape: tuple[int, int, int], seed: int, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Input, weight and bias; rows of very different sizes, one of zeros among them."""
    rows, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, num_inputs, generator=generator) * 10 ** (6 * torch.rand(rows, 1, generator=generator) - 3)
    x[rows // 2] = 0
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    weight[num_outputs // 2] = 0
    return x, weight, torch.randn(num_outputs, generator=generator) if has_bias else None


def product(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(linear(x.numpy()))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), has_bias=st.booleans())
def test_float32_is_the_product(shape: tuple[int, int, int], seed: int, has_bias: bool):
    x, weight, bias = draw(shape, seed, has_bias)
    bound = 1e-6 * (x.abs() @ weight.abs().t()) + 1e-6
    assert ((product(PanelLinear(weight, bias), x) - F.linear(x, weight, bias)).abs() <= bound).all()


@pytest.mark.parametrize(("make", "levels"), INT8)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), has_bias=st.booleans())
@example(shape=(1, 64, 1), seed=0, has_bias=False)
def test_int8_is_within_half_a_level_of_each_factor(
    make: Make, levels: int, shape: tuple[int, int, int], seed: int, has_bias: bool
):
    x, weight, bias = draw(shape, seed, has_bias)
    x_half = 0.501 * x.abs().amax(-1, keepdim=True) / levels
    weight_half = 0.501 * weight.abs().amax(-1) / 127
    # |x w - (x + a)(w + b)| <= |a| |w| + |b| |x| + |a| |b|, summed over the inputs.
    num_inputs = x.shape[1]
    bound = x_half * weight.abs().sum(-1) + x.abs().sum(-1, keepdim=True) * weight_half
    bound += num_inputs * x_half * weight_half
    got = product(make(weight, bias), x).double()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ((got - exact).abs() <= bound * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize(("make", "levels"), INT8)
def test_int8_gives_a_row_the_same_in_any_batch(make: Make, levels: int):
    x, weight, bias = draw((128, 96, 200), 1, True)
    linear = make(weight, bias)
    whole = product(linear, x)
    for rows in (1, 2, 5, 24, 32):
        assert torch.equal(torch.cat([product(linear, part) for part in x.split(rows)]), whole)


@pytest.mark.parametrize(("make", "levels"), INT8)
def test_int8_does_not_overflow_at_its_largest(make: Make, levels: int):
    weight, x = torch.full((16, 1536), 2.0), torch.full((3, 1536), 5.0)
    torch.testing.assert_close(product(make(weight, None), x), torch.full((3, 16), 2.0 * 5.0 * 1536))
    torch.testing.assert_close(product(make(-weight, None), x), torch.full((3, 16), -2.0 * 5.0 * 1536))


@needs_int8
@settings(max_examples=60, deadline=None)
@given(shape=shapes, kind=st.sampled_from(("random", "extreme", "greatest")), seed=st.integers(0, 1000))
@example(shape=(7, 1536, 25), kind="greatest", seed=0)
def test_sums_of_int8_products_are_exact(shape: tuple[int, int, int], kind: str, seed: int):
    """Whatever the numbers are that a row and a weight can have: no sum saturates on its way."""
    rows, lanes, num_outputs = shape
    most = 2 * (packed.INT8_LEVELS or 0) + 1
    source = np.random.default_rng(seed)
    x, weight = source.integers(1, most + 1, (rows, 4 * lanes)), source.integers(-127, 128, (num_outputs, 4 * lanes))
    if kind != "random":
        x = np.where(x > most // 2, most, 1) if kind == "extreme" else np.full_like(x, most)
        weight = np.where(weight > 0, 127, -127) if kind == "extreme" else np.full_like(weight, 127)
    offsets = source.integers(-(2**20), 2**20, num_outputs).astype(np.int32)
    out, ones = np.empty((rows, num_outputs), np.float32), np.ones(max(rows, num_outputs), np.float32)
    panels = packed.pack(weight.astype(np.int8).view(np.int32))
    multiply = packed.multiply_int8(panels.size)
    multiply(x.astype(np.uint8).view(np.int32), panels, offsets, ones[:num_outputs], ones[:rows, None], None, out)
    np.testing.assert_array_equal(out, (x @ weight.T - offsets).astype(np.float32))


def test_each_output_has_its_own_scale():
    numbers, scales = quantize_weight(torch.tensor([[127.0, -1.0], [0.5, -1.27], [0.0, 0.0]]))
    assert numbers.tolist() == [[127, -1], [50, -127], [0, 0]]
    torch.testing.assert_close(scales[:2], torch.tensor([1.0, 0.01]))
