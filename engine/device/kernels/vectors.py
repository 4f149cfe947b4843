"""The innermost loop of every product on a CPU, some rows times one panel, written in vectors by hand.

A *panel* is (depth, width) lanes of 32 bits. What a compiler does not find for it: sums that stay in registers over the
whole depth, and numbers that are fetched before they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from engine.device.kernels.compiled import HOST

# What a register holds, and how many registers sums may take: the others are for weights and for numbers of the rows.
LANES, NUM_SUMS = (16, 20) if HOST.get("avx512f") else (8, 12)
_MOST_VECTORS = 4  # across a panel, at a time
_UNROLLED = 4  # steps of depth between two looks at the loop's end
_FETCHED = 16  # lanes that one prefetch brings

_INDEX, _INT32 = ir.IntType(64), ir.IntType(32)

MultiplyAndAdd = Callable[[ir.IRBuilder, Any, Any, Any], Any]


@intrinsic
def at(context, array, offset):
    """The address of one number of a contiguous array."""

    def generate(codegen, builder, signature, arguments):
        array = codegen.make_array(signature.args[0])(codegen, builder, arguments[0])
        return builder.gep(array.data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is the same for every call of one product."""

    lane: ir.Type
    multiply_and_add: MultiplyAndAdd  # the instructions for a vector of sums, of numbers and of weights
    width: int  # of a panel
    most_rows: int  # at a time
    adds: bool  # to what is there, which is overwritten otherwise

    @property
    def lanes(self) -> int:
        """How many lanes a vector has: as many as divide the width."""
        return next(count for count in (16, 8, 4, 2, 1) if count <= LANES and self.width % count == 0)

    def column_groups(self) -> list[range]:
        """The first lane of each vector that is summed up at a time."""
        size = _MOST_VECTORS * self.lanes
        return [range(first, min(first + size, self.width), self.lanes) for first in range(0, self.width, size)]

    def row_counts(self, num_vectors: int) -> list[int]:
        """How many rows are taken at a time while there are as many."""
        most = min(self.most_rows, NUM_SUMS // num_vectors)
        return sorted({most, *(count for count in (8, 4, 3, 2, 1) if count < most)}, reverse=True)


def rows_times_panel(lane: ir.Type, multiply_and_add: MultiplyAndAdd, *, adds: bool = False) -> Any:
    """A function for kernels: `out[r, c]` = sum over k of `x[r, k] * panel[k, c]`.

    Of its arguments, width and most_rows are constants; x, panel and out are addresses; strides are those of rows, in
    lanes; `ahead` is how far from each number of the panel the one lies that is to be fetched meanwhile.
    """

    # NOTE: constants as arguments, not a function for each: a kernel that holds one of its own is not kept on disk.
    @intrinsic(prefer_literal=True)
    def multiply(  # noqa: PLR0913 - numba gives an intrinsic its arguments one by one
        context, width, most_rows, x, x_stride, num_rows, depth, panel, ahead, out, out_stride
    ):
        product = Product(
            lane=lane,
            multiply_and_add=multiply_and_add,
            width=width.literal_value,
            most_rows=most_rows.literal_value,
            adds=adds,
        )

        def generate(codegen, builder, signature, arguments):
            _, _, x, x_stride, num_rows, depth, panel, ahead, out, out_stride = arguments
            for columns in product.column_groups():
                done = _INDEX(0)
                for count in product.row_counts(len(columns)):
                    blocks = builder.udiv(builder.sub(num_rows, done), _INDEX(count))
                    with cgutils.for_range(builder, blocks) as loop:
                        row = builder.add(done, builder.mul(loop.index, _INDEX(count)))
                        block = _Block(builder, product, columns, count)
                        block.emit(
                            depth,
                            (builder.gep(x, [builder.mul(row, x_stride)]), x_stride),
                            (panel, ahead),
                            (builder.gep(out, [builder.mul(row, out_stride)]), out_stride),
                        )
                    done = builder.add(done, builder.mul(blocks, _INDEX(count)))
            return codegen.get_dummy_value()

        index = types.intp
        return types.void(width, most_rows, x, index, index, index, panel, index, out, index), generate

    return multiply


class _Block:
    """Emits the instructions for some columns and a number of rows that is known."""

    def __init__(self, builder: ir.IRBuilder, product: Product, columns: range, num_rows: int) -> None:
        self._builder = builder
        self._product = product
        self._columns = columns
        self._vector = ir.VectorType(product.lane, product.lanes)
        self._sums = [[cgutils.alloca_once(builder, self._vector) for _ in columns] for _ in range(num_rows)]

    def emit(self, depth: Any, x: tuple[Any, Any], panel: tuple[Any, Any], out: tuple[Any, Any]) -> None:
        """`x` and `out` with their strides, `panel` with how far ahead it is fetched."""
        builder = self._builder
        places = [
            [self._vector_at(self._at(out, row, _INDEX(column))) for column in self._columns]
            for row in range(len(self._sums))
        ]
        for sums, targets in zip(self._sums, places, strict=True):
            for total, target in zip(sums, targets, strict=True):
                start = builder.load(target, align=4) if self._product.adds else ir.Constant(self._vector, None)
                builder.store(start, total)
        whole = builder.mul(builder.udiv(depth, _INDEX(_UNROLLED)), _INDEX(_UNROLLED))
        with cgutils.for_range_slice(builder, _INDEX(0), whole, _INDEX(_UNROLLED)) as (k, _):
            for more in range(_UNROLLED):
                self._step(builder.add(k, _INDEX(more)), x, panel)
        with cgutils.for_range_slice(builder, whole, depth, _INDEX(1)) as (k, _):
            self._step(k, x, panel)
        for sums, targets in zip(self._sums, places, strict=True):
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=4)

    def _step(self, k: Any, x: tuple[Any, Any], panel: tuple[Any, Any]) -> None:
        """Multiply one number of each row by one line of the panel."""
        builder, lanes = self._builder, self._product.lanes
        address, ahead = panel
        weights = []
        for column in self._columns:
            place = builder.add(builder.mul(k, _INDEX(self._product.width)), _INDEX(column))
            weights.append(builder.load(self._vector_at(builder.gep(address, [place])), align=4))
            if column % _FETCHED == 0:
                _prefetch(builder, builder.gep(address, [builder.add(place, ahead)]))
        undefined, everywhere = ir.Constant(self._vector, ir.Undefined), ir.Constant(ir.VectorType(_INT32, lanes), None)
        for row, sums in enumerate(self._sums):
            number = builder.insert_element(undefined, builder.load(self._at(x, row, k)), _INT32(0))
            number = builder.shuffle_vector(number, undefined, everywhere)
            for total, weight in zip(sums, weights, strict=True):
                builder.store(self._product.multiply_and_add(builder, builder.load(total), number, weight), total)

    def _at(self, rows: tuple[Any, Any], row: int, column: Any) -> Any:
        address, stride = rows
        return self._builder.gep(address, [self._builder.add(self._builder.mul(_INDEX(row), stride), column)])

    def _vector_at(self, address: Any) -> Any:
        return self._builder.bitcast(address, self._vector.as_pointer())


