"""Models read from files: what a model is (`spec`), and its tensors, whatever format they are in.

Street: work. A file that asks for what no `ModelSpec` can describe is refused here, with a `ModelError` that says why.
"""

from __future__ import annotations

from engine.device.weights.load import open_checkpoint
from engine.device.weights.rotation import RotatedCheckpoint
from engine.device.weights.spec import Checkpoint, ModelSpec
from engine.device.weights.values import ModelError

__all__ = [
    "Checkpoint",
    "ModelError",
    "ModelSpec",
    "RotatedCheckpoint",
    "open_checkpoint",
]
