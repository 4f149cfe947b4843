"""Bucket bounds of histograms: the families, and what an operator may replace. Pure.

Bounds follow vLLM's, so that recorded quantiles compare; `step_time` and `batch` are ours. A family's bounds are fixed
for a deployment's life: they are part of every tally's layout.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

Bounds = tuple[float, ...]

REQUEST_TOKENS: Final = "request_tokens"  # the one family whose bounds depend on the model
MAX_BOUNDS: Final = 200  # P9: no flag makes series without end

_ITL: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TTFT: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY: Final = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# Source: `latency_highr_buckets` of prometheus-fastapi-instrumentator, which vLLM's API server uses.
_HTTP_FINE: Final = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    *(half / 2 for half in range(2, 11)),
    7.5,
    10,
    30,
    60,
)

BUCKETS: Final[Mapping[str, Bounds]] = MappingProxyType(
    {
        "latency": _LATENCY,
        "ttft": (*_TTFT, 160, 640, 2560),
        "itl": _ITL,
        "iteration_tokens": tuple(2**e for e in (0, *range(3, 15))),
        REQUEST_TOKENS: (),
        "n": (1, 2, 5, 10, 20),
        "preemptions": (1, 2, 3, 4, 5, 10, 20),
        "step_time": tuple(0.0005 * 2**e for e in range(16)),
        "batch": tuple(2**e for e in range(11)),
        "http": (0.1, 0.5, 1),
        "http_fine": _HTTP_FINE,
    }
)

# For --latency-buckets fine: below 300 ms the latency family is blind.
FINE_LATENCY: Final[Bounds] = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, *_LATENCY)

# The keys of --custom-histogram-buckets, as vLLM names them, and the families they replace.
CUSTOM_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "request_latency": "latency",
        "time_to_first_token": "ttft",
        "inter_token_latency": "itl",
        "iteration_tokens": "iteration_tokens",
        "request_tokens": REQUEST_TOKENS,
        "request_params_n": "n",
        "request_num_preemptions": "preemptions",
    }
)


class BucketError(ValueError):
    """Bounds that make no histogram; the text shows them."""


def one_two_five(maximum: int) -> Bounds:
    """1, 2, 5, 10, 20, 50 … up to and including the last one not above `maximum`."""
    assert maximum >= 1, maximum
    series = (mantissa * 10**exponent for exponent in range(len(str(maximum))) for mantissa in (1, 2, 5))
    return tuple(float(bound) for bound in series if bound <= maximum)


def bounds_of(family: str, max_model_len: int, overrides: Mapping[str, Bounds]) -> Bounds:
    """The family's bounds in one deployment."""
    bounds = overrides.get(family) or BUCKETS[family] or one_two_five(max_model_len)
    return tuple(map(float, bounds))


def check_bounds(family: str, bounds: Sequence[Any]) -> Bounds:
    """The bounds as floats; raises BucketError unless they are finite, positive, growing and not too many."""
    if not isinstance(bounds, (list, tuple)) or not 1 <= len(bounds) <= MAX_BOUNDS:
        raise BucketError(f"bounds of {family} are not a list of 1 to {MAX_BOUNDS} numbers: {str(bounds)[:80]}")
    for bound in bounds:
        if type(bound) not in (int, float) or not 0 < bound < math.inf:
            raise BucketError(f"a bound of {family} is not a finite number above 0: {bound!r}")
    if any(low >= high for low, high in itertools.pairwise(bounds)):
        raise BucketError(f"bounds of {family} do not grow: {str(bounds)[:80]}")
    return tuple(map(float, bounds))


def parse_overrides(text: str) -> tuple[tuple[str, Bounds], ...]:
    """The value of --custom-histogram-buckets, a JSON object of CUSTOM_KEYS, as (family, bounds) pairs for
    `Shape.bucket_overrides`. Raises BucketError."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BucketError(f"no JSON: {error}: {text[:80]!r}") from error
    if not isinstance(raw, dict):
        raise BucketError(f"not a JSON object of histogram families: {text[:80]!r}")
    if unknown := sorted(set(raw) - set(CUSTOM_KEYS)):
        raise BucketError(f"unknown histogram families {unknown}; known: {', '.join(CUSTOM_KEYS)}")
    return tuple((CUSTOM_KEYS[key], check_bounds(key, bounds)) for key, bounds in raw.items())
