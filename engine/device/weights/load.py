"""Which reader a model path needs."""

from __future__ import annotations

from pathlib import Path

from engine.device.weights.gguf_checkpoint import GGUFCheckpoint
from engine.device.weights.huggingface import HuggingFaceCheckpoint
from engine.device.weights.spec import Checkpoint
from engine.device.weights.values import ModelError


def open_checkpoint(path: str) -> Checkpoint:
    """A Hugging Face directory or a .gguf file. Raises ModelError."""
    location = Path(path)
    if not location.exists():
        raise ModelError(f"{path}: no such file or directory")
    if location.is_dir():
        return HuggingFaceCheckpoint(location)
    if location.suffix == ".gguf":
        return GGUFCheckpoint(location)
    raise ModelError(f"{path}: neither a directory nor a .gguf file")
