"""The models: what is computed between a batch's token ids and its logits.

Street: work. A model is plain functions of tensors, built from a `ModelSpec`; it knows no file format
and chooses no kernel.
"""

from __future__ import annotations

from engine.device.models.llama import FlatInput, LlamaModel

__all__ = [
    "FlatInput",
    "LlamaModel",
]
