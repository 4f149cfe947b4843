"""How many prompt tokens may join an iteration in which others decode, so that these do not wait long. Pure.

Whoever decodes gets one token an iteration, however many prompt tokens are computed in it. A budget of tokens bounds
what an iteration computes; this bounds how long it takes: from what each took, the number of prompt tokens follows with
which the next will take about as long as is wanted. It depends on nothing but what it was told.
"""

from __future__ import annotations

from typing import Final

FEWEST_TOKENS: Final = 32  # fewer cost a CPU hardly less
# Prompts get on as fast as decodes end, whatever is wanted: else the prompts would wait, and the batch run empty.
TOKENS_PER_DECODE: Final = 8
_FIRST_TOKENS: Final = 64.0
_MOST_SHRINKING, _MOST_GROWTH = 0.5, 1.25  # in one iteration: one that was slow by chance costs little


class Pace:
    """The number of prompt tokens, and how it follows the durations of mixed iterations."""

    __slots__ = ("_most_tokens", "_num_tokens", "_wanted_s")

    def __init__(self, wanted_s: float, most_tokens: int) -> None:
        self._wanted_s = wanted_s
        self._most_tokens = most_tokens
        self._num_tokens = min(_FIRST_TOKENS, float(most_tokens))

    def limit(self, num_decodes: int) -> int:
        """Prompt tokens beside so many decodes; any number where nobody decodes."""
        if not num_decodes:
            return self._most_tokens
        fewest = max(FEWEST_TOKENS, TOKENS_PER_DECODE * num_decodes)
        return min(self._most_tokens, max(fewest, int(self._num_tokens)))

    def observe(self, num_prefill_tokens: int, num_decodes: int, duration_s: float) -> None:
        """An iteration ran. If it took longer than is wanted, its prompt tokens were too many; if not, and it had as
        many as it might, more will do."""
        if not num_prefill_tokens or not num_decodes or duration_s <= 0:
            return
        factor, before = self._wanted_s / duration_s, self._num_tokens
        if factor < 1:
            found = min(before, max(num_prefill_tokens * factor, before * _MOST_SHRINKING))
        elif num_prefill_tokens >= int(before):
            found = num_prefill_tokens * min(factor, _MOST_GROWTH)
        else:
            return
        self._num_tokens = min(float(self._most_tokens), max(float(FEWEST_TOKENS), found))
