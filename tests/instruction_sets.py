"""A processor with AVX2 alone, played by one that has more: for tests and benchmarks of the code for it.

numba compiles for the processor that it is told of, and the kernels ask for no more; MKL, oneDNN and PyTorch keep to
the instruction set that each is told. Speeds are this processor's with those instructions, not another's.
"""

from __future__ import annotations

import os
from pathlib import Path

_FEATURES = "avx avx2 fma f16c bmi bmi2 lzcnt popcnt movbe sse3 ssse3 sse4.1 sse4.2 cx16 aes pclmul"


def as_avx2(cache: Path) -> dict[str, str]:
    """The environment of such a process; `cache` is where numba keeps what it compiles."""
    return {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in _FEATURES.split()),
        "NUMBA_CACHE_DIR": str(cache),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
