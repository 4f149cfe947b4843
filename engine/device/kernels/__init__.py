"""The device's hot operations behind one small interface; which implementation runs is decided here, once.

Street: work. PyTorch's own operations are right on every device, and what every other implementation is tested against.
"""

from __future__ import annotations

import torch

from engine.device.kernels.head import Head, argmax, make_head
from engine.device.kernels.interface import Array, FlatBatch, Kernels, Linear
from engine.device.kernels.numba_ops import NumbaKernels
from engine.device.kernels.packed import INT8_LEVELS
from engine.device.kernels.torch_ops import TorchKernels

__all__ = [
    "HAS_INT8",
    "Array",
    "FlatBatch",
    "Head",
    "Kernels",
    "Linear",
    "argmax",
    "kernels_for",
    "make_head",
]

HAS_INT8 = INT8_LEVELS is not None  # whether this processor multiplies int8 here


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest there are. PyTorch's own operations run everywhere and with every type."""
    if device.type == "cpu" and dtype == torch.float32:
        return NumbaKernels()
    return TorchKernels(device)
