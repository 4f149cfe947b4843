"""Linear layers: how a weight matrix is held on a device, and the product with it.

`make_linear` chooses once, when the weights are read. All of them take (rows, inputs) and give (rows, outputs).

int8 holds each output's weights as whole numbers within 127 of 0 times a scale of its own, and turns each row of the
input, when it comes, into whole numbers times a scale of its own: what one row gives does not depend on its batch.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.kernels import panels
from engine.kernels.numba_ops import quantize_rows

_WEIGHT_LEVELS = 127
_SMALLEST = 1e-30  # in place of 0, to divide by


class Linear(Protocol):
    """One matrix, and its bias if it has one."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, inputs) to (rows, outputs)."""


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> Linear:
    """The fastest way on the weight's device. `weight`: (outputs, inputs)."""
    if quantization == "int8":
        return OneDNNInt8Linear(weight, bias) if has_int8_products() else FBGEMMInt8Linear(weight, bias)
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return PanelLinear(weight, bias)
    return DenseLinear(weight, bias)


class DenseLinear:
    """The weights as they are, shared with whoever else holds them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


class PanelLinear:
    """Float32 in panels (`engine.kernels.panels`)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._num_outputs = len(weight)
        self._size = weight.numel()
        self._panels = panels.pack(weight.numpy())
        self._bias = np.zeros(len(self._panels) * panels.WIDTH, np.float32)
        if bias is not None:
            self._bias[: self._num_outputs] = bias.numpy()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), self._num_outputs)
        panels.multiply(self._size)(x.numpy(), self._panels, self._bias, out.numpy())
        return out


class OneDNNInt8Linear:
    """Needs a processor with instructions for sums of int8 products (VNNI, AMX).

    Measured: all layers of SmolLM2-135M, 2 cores with AMX, beside fbgemm: 7.6 and 5.0 ms at 1 row, 7.0 and 9.9 at 8,
    9.5 and 15 at 32, 36 and 136 at 512.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        numbers, scales = quantize_weight(weight)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers, None)
        self._scales = scales / 127
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        numbers, peaks = quantize_rows(x)
        product = torch.ops.onednn.qlinear_pointwise(
            numbers,
            1.0,
            128,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return _scaled(product, peaks, self._bias)


class FBGEMMInt8Linear:
    """For processors that add pairs of products in 16 bits: inputs within 63 of 0, so that no pair overflows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        numbers, scales = quantize_weight(weight)
        zero_points = torch.zeros(len(scales), dtype=torch.int64)
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():  # of a replacement that is another package
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(numbers, scales, zero_points, 0)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        peaks = x.abs().amax(-1, keepdim=True)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / peaks.clamp_min(_SMALLEST), 1 / 63, 64, self._packed
        )
        return _scaled(product, peaks, self._bias)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers (outputs, inputs) and a float32 scale of each output."""
    scales = weight.abs().amax(-1).clamp_min(_SMALLEST).div_(_WEIGHT_LEVELS)
    return weight.div(scales[:, None]).round_().to(torch.int8), scales


def _scaled(product: torch.Tensor, peaks: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product.mul_(peaks) if bias is None else torch.addcmul(bias, product, peaks)


@functools.cache
def has_int8_products() -> bool:
    """Whether oneDNN's sums are exact here for the largest numbers; without the instructions they saturate."""
    weight, bias = torch.full((16, 64), 127.0), None
    product = OneDNNInt8Linear(weight, bias)(torch.full((2, 64), 127.0))
    return bool(torch.allclose(product, torch.tensor(127.0 * 127 * 64)))
