"""A wall clock that somebody sets again and again, by months in either direction. Leases must not care."""

from __future__ import annotations

import random
import time

JUMP_S = 1e7


def install() -> None:
    """In this process, for good."""
    real, source = time.time, random.Random(0)
    time.time = lambda: real() + source.uniform(-JUMP_S, JUMP_S)
