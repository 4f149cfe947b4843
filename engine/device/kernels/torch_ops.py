"""The kernels in PyTorch's own operations: right on every device, and decent on a CPU.

Decoding sequences are sorted by length and attended in groups of similar length, so that little padding is gathered
and one call serves many. A prefill chunk is attended alone; one that begins at position 0 needs nothing of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.device.kernels.interface import FlatBatch, Linear

_MAX_GROUP_BLOCKS = 2048  # gathered at once: bounds a copy that should stay in the processor's caches
_MIN_FILL = 0.7  # a sequence with fewer blocks than this share of its group's longest begins another group


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    rows: torch.Tensor | None  # (group) token rows; None: all rows, in order
    blocks: torch.Tensor  # (group * num_blocks), padded with block 0
    mask: torch.Tensor | None  # (group, 1, 1, num_blocks * block_size), 0 or -inf; None: nothing to hide
    hidden: torch.Tensor | None  # the hidden ones among the (group * num_blocks * block_size) positions


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of one sequence, of several tokens."""

    start: int  # token rows [start, end)
    end: int
    blocks: torch.Tensor | None  # None: the sequence begins here
    mask: torch.Tensor | None  # (rows, positions)
    length: int


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """Which sequences of one batch are attended together, and what each group reads."""

    groups: list[_DecodeGroup]
    chunks: list[Chunk]


class TorchKernels:
    """Implements `engine.device.kernels.interface.Kernels`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def array(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def tensor(self, array: torch.Tensor) -> torch.Tensor:
        return array

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> Linear:
        assert quantization is None, "only for float32 on a CPU"
        return partial(F.linear, weight=weight, bias=bias)

    # --- planning ---

    def plan(self, batch: FlatBatch, block_size: int) -> TorchPlan:
        starts, lengths = batch.query_starts, batch.lengths
        decodes, chunks = [], []
        for index, length in enumerate(lengths):
            start, end = starts[index], starts[index + 1]
            if end - start == 1 and length > 1:
                decodes.append((-(-length // block_size), index))
            else:
                chunks.append(plan_chunk(start, end, length, batch.block_tables[index], block_size, self._device))
        decodes.sort(reverse=True)
        is_all = len(decodes) == len(lengths)
        groups = [
            self._plan_group(batch, members, block_size, is_all and len(members) == len(decodes))
            for members in _split(decodes)
        ]
        return TorchPlan(groups, chunks)

    def _plan_group(
        self, batch: FlatBatch, members: list[tuple[int, int]], block_size: int, is_whole: bool
    ) -> _DecodeGroup:
        if is_whole:  # in the batch's order, so that no rows need to be picked
            members = sorted(members, key=lambda member: member[1])
        num_blocks = max(count for count, _ in members)
        blocks = np.zeros((len(members), num_blocks), np.int64)
        for row, (count, index) in enumerate(members):
            blocks[row, :count] = batch.block_tables[index][:count]
        lengths = np.array([batch.lengths[index] for _, index in members])
        mask = places = None
        if (lengths != num_blocks * block_size).any():
            hidden = np.arange(num_blocks * block_size) >= lengths[:, None]
            values = np.where(hidden, np.float32(-np.inf), np.float32(0))
            mask = torch.from_numpy(values).to(self._device)[:, None, None, :]
            places = _indices(np.flatnonzero(hidden), self._device)
        rows = None if is_whole else _indices([batch.query_starts[index] for _, index in members], self._device)
        return _DecodeGroup(rows, _indices(blocks.ravel(), self._device), mask, places)

    # --- attention ---

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        num_kv_heads, head_dim = kv_cache.shape[3:]
        num_turned = num_heads + num_kv_heads
        x = qkv[:, : num_turned * head_dim].view(len(qkv), num_turned, head_dim)
        wide = x.float()
        turned = wide * cos.unsqueeze(1)
        x.copy_(turned.addcmul_(wide.roll(head_dim // 2, -1), sin.unsqueeze(1)))
        rows = kv_cache.view(len(kv_cache) * kv_cache.shape[1], -1)
        rows.index_copy_(0, slots, qkv[:, -rows.shape[1] :])

    def attention(self, qkv: torch.Tensor, num_heads: int, kv_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        out = qkv.new_empty(len(qkv), num_heads * kv_cache.shape[4])
        q = qkv[:, : out.shape[1]].view(len(qkv), num_heads, -1)
        if len(plan.groups) == 1 and plan.groups[0].rows is None:
            return _attend_group(q, kv_cache, plan.groups[0])
        for group in plan.groups:
            assert group.rows is not None, "a group of some rows names them"
            out.index_copy_(0, group.rows, _attend_group(q.index_select(0, group.rows), kv_cache, group))
        attend_chunks(gather, num_heads, plan.chunks, qkv, kv_cache, out)
        return out

    # --- elementwise ---

    def add_rms_norm(
        self, hidden: torch.Tensor, more: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if more is not None:
            hidden += more
        return _rms_norm(hidden, weight, eps)

    def norm_heads(self, qkv: torch.Tensor, heads: range, weight: torch.Tensor, eps: float) -> None:
        width = len(weight)
        x = qkv[:, heads.start * width : heads.stop * width].view(len(qkv), len(heads), width)
        x.copy_(_rms_norm(x, weight, eps))

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)


# --- prefill chunks ---


def plan_chunk(
    start: int, end: int, length: int, block_table: Sequence[int], block_size: int, device: torch.device
) -> Chunk:
    """Token rows [start, end), the last of a sequence of `length` positions so far."""
    if end - start == length:
        return Chunk(start, end, None, None, length)
    blocks = _indices(block_table[: -(-length // block_size)], device)
    # Row i of the chunk is position length - (end - start) + i, and sees every position up to itself.
    mask = torch.ones(end - start, length, dtype=torch.bool, device=device)
    return Chunk(start, end, blocks, mask.tril(length - (end - start)), length)


def attend_chunks(
    gather: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    num_heads: int,
    chunks: Sequence[Chunk],
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend each chunk and write its rows of `out` (num_tokens, num_heads * head_dim). `gather` gives the keys and
    values of some blocks of the cache, (2, num_kv_heads, positions, head_dim)."""
    for chunk in chunks:
        rows = slice(chunk.start, chunk.end)
        q = qkv[rows, : out.shape[1]].view(chunk.end - chunk.start, num_heads, -1)
        if chunk.blocks is None:
            kv = qkv[rows, out.shape[1] :].view(chunk.length, 2, *kv_cache.shape[3:]).permute(1, 2, 0, 3)
        else:
            kv = gather(kv_cache, chunk.blocks)[:, :, : chunk.length]
        out[rows].view(q.shape).copy_(_attend_chunk(q, kv, chunk.mask))


