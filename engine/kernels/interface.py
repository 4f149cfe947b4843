"""What a model needs of a device beyond matrix products, and the shapes it is given in.

All tensors are *flat*: the tokens of every scheduled sequence, one after another, decodes and prefill chunks alike.

    sequence:        0         1    2          query_starts = [0, 4, 5, 8]
    token rows:      0 1 2 3 | 4 | 5 6 7       lengths      = KV positions of each sequence, its new tokens included
                     chunk     dec. chunk      a sequence's new tokens are its last positions

The KV cache of one layer is (num_blocks, block_size, 2, num_kv_heads, head_dim): K at index 0, V at 1, of one position
side by side, because they are written together. A *slot* is block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """Where each sequence's rows, KV blocks and positions are. Host lists: a plan puts on the device what it needs."""

    query_starts: Sequence[int]  # num_sequences + 1
    lengths: Sequence[int]  # num_sequences
    block_tables: Sequence[Sequence[int]]  # each covers its length; may be longer


class Kernels(Protocol):
    """One implementation for one device. `plan` is called once an iteration, the rest once a layer."""

    def plan(self, batch: FlatBatch, block_size: int) -> Any:
        """Whatever `attention` wants to know of the batch; opaque to the caller."""

    def store_kv(self, kv: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Write `kv` (num_tokens, 2 * num_kv_heads * head_dim), K then V, to `slots` (num_tokens) of one layer."""

    def attention(self, q: torch.Tensor, kv: torch.Tensor, kv_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        """Causal attention of `q` (num_tokens, num_heads, head_dim) over each sequence's own positions; same shape.

        The new tokens' `kv`, as given to `store_kv`, are in the cache already.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, computed in float32."""

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn `x` (num_tokens, num_heads, head_dim) by halves; `cos`, `sin` (num_tokens, 1, head_dim) are float32, and
        the first half of `sin` is negated."""

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for `x` (num_tokens, 2 * n), gate first."""
