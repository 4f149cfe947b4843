"""Linear layers on a CPU: how a weight matrix is held there, and the product with it.

`make_linear` chooses once, when the weights are read. All take `weight` (outputs, inputs) and perhaps `bias` (outputs).

int8 holds each output's weights as whole numbers within 127 of 0 times a scale of its own, and turns each row of the
input, when it comes, into whole numbers times a scale of its own: what one row gives does not depend on its batch.
"""

from __future__ import annotations

import functools
import warnings

import numba
import numpy as np
import torch

from engine.device.kernels import packed as panels
from engine.device.kernels.compiled import for_any_size
from engine.device.kernels.interface import Linear

_WEIGHT_LEVELS = 127
_SMALLEST = 1e-30  # in place of 0, to divide by
_FEW_ROWS = 24


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> Linear:
    """The fastest way there is here."""
    if quantization == "int8":
        return OneDNNInt8Linear(weight, bias) if has_int8_products() else FBGEMMInt8Linear(weight, bias)
    return PanelLinear(weight, bias)


class PanelLinear:
    """Float32 in panels (`engine.device.kernels.packed`)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._panels = panels.pack(weight.numpy())
        self._bias = None if bias is None else bias.numpy()
        self._num_outputs = len(weight)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), self._num_outputs), np.float32)
        panels.multiply(self._panels.size)(x, self._panels, self._bias, out)
        return out


class OneDNNInt8Linear:
    """Needs a processor with instructions for sums of int8 products (VNNI, AMX).

    Measured: all layers of SmolLM2-135M, 2 cores with AMX, beside fbgemm: 9.5 and 15 ms at 32 rows, 36 and 136 at 512.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        numbers, scales = quantize_weight(weight)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers, None)
        self._scales = scales / 127
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)
        self._bias = bias
        self._few = _FewRowsInt8(numbers, self._scales, bias) if _FewRowsInt8.can(numbers) else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        numbers, peaks = quantize_rows(x)
        if self._few is not None and len(x) <= _FEW_ROWS:
            return self._few.multiply(numbers, peaks)
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


class _FewRowsInt8:
    """The same numbers in panels: their sums are exact, so the same sums, and those of a few rows come sooner.

    Measured: all layers of SmolLM2-135M, oneDNN and this: 10.0 and 4.4 ms at 1 row, 10.6 and 6.0 at 8, 15.2 and 13.1 at
    24, 19.8 and 21.8 at 48.
    """

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._panels = panels.pack(numbers.numpy().view(np.int32))
        self._offsets = (128 * numbers.sum(-1, dtype=torch.int32)).numpy()  # inputs are numbers around 128
        self._scales = scales.numpy()
        self._bias = None if bias is None else bias.numpy()

    @staticmethod
    def can(numbers: torch.Tensor) -> bool:
        return panels.HAS_INT8 and numbers.shape[1] % 4 == 0

    def multiply(self, numbers: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        """(rows, inputs) and (rows, 1), as `quantize_rows` gives them, to (rows, outputs)."""
        out = np.empty((len(numbers), len(self._scales)), np.float32)
        multiply = panels.multiply_int8(self._panels.size)
        multiply(numbers.view(np.int32), self._panels, self._offsets, self._scales, peaks, self._bias, out)
        return out


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

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(x)
        peaks = rows.abs().amax(-1, keepdim=True)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / peaks.clamp_min(_SMALLEST), 1 / 63, 64, self._packed
        )
        return _scaled(product, peaks, self._bias)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers (outputs, inputs) and a float32 scale of each output."""
    scales = weight.abs().amax(-1).clamp_min(_SMALLEST).div_(_WEIGHT_LEVELS)
    return weight.div(scales[:, None]).round_().to(torch.int8), scales


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row as whole numbers within 127 of 128 (uint8), and its greatest magnitude (rows, 1)."""
    numbers, peaks = np.empty(x.shape, np.uint8), np.empty((len(x), 1), np.float32)
    _quantize_rows(x.size)(x, numbers, peaks)
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
def _quantize_rows(x, numbers, peaks):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for row in numba.prange(len(x)):
        peak = np.float32(0)
        for i in range(width):
            peak = max(peak, abs(x[row, i]))
        factor = np.float32(127) / max(peak, np.float32(1e-30))
        for i in range(width):
            numbers[row, i] = np.uint8(x[row, i] * factor + np.float32(128.5))
        peaks[row, 0] = peak
