"""What a client asks of the sampler, for one sequence. Pure.

The API servers validate what clients send; the engine checks again on arrival (`SamplingParams.check`), because
a message from another process is input from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MAX_LOGPROBS = 20
# What float32 can compute with, whatever a model's (finite) logits are. Lower temperatures are raised to the least, as
# vLLM does; 0 stays greedy.
LEAST_TEMPERATURE = 0.01
LEAST_REPETITION_PENALTY, GREATEST_REPETITION_PENALTY = 0.01, 100.0


class TokenLogprobs(NamedTuple):
    """Natural log probabilities (after no temperature or truncation) at one sampled position."""

    logprob: float  # of the sampled token
    rank: int  # 1: the most probable
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One sequence's sampling parameters; names and defaults are OpenAI's and vLLM's.

    `temperature` 0 is greedy; between 0 and LEAST_TEMPERATURE it counts as that. `top_k` 0 means no limit. `seed` None
    lets the engine draw one.
    `logit_bias` is (token id, bias) pairs. `logprobs` is how many alternatives to report beside the sampled
    token (0: only the sampled token's own), None for none.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise ValueError naming the first parameter that is out of range, and its value."""
        rules = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens),
            ("temperature", self.temperature, 0.0 <= self.temperature <= 2.0),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0),
            (
                "repetition_penalty",
                self.repetition_penalty,
                LEAST_REPETITION_PENALTY <= self.repetition_penalty <= GREATEST_REPETITION_PENALTY,
            ),
            ("presence_penalty", self.presence_penalty, -2.0 <= self.presence_penalty <= 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0 <= self.frequency_penalty <= 2.0),
            ("seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**63),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS),
            ("logit_bias", self.logit_bias, all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias)),
        )
        for name, value, holds in rules:
            if not holds:
                raise ValueError(f"{name} is out of range: {value!r}")