# --- what is multiplied and added ---


def of_floats(builder: ir.IRBuilder, total: Any, number: Any, weight: Any) -> Any:
    """Add one product in every lane."""
    return builder.fadd(total, builder.fmul(number, weight, flags=["contract"]), flags=["contract"])


def of_int8_at_once(builder: ir.IRBuilder, total: Any, number: Any, weight: Any) -> Any:
    """Add four products of a uint8 and an int8 in every lane, by the one instruction for it (AVX-512 VNNI)."""
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, total, number, weight)


def of_int8_in_pairs(builder: ir.IRBuilder, total: Any, number: Any, weight: Any) -> Any:
    """Do the same by AVX2: sums of two products in 16 bits, then of two such sums.

    Exact for numbers up to 127 only: 2 * 127 * 127 < 2^15 <= 2 * 128 * 127; greater sums would saturate.
    """
    bytes_type, pairs_type = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
    bytes_ = [builder.bitcast(value, bytes_type) for value in (number, weight)]
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs_type, *bytes_)
    ones = ir.Constant(pairs_type, [1] * 16)
    return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Have the 64 bytes around an address fetched: into the second cache, a tenth faster than into the first."""
    bytes_type = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [bytes_type, _INT32, _INT32, _INT32])
    fetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(fetch, [builder.bitcast(address, bytes_type), _INT32(0), _INT32(2), _INT32(1)])


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)
