"""Products with a weight matrix on a CPU: a few rows at the speed at which memory gives the weights.

A matrix lies in *panels*: (num_panels, depth, width) lanes of 32 bits, `width` outputs side by side, so that a product
reads memory once and in order. A lane is one float32 weight, or four int8 weights of inputs that follow each other.

Measured, all layers of SmolLM2-135M on 2 cores with AVX-512, MKL's packed product and this one: 29 and 21 ms at 8 rows,
34 and 30 at 16, 42 and 41 at 32, 186 and 200 at 256.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir

from engine.device.kernels.compiled import HOST, for_any_size
from engine.device.kernels.vectors import (
    LANES,
    NUM_SUMS,
    at,
    of_floats,
    of_int8_at_once,
    of_int8_in_pairs,
    rows_times_panel,
)

# Measured, AVX2 emulated, a thread of a busy EPYC, all layers of SmolLM2-135M in panels of 2 vectors and of 3, one run
# of each and not in alternation: in float32 at 8 rows 45 and 28 ms, at 32 rows 94 and 104; in int8 at 1, 8 and 32 rows
# 11, 20 and 86 and 8, 12 and 51 (with 2 vectors and 8 sums: 45 at 32).
WIDTH = 2 * LANES if LANES == 16 else 3 * LANES
# The greatest magnitude of the whole numbers that stand for a row's numbers, for sums that are exact; None: no int8.
INT8_LEVELS = 127 if HOST.get("avx512vnni") else 63 if HOST.get("avx2") else None
_AHEAD = 64 * WIDTH  # lanes

_rows_times_floats = rows_times_panel(ir.FloatType(), of_floats)
_of_int8 = of_int8_at_once if INT8_LEVELS == 127 else of_int8_in_pairs
_rows_times_int8 = rows_times_panel(ir.IntType(32), _of_int8)


def pack(lanes: np.ndarray) -> np.ndarray:
    """(outputs, depth) in panels; the last one is filled up with zeros."""
    num_outputs, depth = lanes.shape
    panels = np.zeros((-(-num_outputs // WIDTH), depth, WIDTH), lanes.dtype)
    for first in range(0, num_outputs, WIDTH):
        part = lanes[first : first + WIDTH]
        panels[first // WIDTH, :, : len(part)] = part.T
    return panels


@for_any_size
def multiply(x, panels, bias, out):
    """`x` (rows, inputs) into `out` (rows, outputs), all float32; `bias` (outputs)."""
    num_rows, depth = x.shape
    num_outputs = out.shape[1]
    for index in numba.prange(len(panels)):
        first = index * WIDTH
        end = min(first + WIDTH, num_outputs)
        panel = at(panels, first * depth)
        if end - first == WIDTH:
            _rows_times_floats(
                WIDTH, NUM_SUMS, at(x, 0), depth, num_rows, depth, panel, _AHEAD, at(out, first), num_outputs
            )
        else:
            part = np.empty((num_rows, WIDTH), np.float32)
            _rows_times_floats(WIDTH, NUM_SUMS, at(x, 0), depth, num_rows, depth, panel, _AHEAD, at(part, 0), WIDTH)
            out[:, first:] = part[:, : end - first]
        if bias is not None:
            out[:, first:end] += bias[first:end]


def _multiply_int8(x, panels, offsets, scales, peaks, bias, out):
    """`x` (rows, inputs / 4) lanes of uint8 into `out` (rows, outputs) float32: the sums less the outputs' `offsets`,
    times their `scales` and the rows' `peaks` (rows, 1)."""
    num_rows, depth = x.shape
    num_outputs = out.shape[1]
    for index in numba.prange(len(panels)):
        first = index * WIDTH
        sums = np.empty((num_rows, WIDTH), np.int32)
        panel = at(panels, first * depth)
        _rows_times_int8(WIDTH, NUM_SUMS, at(x, 0), depth, num_rows, depth, panel, _AHEAD, at(sums, 0), WIDTH)
        for row in range(num_rows):
            for i in range(min(WIDTH, num_outputs - first)):
                out[row, first + i] = np.float32(sums[row, i] - offsets[first + i]) * scales[first + i] * peaks[row, 0]
                if bias is not None:
                    out[row, first + i] += bias[first + i]


multiply_int8 = for_any_size(_multiply_int8, fastmath=False)  # rounded as where oneDNN does the same
