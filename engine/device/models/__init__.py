"""Models: what is computed between a batch's token ids and its logits."""

from __future__ import annotations

from engine.device.models.llama import FlatInput, LlamaModel

__all__ = [
    "FlatInput",
    "LlamaModel",
]
