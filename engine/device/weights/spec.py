"""What a decoder of the Llama family is, whatever file it came from. Pure.

`engine.device.models` builds any model that a `ModelSpec` can describe; what a spec cannot describe is refused where
the file is read, with a `ModelError` that names the file and the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.device.weights.values import ModelError, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and constants of one model. Numbers are within the bounds of `engine.device.weights.values`."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] | None  # of each of the head_dim / 2 rotation frequencies; None: all 1
    has_qkv_bias: bool
    has_qk_norm: bool
    ties_embeddings: bool
    sliding_window: int | None
    eos_token_ids: frozenset[int]
    dtype: torch.dtype  # in which the weights were published
    decoder: str = "llama"  # which of engine.device.models computes it

    @property
    def num_matrix_weights(self) -> int:
        """How many weights each sampled token is multiplied with: those of all layers and of the head."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def check(self, source: str) -> None:
        """Raise ModelError where the numbers cannot belong together."""
        divisors = self.rope_divisors
        rules = (
            (self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} heads over {self.num_kv_heads} KV heads"),
            (self.head_dim % 2 == 0, f"an odd head size of {self.head_dim}"),
            (
                divisors is None or len(divisors) == self.head_dim // 2,
                f"rotary factors that do not fit a head size of {self.head_dim}",
            ),
            (divisors is None or all(0 < d < math.inf for d in divisors), "rotary factors that are not above 0"),
        )
        for holds, what in rules:
            if not holds:
                raise ModelError(f"{source}: unsupported: {what}")


class Checkpoint(Protocol):
    """One model on disk. Names are Hugging Face's, as in `model.layers.0.self_attn.q_proj.weight`."""

    spec: ModelSpec

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read one tensor; it may share the file's pages. ModelError where it is missing or of another shape."""


def linear_divisors(factor: float, head_dim: int) -> tuple[float, ...]:
    """The divisors that draw all positions closer together by one factor."""
    return (factor,) * (head_dim // 2)


def llama3_divisors(scaling: Values, theta: float, head_dim: int) -> tuple[float, ...]:
    """The divisors that lower low frequencies by `factor`, keep high ones and blend those between.

    Source: `Llama3` rotary scaling as published with Llama 3.1.
    """
    factor = scaling.real("rope_factor", "factor")
    original = scaling.real("rope_original_positions", "original_max_position_embeddings")
    low = scaling.real("rope_frequency_factor", "low_freq_factor")
    high = scaling.real("rope_frequency_factor", "high_freq_factor")
    if not low < high:
        raise scaling.error(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    divisors = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)
