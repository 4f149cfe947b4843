"""The device's hot operations behind one small interface; which implementation runs is decided here, once."""

from __future__ import annotations

import torch

from engine.kernels.interface import Kernels
from engine.kernels.numba_ops import NumbaKernels
from engine.kernels.torch_ops import TorchKernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest there are. PyTorch's own operations run everywhere and with every type."""
    if device.type == "cpu" and dtype == torch.float32:
        return NumbaKernels()
    return TorchKernels(device)
