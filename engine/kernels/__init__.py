"""The device's hot operations behind one small interface; which implementation runs is decided here, once."""

from __future__ import annotations

import torch

from engine.kernels.interface import Kernels
from engine.kernels.torch_ops import TorchKernels


def kernels_for(device: torch.device) -> Kernels:
    """What runs on this device. PyTorch's own operations run everywhere."""
    return TorchKernels(device)
