"""A scheduled batch in, sampled tokens out: the model, its KV cache and its kernels.

Street: work. Tensors live only here. It knows no protocol and counts nothing; all that it shares with the scheduler is
the batch (`engine.schedule.batch`).
"""

from __future__ import annotations

from engine.device.runner import TorchRunner
from engine.device.weights import ModelError

__all__ = [
    "ModelError",
    "TorchRunner",
]
