"""Linear layers on a CPU: how a weight matrix is held there, and the product with it.

`make_linear` chooses once, when the weights are read. All take `weight` (outputs, inputs) and perhaps `bias` (outputs).

int8 holds each output's weights as whole numbers within 127 of 0 times a scale of its own, and turns each row of the
input, when it comes, into whole numbers times a scale of its own: what one row gives does not depend on its batch.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.device.kernels import packed as panels
from engine.device.kernels.compiled import for_any_size
from engine.device.kernels.interface import Linear

_WEIGHT_LEVELS = 127
_SMALLEST = 1e-30  # in place of 0, to divide by
_FEW_ROWS = 24


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> Linear:
    """Choose the fastest product with `weight` that this processor has."""
    if quantization == "int8":
        return OneDNNInt8Linear(weight, bias) if has_int8_products() else PanelInt8Linear(weight, bias)
    return PanelLinear(weight, bias)


class PanelLinear:
    """Keeps float32 weights in panels (`engine.device.kernels.packed`)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._panels = panels.pack(weight.numpy())
        self._bias = None if bias is None else bias.numpy()
        self._num_outputs = len(weight)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), self._num_outputs), np.float32)
        panels.multiply(self._panels.size)(x, self._panels, self._bias, out)
        return out


class PanelInt8Linear:
    """Keeps int8 weights in panels, and multiplies by the instructions that the processor has for them.

    With AVX2 alone the numbers of the input are within 63 of 64, so that no sum of two products overflows its 16 bits.
    Measured, all layers of SmolLM2-135M, one thread of an EPYC, AVX2 alone, float32 and this: 28 and 8 ms at 1 row, 28
    and 12 at 8, 104 and 51 at 32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert panels.INT8_LEVELS is not None, "this processor has no products of int8"
        numbers, scales = quantize_weight(weight)
        self._levels = panels.INT8_LEVELS
        filled = F.pad(numbers, (0, -numbers.shape[1] % 4))
        self._panels = panels.pack(filled.numpy().view(np.int32))
        # Inputs are numbers around this many, so that they are positive.
        self._offsets = ((self._levels + 1) * numbers.sum(-1, dtype=torch.int32)).numpy()
        self._scales = (scales / self._levels).numpy()
        self._bias = None if bias is None else bias.numpy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.multiply(x)

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """For one that does the same for more rows."""
        numbers, peaks = quantize_rows(x, self._levels)
        out = np.empty((len(numbers), len(self._scales)), np.float32)
        if missing := -numbers.shape[1] % 4:
            numbers = np.pad(numbers, ((0, 0), (0, missing)))
        multiply = panels.multiply_int8(self._panels.size)
        multiply(numbers.view(np.int32), self._panels, self._offsets, self._scales, peaks, self._bias, out)
        return out


class OneDNNInt8Linear:
    """Needs a processor with instructions for sums of int8 products (VNNI, AMX).

    Measured: all layers of SmolLM2-135M, 2 cores with AMX: 9.5 ms at 32 rows, 36 at 512.
    The same numbers in panels give the same sums, which are exact, and those of a few rows come sooner: 10.0 and 4.4 ms
    at 1 row, 10.6 and 6.0 at 8, 15.2 and 13.1 at 24, 19.8 and 21.8 at 48.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        numbers, scales = quantize_weight(weight)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers, None)
        self._scales = scales / _WEIGHT_LEVELS
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)
        self._bias = bias
        self._few = PanelInt8Linear(weight, bias) if panels.INT8_LEVELS == _WEIGHT_LEVELS else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self._few is not None and len(x) <= _FEW_ROWS:
            return self._few.multiply(x)
        numbers, peaks = quantize_rows(x, _WEIGHT_LEVELS)
        product = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(numbers),
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
        return _scaled(product, torch.from_numpy(peaks), self._bias)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers (outputs, inputs) and a float32 scale of each output."""
    scales = weight.abs().amax(-1).clamp_min(_SMALLEST).div_(_WEIGHT_LEVELS)
    return weight.div(scales[:, None]).round_().to(torch.int8), scales


def quantize_rows(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row as whole numbers (uint8) within `levels` of `levels` + 1, and its greatest magnitude (rows, 1)."""
    numbers, peaks = np.empty(x.shape, np.uint8), np.empty((len(x), 1), np.float32)
    _quantize_rows(x.size)(x, np.float32(levels), numbers, peaks)
    return numbers, peaks


def _scaled(product: torch.Tensor, peaks: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    scaled = product.mul_(peaks)
    whole: np.ndarray = (scaled if bias is None else scaled.add_(bias)).numpy()
    return whole


@functools.cache
def has_int8_products() -> bool:
    """Whether oneDNN's sums are exact here for the largest numbers; without the instructions they saturate."""
    weight, bias = torch.full((16, 64), 127.0), None
    product = OneDNNInt8Linear(weight, bias)(np.full((_FEW_ROWS + 1, 64), 127, np.float32))
    return bool(np.allclose(product, 127.0 * 127 * 64))


@for_any_size
def _quantize_rows(x, levels, numbers, peaks):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for row in numba.prange(len(x)):
        peak = np.float32(0)
        for i in range(width):
            peak = max(peak, abs(x[row, i]))
        factor = levels / max(peak, np.float32(_SMALLEST))
        for i in range(width):
            numbers[row, i] = np.uint8(x[row, i] * factor + (levels + np.float32(1.5)))
        peaks[row, 0] = peak
