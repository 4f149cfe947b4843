"""How numba compiles a kernel here: kept on disk, nothing held that Python needs, and for one thread or for several.

Few numbers are gone through before other threads have woken, so each kernel exists twice. Compiled code is kept where
numba finds a place for it, and compiled at each start where there is none.
"""

from __future__ import annotations

import types as python_types
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Kernel = Callable[..., None]

_BYTES, _INT32 = ir.IntType(8).as_pointer(), ir.IntType(32)

HOST = llvmlite.binding.get_host_cpu_features()  # whether the processor has an instruction set, by its name
MAX_THREADS = numba.get_num_threads()  # cores, or what NUMBA_NUM_THREADS says
_MANY = 64 * 1024  # numbers to go through, from which on several threads are faster


@intrinsic
def fetch_ahead(context, array, offset):
    """Tell the processor to fetch the 64 bytes around a number of a contiguous array: it will be asked for soon."""

    def generate(codegen, builder, signature, arguments):
        array = codegen.make_array(signature.args[0])(codegen, builder, arguments[0])
        prefetch(builder, builder.gep(array.data, [arguments[1]]))
        return codegen.get_dummy_value()

    return types.void(array, types.intp), generate


def prefetch(builder, pointer):
    """The instruction for `fetch_ahead`: into the second cache, which is a tenth faster than into the first."""
    prefetch_type = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.bitcast(pointer, _BYTES), _INT32(0), _INT32(2), _INT32(1)])


def for_any_size(kernel: Kernel, *, fastmath: bool = True) -> Callable[[int], Kernel]:
    """By how many numbers there are to go through: the kernel for one thread or for several.

    `fastmath`: with sums in whatever order is fastest, as for PyTorch's own.
    """
    alone = compiled(kernel, fastmath=fastmath)
    # NOTE: under a name of its own, for the cache on disk tells functions apart by name, not by these options.
    renamed = python_types.FunctionType(kernel.__code__, kernel.__globals__, kernel.__name__, None, kernel.__closure__)
    renamed.__qualname__ = f"{kernel.__qualname__}_together"
    together = compiled(renamed, fastmath=fastmath, parallel=True)
    return lambda size: together if size >= _MANY else alone


def compiled(kernel: Kernel, **options: Any) -> Kernel:
    """For one thread, unless the options say otherwise."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        made: Kernel = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # no folder that it may write to
        made = numba.njit(**options)(kernel)
    return made
