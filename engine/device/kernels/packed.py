"""Products with a weight matrix on a CPU: a few rows at the speed at which memory gives the weights.

A matrix lies in *panels*: (num_panels, depth, width) lanes of 32 bits, `width` outputs side by side, so that a product
reads memory once and in order. A lane is one float32 weight, or four int8 weights of inputs that follow each other.
The innermost loop, some rows times one panel, is written in vectors by hand, for that is what a compiler does not find:
sums that stay in registers over the whole depth, weights fetched ahead of their use.

Measured, all layers of SmolLM2-135M on 2 cores with AVX-512, MKL's packed product and this one: 29 and 21 ms at 8 rows,
34 and 30 at 16, 42 and 41 at 32, 186 and 200 at 256.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from engine.device.kernels.compiled import HOST, for_any_size, prefetch

_LANES = 16  # float32 numbers in a vector; where registers are narrower, the compiler takes two for one
HAS_INT8 = bool(HOST.get("avx512vnni"))
# Vectors in a panel's width, and how many rows are taken at a time: the sums of the most fill the registers.
_VECTORS, _ROWS_AT_A_TIME = (2, (10, 8, 4, 2, 1)) if HOST.get("avx512f") else (1, (6, 4, 2, 1))
WIDTH = _VECTORS * _LANES
_UNROLLED = 4  # steps of depth between two looks at the loop's end
_FETCHED_AHEAD = 64  # steps of depth

_INDEX, _INT32 = ir.IntType(64), ir.IntType(32)


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
        if end - first == WIDTH:
            _rows_times_floats(x, num_rows, depth, _at(panels, first * depth), _at(out, first), num_outputs)
        else:
            part = np.empty((num_rows, WIDTH), np.float32)
            _rows_times_floats(x, num_rows, depth, _at(panels, first * depth), _at(part, 0), WIDTH)
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
        _rows_times_int8(x, num_rows, depth, _at(panels, first * depth), _at(sums, 0), WIDTH)
        for row in range(num_rows):
            for i in range(min(WIDTH, num_outputs - first)):
                out[row, first + i] = np.float32(sums[row, i] - offsets[first + i]) * scales[first + i] * peaks[row, 0]
                if bias is not None:
                    out[row, first + i] += bias[first + i]


multiply_int8 = for_any_size(_multiply_int8, fastmath=False)  # rounded as where oneDNN does the same


# --- the innermost loop ---


@intrinsic
def _at(context, array, offset):
    """The address of one number of a contiguous array."""

    def generate(codegen, builder, signature, arguments):
        array = codegen.make_array(signature.args[0])(codegen, builder, arguments[0])
        return builder.gep(array.data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


def _rows_times_panel(lane, multiply_and_add):
    """out[r, c] = sum over k of x[r, k] * panel[k, c], for one panel's width; `stride`: of out's rows, in lanes.

    `multiply_and_add` gives the instructions for a vector of sums, of numbers and of weights.
    """

    @intrinsic
    def multiply(context, x, num_rows, depth, panel, out, stride):
        def generate(codegen, builder, signature, arguments):
            x, num_rows, depth, panel, out, stride = arguments
            x = codegen.make_array(signature.args[0])(codegen, builder, x).data
            done = _INDEX(0)
            for count in _ROWS_AT_A_TIME:
                blocks = builder.udiv(builder.sub(num_rows, done), _INDEX(count))
                with cgutils.for_range(builder, blocks) as loop:
                    row = builder.add(done, builder.mul(loop.index, _INDEX(count)))
                    place = [
                        builder.gep(array, [builder.mul(row, size)]) for array, size in ((x, depth), (out, stride))
                    ]
                    _block(builder, lane, multiply_and_add, count, place[0], depth, panel, place[1], stride)
                done = builder.add(done, builder.mul(blocks, _INDEX(count)))
            return codegen.get_dummy_value()

        return types.void(x, types.intp, types.intp, panel, out, types.intp), generate

    return multiply


def _block(builder, lane, multiply_and_add, num_rows, x, depth, panel, out, stride):
    """The instructions for a number of rows that is known."""
    vector = ir.VectorType(lane, _LANES)
    undefined, everywhere = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_INT32, _LANES), None)

    def at(pointer, row, row_stride, column):
        return builder.gep(pointer, [builder.add(builder.mul(row, row_stride), column)])

    def vector_at(*place):
        return builder.bitcast(at(*place), vector.as_pointer())

    def step(k):
        weights = []
        for column in columns:
            weights.append(builder.load(vector_at(panel, k, _INDEX(WIDTH), column), align=4))
            prefetch(builder, at(panel, builder.add(k, _INDEX(_FETCHED_AHEAD)), _INDEX(WIDTH), column))
        for row, totals in enumerate(sums):
            number = builder.insert_element(undefined, builder.load(at(x, _INDEX(row), depth, k)), _INT32(0))
            number = builder.shuffle_vector(number, undefined, everywhere)
            for total, weight in zip(totals, weights, strict=True):
                builder.store(multiply_and_add(builder, builder.load(total), number, weight), total)

    columns = [_INDEX(number * _LANES) for number in range(_VECTORS)]
    sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in range(num_rows)]
    for totals in sums:
        for total in totals:
            builder.store(ir.Constant(vector, None), total)
    whole = builder.mul(builder.udiv(depth, _INDEX(_UNROLLED)), _INDEX(_UNROLLED))
    with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(_UNROLLED)) as (k, _):
        for more in range(_UNROLLED):
            step(builder.add(k, _INDEX(more)))
    with cgutils.for_range_slice(builder, whole, depth, _INDEX(1)) as (k, _):
        step(k)
    for row, totals in enumerate(sums):
        for total, column in zip(totals, columns, strict=True):
            builder.store(builder.load(total), vector_at(out, _INDEX(row), stride, column), align=4)


def _of_floats(builder, total, number, weight):
    return builder.fadd(total, builder.fmul(number, weight, flags=["contract"]), flags=["contract"])


def _of_int8(builder, total, number, weight):
    """Four products of a uint8 and an int8 in every lane."""
    signature = ir.FunctionType(total.type, [total.type] * 3)
    product = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(product, [total, number, weight])


_rows_times_floats = _rows_times_panel(ir.FloatType(), _of_floats)
_rows_times_int8 = _rows_times_panel(_INT32, _of_int8)
