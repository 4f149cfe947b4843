"""How numba compiles a kernel here: kept on disk, nothing held that Python needs, and for one thread or for several.

Few numbers are gone through before other threads have woken, so each kernel exists twice. Compiled code is kept where
numba finds a place for it, and compiled at each start where there is none.
"""

from __future__ import annotations

import os
import types as python_types
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba

Kernel = Callable[..., None]


def _host_features() -> dict[str, bool]:
    """Whether code may use an instruction set, by its name: what the processor has, or what numba is told to
    assume (NUMBA_CPU_NAME with NUMBA_CPU_FEATURES), as when one processor stands for another in a test."""
    told = os.environ.get("NUMBA_CPU_FEATURES")
    if told is None:
        return dict(llvmlite.binding.get_host_cpu_features())
    return {feature[1:]: feature[0] == "+" for feature in told.split(",") if feature}


HOST = _host_features()
INSTRUCTION_SET = "avx512" if HOST.get("avx512f") else "avx2" if HOST.get("avx2") else "other"
MAX_THREADS = numba.get_num_threads()  # cores, or what NUMBA_NUM_THREADS says
_MANY = 64 * 1024  # numbers to go through, from which on several threads are faster


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
