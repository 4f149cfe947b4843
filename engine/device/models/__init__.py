"""The models: what is computed between a batch's token ids and its logits.

Street: work. A model is plain functions of tensors, built from a `ModelSpec`; it knows no file format
and chooses no kernel.
"""

from __future__ import annotations

from typing import Final

from engine.device.models.llama import FlatInput, LlamaModel
from engine.device.weights import ModelSpec

__all__ = ["Decoder", "FlatInput", "decoder_for"]

Decoder = LlamaModel  # a second one gives a protocol that both implement
DECODERS: Final = {"llama": LlamaModel}  # by the name in a row of engine.device.weights.families


def decoder_for(spec: ModelSpec) -> type[Decoder]:
    """The class that computes models of this spec."""
    return DECODERS[spec.decoder]
