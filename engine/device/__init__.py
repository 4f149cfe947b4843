"""A scheduled batch to sampled tokens: model, KV cache, kernels. Knows no protocol and counts nothing."""

from __future__ import annotations

from engine.device.runner import TorchRunner
from engine.device.weights import ModelError

__all__ = [
    "ModelError",
    "TorchRunner",
]
