"""What a model needs of a device beyond matrix products, and the shapes it is given in.

All tensors are *flat*: the tokens of every scheduled sequence, one after another, decodes and prefill chunks alike.

    sequence:        0         1    2          query_starts = [0, 4, 5, 8]
    token rows:      0 1 2 3 | 4 | 5 6 7       lengths      = KV positions of each sequence, its new tokens included
                     chunk     dec. chunk      a sequence's new tokens are its last positions

`qkv` is (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim): queries, keys, values of each token, contiguous.
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

    def store_kv(self, qkv: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Write K and V of each token to `slots` (num_tokens) of one layer."""

    def attention(self, qkv: torch.Tensor, num_heads: int, kv_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        """Causal attention of each token over its sequence's positions: (num_tokens, num_heads * head_dim).

        The new tokens' K and V are in the cache already.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, computed in float32."""

    def rotary(self, qkv: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn the first `num_heads` heads of each token by halves, in place. `cos` and `sin` are float32 (num_tokens,
        head_dim), the first half of `sin` negated."""

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for `x` (num_tokens, 2 * n), gate first."""