def _attend_chunk(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attend queries of one sequence, (rows, num_heads, head_dim), over `kv` (2, num_kv_heads, positions, head_dim)."""
    queries = q.transpose(0, 1).unsqueeze(0)
    out = F.scaled_dot_product_attention(
        queries,
        kv[0].unsqueeze(0),
        kv[1].unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=queries.shape[1] != kv.shape[1],
    )
    return out[0].transpose(0, 1)


def gather(kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Copy keys and values of some blocks, in order, to (2, num_kv_heads, positions, head_dim)."""
    num_kv_heads, head_dim = kv_cache.shape[3:]
    return kv_cache.index_select(0, blocks).view(-1, 2, num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _indices(values: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.int64)).to(device)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def _split(decodes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut a list of (number of blocks, index), longest first, into groups of similar length and bounded size."""
    groups: list[list[tuple[int, int]]] = []
    longest = 0
    for member in decodes:
        fits = groups and member[0] >= _MIN_FILL * longest - 1 and (len(groups[-1]) + 1) * longest <= _MAX_GROUP_BLOCKS
        if fits:
            groups[-1].append(member)
        else:
            groups.append([member])
            longest = member[0]
    return groups


def _attend_group(q: torch.Tensor, kv_cache: torch.Tensor, group: _DecodeGroup) -> torch.Tensor:
    """One query a sequence. The query heads that share a KV head take the place of query positions."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[3]
    kv = kv_cache.index_select(0, group.blocks)
    if group.hidden is not None:  # P10: a NaN that another sequence left there would pass the mask
        kv.view(-1, 2 * num_kv_heads * head_dim).index_fill_(0, group.hidden, 0)
    kv = kv.view(num_rows, -1, 2, num_kv_heads, head_dim)
    kv = kv.permute(2, 0, 3, 1, 4)  # (2, group, num_kv_heads, positions, head_dim)
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = None if group.mask is None else group.mask.to(q.dtype)
    out = F.scaled_dot_product_attention(grouped, kv[0], kv[1], attn_mask=mask)
    return out.reshape(num_rows, num_heads * head_dim)
