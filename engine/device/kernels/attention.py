"""Decode attention over the paged KV cache on a CPU, in float32, and how a block of that cache lies in memory.

A block's keys are *turned*: of each KV head (head_dim, block_size), so that one vector holds the same number of many
positions, and scores need no sums across a vector. Its values are (block_size, head_dim). Both are panels, and both
products are those of `engine.device.kernels.vectors`: the query heads of one KV head are the rows, so that keys and
values are read once for all of them.

    block:  K of head 0 (head_dim x block_size), K of head 1, ... V of head 0 (block_size x head_dim), V of head 1, ...

Measured, 30 layers of SmolLM2-135M at 200 positions on a busy EPYC, least of 40 in alternation, keys as they come and
this, cache in memory (and in the processor's own): AVX2 emulated, 32 sequences, one thread 36.5 and 22.4 ms (23.1 and
9.8), 1 sequence, two threads 0.74 and 0.56 (0.60 and 0.32); AVX-512 55.7 and 42.6 (35.1 and 16.9), 0.67 and 0.44 (0.60
and 0.29).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
import torch
from llvmlite import ir

from engine.device.kernels.compiled import Kernel, for_any_size
from engine.device.kernels.vectors import at, of_floats, rows_times_panel

_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)


@numba.njit(inline="always", fastmath=True)
def exp(x: np.float32) -> np.float32:
    """For x <= 0, within 2 units in the last place; the compiler makes it a vector's, which a library's is not."""
    x = max(x, np.float32(-87))
    whole = np.int32(x * _LOG2_E - np.float32(0.5))
    rest = x - np.float32(whole) * _LN_2_HIGH - np.float32(whole) * _LN_2_LOW
    series = np.float32(1 / 5040)
    series = series * rest + np.float32(1 / 720)
    series = series * rest + np.float32(1 / 120)
    series = series * rest + np.float32(1 / 24)
    series = series * rest + np.float32(1 / 6)
    series = series * rest + np.float32(0.5)
    series = series * rest + np.float32(1)
    series = series * rest + np.float32(1)
    return series * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


def gather(kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Copy keys and values of some blocks, in order, to (2, num_kv_heads, positions, head_dim)."""
    _, block_size, _, num_kv_heads, head_dim = kv_cache.shape
    parts = kv_cache.index_select(0, blocks).view(len(blocks), 2, num_kv_heads, -1)
    keys = parts[:, 0].unflatten(-1, (head_dim, block_size)).permute(1, 0, 3, 2)
    values = parts[:, 1].unflatten(-1, (block_size, head_dim)).permute(1, 0, 2, 3)
    return torch.stack((keys, values)).view(2, num_kv_heads, -1, head_dim)


@for_any_size
def rotate_and_store(qkv, num_heads, cos, sin, kv_cache, slots):
    """As in `engine.device.kernels.interface.Kernels`."""
    num_blocks, block_size, _, num_kv_heads, head_dim = kv_cache.shape
    blocks = kv_cache.reshape(num_blocks, 2, num_kv_heads, head_dim * block_size)
    half, first_key = head_dim // 2, num_heads * head_dim
    first_value = first_key + num_kv_heads * head_dim
    for row in numba.prange(len(qkv)):
        for first in range(0, first_value, head_dim):
            for i in range(half):
                one, two = qkv[row, first + i], qkv[row, first + half + i]
                qkv[row, first + i] = one * cos[row, i] + two * sin[row, i]
                qkv[row, first + half + i] = two * cos[row, half + i] + one * sin[row, half + i]
        block, position = blocks[slots[row] // block_size], slots[row] % block_size
        for kv_head in range(num_kv_heads):
            for i in range(head_dim):
                block[0, kv_head, i * block_size + position] = qkv[row, first_key + kv_head * head_dim + i]
                block[1, kv_head, position * head_dim + i] = qkv[row, first_value + kv_head * head_dim + i]


_queries_times_keys = rows_times_panel(ir.FloatType(), of_floats)
_weights_times_values = rows_times_panel(ir.FloatType(), of_floats, adds=True)


@numba.njit(fastmath=True)
def _scores_to_weights(scores, length, totals):
    """In place, before they are divided by their sums, which go to `totals`: (heads, positions), `length` of them."""
    for head in range(len(scores)):
        peak, total = np.float32(-np.inf), np.float32(0)
        for position in range(length):
            peak = max(peak, scores[head, position])
        for position in range(length):
            weight = exp(scores[head, position] - peak)
            scores[head, position] = weight
            total += weight
        totals[head] = total


@functools.cache
def attend_decodes(num_kv_heads: int, group: int, head_dim: int, block_size: int) -> Callable[[int], Kernel]:
    """For one shape of model: numbers that the compiler knows let it make vectors of the inner loops."""
    scale = np.float32(1 / np.sqrt(head_dim))
    head_lanes = head_dim * block_size
    block_lanes, first_value = 2 * num_kv_heads * head_lanes, num_kv_heads * head_lanes

    def kernel(qkv, kv_cache, rows, lengths, block_tables, num_parts, out):
        """Each sequence's heads are shared out among `num_parts`. First the scores of all its blocks, then their
        weights, then the sums of values: each block is fetched while the one before is gone through."""
        part_heads = num_kv_heads // num_parts
        part_rows = part_heads * group
        for item in numba.prange(len(rows) * num_parts):
            index, part = item // num_parts, item % num_parts
            row, length, table = rows[index], lengths[index], block_tables[index]
            num_blocks = (length + block_size - 1) // block_size
            stride, first = num_blocks * block_size, part * part_rows * head_dim
            first_key = part * part_heads * head_lanes
            q = qkv[row, first : first + part_rows * head_dim] * scale
            weights, attended = np.empty((part_rows, stride), np.float32), np.zeros((part_rows, head_dim), np.float32)
            totals = np.empty(part_rows, np.float32)
            for number in range(num_blocks):
                place = table[number] * block_lanes + first_key
                ahead = table[min(number + 1, num_blocks - 1)] * block_lanes + first_key - place
                for head in range(part_heads):
                    source, keys = at(q, head * group * head_dim), at(kv_cache, place + head * head_lanes)
                    scores = at(weights, head * group * stride + number * block_size)
                    _queries_times_keys(
                        block_size, group, source, head_dim, group, head_dim, keys, ahead, scores, stride
                    )
            _scores_to_weights(weights, length, totals)
            for number in range(num_blocks):
                place = table[number] * block_lanes + first_key + first_value
                ahead = table[min(number + 1, num_blocks - 1)] * block_lanes + first_key + first_value - place
                depth = min(block_size, length - number * block_size)
                for head in range(part_heads):
                    source = at(weights, head * group * stride + number * block_size)
                    values, sums = at(kv_cache, place + head * head_lanes), at(attended, head * group * head_dim)
                    _weights_times_values(head_dim, group, source, stride, group, depth, values, ahead, sums, head_dim)
            for member in range(part_rows):
                factor = np.float32(1) / totals[member]
                for i in range(head_dim):
                    out[row, first + member * head_dim + i] = attended[member, i] * factor

    return for_any_size(kernel)
