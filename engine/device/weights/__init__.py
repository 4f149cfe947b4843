"""Reading models from files: what a model is (`spec`) and its tensors, whatever format they are in."""

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
