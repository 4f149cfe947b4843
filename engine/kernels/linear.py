"""Linear layers: how a weight matrix is held on a device, and the product with it.

`make_linear` chooses once, when the weights are read. All of them take (rows, inputs) and give (rows, outputs).

int8 holds each output's weights as whole numbers within 127 of 0 times a scale of its own, and turns each row of the
input, when it comes, into whole numbers times a scale of its own: what one row gives does not depend on its batch.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.kernels.numba_ops import quantize_rows

_PACKED_FOR_ROWS = 128  # Measured: 60 products of 8 and of 512 rows, packed for 8: 25 and 506 ms, for 128: 25 and 341
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
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch._C.has_mkl:
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


class DenseLinear:
    """The weights as they are, shared with whoever else holds them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """Float32 in the blocks that MKL multiplies, which otherwise rearranges the matrix for every product.

    Measured: all layers of SmolLM2-135M, 2 cores, dense and packed: 17 and 16 ms at 1 row, 38 and 25 at 8, 47 and 38 at
    32, 97 and 80 at 128, 349 and 341 at 512.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._shape = weight.new_empty(1).expand(weight.shape)  # takes no memory: only its sizes are read
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # NOTE: another number than the rows' would mean the product with `_shape`.
        product: torch.Tensor = torch.ops.mkl._mkl_linear(x, self._packed, self._shape, self._bias, len(x))
        return product


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
