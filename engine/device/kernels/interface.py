"""What a model needs of a device beyond matrix products, and the shapes it is given in.

All tensors are *flat*: the tokens of every scheduled sequence, one after another, decodes and prefill chunks alike.

    sequence:        0         1    2          query_starts = [0, 4, 5, 8]
    token rows:      0 1 2 3 | 4 | 5 6 7       lengths      = KV positions of each sequence, its new tokens included
                     chunk     dec. chunk      a sequence's new tokens are its last positions

`qkv` is (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim): queries, keys, values of each token, contiguous.
The KV cache of one layer is (num_blocks, block_size, 2, num_kv_heads, head_dim): K at index 0, V at 1, of one position
side by side, because they are written together. A *slot* is block * block_size + offset. How a block's numbers are
ordered within it is the implementation's affair, which alone reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Array = Any  # torch.Tensor or numpy.ndarray: what an implementation computes with


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """Where each sequence's rows, KV blocks and positions are. Host lists: a plan puts on the device what it needs."""

    query_starts: Sequence[int]  # num_sequences + 1
    lengths: Sequence[int]  # num_sequences
    block_tables: Sequence[Sequence[int]]  # each covers its length; may be longer


class Linear(Protocol):
    """One matrix, and its bias if it has one."""

    def __call__(self, x: Array) -> Array:
        """Multiply (rows, inputs) into (rows, outputs)."""


class Kernels(Protocol):
    """One implementation for one device. `plan` is called once an iteration, the rest once a layer."""

    def array(self, tensor: torch.Tensor) -> Array:
        """A tensor on this device as an array; they share their memory."""

    def tensor(self, array: Array) -> torch.Tensor:
        """An array of this device as a tensor; they share their memory."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> Linear:
        """The product with `weight` (outputs, inputs), held as it is fastest."""

    def plan(self, batch: FlatBatch, block_size: int) -> Any:
        """Work out what `attention` needs to know of the batch; opaque to the caller."""

    def rotate_and_store(
        self, qkv: Array, num_heads: int, cos: Array, sin: Array, kv_cache: Array, slots: Array
    ) -> None:
        """Turn the query and key heads of each token by halves, in place, and write its K and V to its slot.

        `cos` and `sin` are float32 (num_tokens, head_dim), the first half of `sin` negated; `slots` (num_tokens).
        """

    def attention(self, qkv: Array, num_heads: int, kv_cache: Array, plan: Any) -> Array:
        """Causal attention of each token over its sequence's positions: (num_tokens, num_heads * head_dim).

        The new tokens' K and V are in the cache already.
        """

    def add_rms_norm(self, hidden: Array, more: Array | None, weight: Array, eps: float) -> Array:
        """Add `more` to `hidden` (rows, width) in place, and give the norm of each row, computed in float32."""

    def norm_heads(self, qkv: Array, heads: range, weight: Array, eps: float) -> None:
        """The same norm, in place, of each of some heads; `weight` (head_dim)."""

    def silu_and_mul(self, x: Array) -> Array:
        """silu(gate) * up for `x` (num_tokens, 2 * n), gate first."""
