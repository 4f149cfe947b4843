"""Requests that arrive as in life: at random instants, of mixed lengths, whether or not earlier ones are answered.

Arrivals are a Poisson process of a seed of its own, so that all sides get the same; at another rate the same requests
come closer together. *Goodput* is the highest rate at which 99 % of requests get their first token within a second and,
each of them, 99 % of its further tokens within 150 ms of the one before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.benchmarks.sse_client import Answer, Arrival

PROMPT_TOKENS = (16, 400)
OUTPUT_TOKENS = (8, 128)
SHARE = 0.99
TTFT_S, ITL_S = 1.0, 0.15


def poisson(rate: float, duration_s: float, seed: int) -> list[Arrival]:
    """About `rate` requests a second for so long; at least one."""
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = 0.0
    while not arrivals or at_s < duration_s:
        prompt = [source.randrange(300, 40_000) for _ in range(source.randint(*PROMPT_TOKENS))]
        arrivals.append(Arrival(at_s, prompt, source.randint(*OUTPUT_TOKENS)))
        at_s += source.expovariate(1) / rate
    return arrivals


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def is_good(answer: Answer) -> bool:
    return answer.first_s <= TTFT_S and (not answer.gaps_s or quantile(answer.gaps_s, SHARE) <= ITL_S)


def good_share(answers: Sequence[Answer]) -> float:
    return sum(map(is_good, answers)) / len(answers)


def highest(holds: Callable[[float], bool], low: float, high: float, trials: int) -> float:
    """The highest rate found at which it holds, by bisection of the ratio: 0 if it holds at none that was tried."""
    found = 0.0
    for _ in range(trials):
        rate = (low * high) ** 0.5
        if holds(rate):
            found = low = rate
        else:
            high = rate
    return found
