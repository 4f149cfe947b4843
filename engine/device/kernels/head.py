"""The output head: hidden states to logits, or at once to the best token of each row, which is all that greedy asks.

The best token can be found exactly without logits. A product in bfloat16, several times as fast where the processor has
instructions for it, gives each token a score, and its logit lies within bounds of that; the few tokens that may be the
best by these bounds, and no others, have their logits computed. Measured, the heads of SmolLM2-135M on 2 cores, logits
in float32 and this: 3.6 and 2.7 ms at 1 row, 3.9 and 2.5 at 8, 8.4 and 3.8 at 32, 27 and 5.5 at 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numba
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.device.kernels.compiled import HOST, compiled, for_any_size

Product = Callable[[torch.Tensor], torch.Tensor]  # (rows, hidden) to logits (rows, vocab), float32

NO_TOKEN = -1

_NOTHING = np.finfo(np.float32).min  # less than any logit
_LANES = 16  # rows are made a multiple of this many, which a processor's vectors hold
_TILE = 24576  # tokens scored at a time, so that their scores take little memory
_BLOCK = 128  # tokens of which the best score is looked at before each one's
_ROUNDING = 2.0**-8  # the greatest share of itself that a number loses when it becomes a bfloat16
_SLACK = 1.01  # for norms that were added up in float32
_LEAST = np.int16(-(2**15))


class Head(Protocol):
    """One model's output head."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) to (rows, vocab), float32."""

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) to the token with the greatest logit of each row, the first of equals: (rows), int64. NO_TOKEN
        where that logit is not finite, or a logit is no number."""


def make_head(weight: torch.Tensor, product: Product, quantization: str | None) -> Head:
    """The fastest for `weight` (vocab, hidden), where it is; `product` is the one with it."""
    is_exact = quantization is None and weight.dtype == torch.float32
    # Weights that are no numbers have no bounds.
    if is_exact and weight.device.type == "cpu" and HOST.get("avx512bf16") and bool(weight.isfinite().all()):
        return ScreeningHead(weight, product)
    return PlainHead(product)


class PlainHead:
    """Finds the best token by computing all logits."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._product(hidden)

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.logits(hidden)
        tokens = argmax(logits)  # of the first that is no number, where there is one
        if logits.device.type == "cpu":
            return _or_none(tokens, logits.numpy()[np.arange(len(logits)), tokens.numpy()])
        best = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
        return torch.where(best.isfinite(), tokens, NO_TOKEN)


def _or_none(tokens: torch.Tensor, logits: np.ndarray) -> torch.Tensor:
    """The tokens whose logits are finite. Measured, with the logits looked up: 5 µs a step, of which the head takes
    milliseconds."""
    is_finite = np.isfinite(logits)
    return tokens if is_finite.all() else tokens.masked_fill(torch.from_numpy(~is_finite), NO_TOKEN)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The best token of each row, the first of equals."""
    if logits.device.type == "cpu":  # Measured: 128 rows of 49152: 1.0 ms, by PyTorch 14.6 ms
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


class ScreeningHead(PlainHead):
    """With |x w - x' w'| <= |x - x'| |w'| + |x| |w - w'|, where x' and w' are x and w in bfloat16.

    A logit is here the exact sum of products, rounded to float32.
    """

    def __init__(self, weight: torch.Tensor, product: Product) -> None:
        super().__init__(product)
        self._weight = weight
        self._rounded = weight.bfloat16()
        self._norm = _SLACK * _longest(self._rounded.float())
        # A sum of n products in float32 is wrong by no more than 2^-23 of their magnitudes for each.
        self._error = _SLACK * _longest(weight - self._rounded.float()) + self._norm * weight.shape[1] * 2.0**-23

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        num_rows = len(hidden)
        rounded = F.pad(hidden, (0, 0, 0, -num_rows % _LANES)).bfloat16()
        x, weight, bounds = hidden.numpy(), self._weight.numpy(), np.empty(num_rows)
        _bounds(x, rounded.view(torch.int16).numpy(), self._norm, self._error, bounds)
        logits, tokens = np.full(num_rows, _NOTHING, np.float32), np.zeros(num_rows, np.int64)
        scores = rounded.new_empty(_TILE, len(rounded))
        for first in range(0, len(weight), _TILE):
            tile = self._rounded[first : first + _TILE]
            # Measured, 64 rows of 64 by 49152 on one core: W' X 0.6 ms, X' W 1.1
            torch.mm(tile, rounded.t(), out=scores[: len(tile)])
            found = scores[: len(tile)].view(torch.int16).numpy()
            _screen(found.size // _LANES)(found, first, bounds, x, weight, logits, tokens)
        tokens[logits == _NOTHING] = NO_TOKEN  # no logit of the row was a number
        return _or_none(torch.from_numpy(tokens), logits)


def _longest(rows: torch.Tensor) -> float:
    return float(rows.norm(dim=-1).max())


@numba.njit(inline="always")
def _to_float(bits: np.int16) -> np.float64:
    """Turn a bfloat16's bits into the float32 of the same value."""
    return np.float64(np.int32(np.int32(bits) << np.int32(16)).view(np.float32))


@numba.njit(inline="always")
def _in_order(bits: np.int16) -> np.int16:
    """A bfloat16's bits as a whole number that is greater where the bfloat16 is; its own inverse."""
    return np.int16(bits ^ np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF)))


@compiled
def _bounds(x, rounded, norm, error, bounds):  # type: ignore[no-untyped-def]
    """How far each row's scores may be from its logits, but for the scores' own rounding."""
    for row in range(len(x)):
        length, lost = np.float64(0), np.float64(0)
        for i in range(x.shape[1]):
            value = np.float64(x[row, i])
            difference = value - _to_float(rounded[row, i])
            length += value * value
            lost += difference * difference
        bounds[row] = np.sqrt(lost) * norm + np.sqrt(length) * error


@for_any_size
def _screen(scores, first, bounds, x, weight, logits, tokens):  # type: ignore[no-untyped-def]
    """Improve each row's best token, and its logit, by the tokens from `first` on, whose scores (tokens, rows) are
    given."""
    num_tokens, num_columns = scores.shape
    num_blocks = -(-num_tokens // _BLOCK)
    peaks, tops = np.full((num_blocks, num_columns), _LEAST, np.int16), np.full(num_columns, _LEAST, np.int16)
    for block in numba.prange(num_blocks):
        peak, part = peaks[block], scores[block * _BLOCK : (block + 1) * _BLOCK]
        for token in range(len(part)):
            line = part[token]
            for row in range(num_columns):
                peak[row] = max(peak[row], _in_order(line[row]))
    for block in range(num_blocks):
        peak = peaks[block]
        for row in range(num_columns):
            tops[row] = max(tops[row], peak[row])
    for row in numba.prange(len(x)):
        # One token has at least this logit. Whose score cannot stand for as much is not the best.
        top = _to_float(_in_order(tops[row]))
        least = max(top - _ROUNDING * abs(top) - bounds[row], np.float64(logits[row])) - bounds[row]
        least /= 1 + _ROUNDING if least > 0 else 1 - _ROUNDING
        for block in range(num_blocks):
            if _to_float(_in_order(peaks[block, row])) < least:
                continue
            for token in range(block * _BLOCK, min(num_tokens, (block + 1) * _BLOCK)):
                if _to_float(scores[token, row]) < least:
                    continue
                total = np.float64(0)
                for i in range(x.shape[1]):
                    total += np.float64(x[row, i]) * np.float64(weight[first + token, i])
                logit = np.float32(total)
                if logit > logits[row]:
                    logits[row], tokens[row] = logit, first + token
