"""What a client asks of the sampler, for one sequence. Pure.

The bounds declared here hold twice: the API servers refuse what clients send beyond them (`bounds`), and the engine
checks again on arrival, because a message from another process is input from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from msgspec import Meta

from engine.bounds import Count, Finite

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_CONSTRAINT_CHARS = 2**18
# What float32 can compute with, whatever a model's (finite) logits are. Lower temperatures are raised to the least, as
# vLLM does; 0 stays greedy.
LEAST_TEMPERATURE = 0.01


class TokenLogprobs(NamedTuple):
    """Natural log probabilities (after no temperature or truncation) at one sampled position."""

    logprob: Finite  # of the sampled token
    rank: Count  # 1: the most probable
    top: tuple[tuple[Count, Finite], ...]  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One sequence's sampling parameters; names and defaults are OpenAI's and vLLM's.

    `temperature` 0 is greedy; between 0 and LEAST_TEMPERATURE it counts as that. `top_k` 0 means no limit. `seed` None
    lets the engine draw one.
    `logit_bias` is (token id, bias) pairs. `logprobs` is how many alternatives to report beside the sampled
    token (0: only the sampled token's own), None for none. `constraint` is a grammar in llguidance's words that the
    text must follow.
    """

    max_tokens: Annotated[int, Meta(ge=1)]
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: tuple[tuple[Count, Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]], ...] = ()
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    stop_token_ids: tuple[Count, ...] = ()
    ignore_eos: bool = False
    constraint: Annotated[str, Meta(max_length=MAX_CONSTRAINT_CHARS)] | None = None

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")

    def of_sequence(self, index: int) -> SamplingParams:
        """Those of one of n sequences of a request: with a seed, they do not draw alike."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + 2**63 + index) % 2**64 - 2**63)
