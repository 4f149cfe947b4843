"""What the scheduler hands to the runner for one iteration, and what comes back. Pure.

The one contract between scheduling and device code: the runner knows nothing else, and counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine.wire import SamplingParams, TokenLogprobs


@dataclass(slots=True)
class ScheduledSequence:
    """The part of one sequence that this iteration computes: positions [start, start + num_tokens).

    `token_ids` is the sequence's whole list, prompt then output; `block_table` holds the KV block of every
    position below start + num_tokens. Both are the request's own lists, read during `run` and not kept; so is this
    object, which the scheduler uses again in the next iteration.
    Positions below `start` are in the KV cache already.
    """

    sequence_id: int  # unique within the process, never reused
    token_ids: list[int]
    num_prompt_tokens: int
    start: int
    num_tokens: int
    block_table: list[int]
    sampling: SamplingParams

    @property
    def samples(self) -> bool:
        """Whether the newest token is computed here, so that a next one is sampled."""
        return self.start + self.num_tokens == len(self.token_ids)


@dataclass(slots=True)
class IterationCounts:
    """What one scheduled batch consists of, counted where it was decided; words as in metrics/README.md.

    Invariant: num_prefill_tokens + num_decode_tokens is the number of scheduled tokens. Decode is one scheduled
    position, the newest token, of a sequence whose prompt is computed; everything else is prefill, so also the last
    single position of a prompt.
    """

    num_requests: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_prompt_tokens_computed: int = 0  # prompt positions computed for the first time
    num_recomputed_tokens: int = 0  # positions below a request's high-water mark
    num_preemptions: int = 0  # made while scheduling this batch
    num_cache_queries: int = 0  # prompt tokens looked up in the prefix cache: first admissions only
    num_cache_hits: int = 0  # of these, found
    # Known once the batch has run:
    num_generated_tokens: int = 0
    num_completed_prompt_tokens: int = 0  # whole prompts of the sequences whose prefill this batch completed
    num_completed_cached_tokens: int = 0  # of these, found in the prefix cache
    num_sampling_faults: int = 0  # sequences that ended because no token could be sampled

    @property
    def num_scheduled_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def num_iteration_tokens(self) -> int:
        return self.num_prompt_tokens_computed + self.num_recomputed_tokens + self.num_generated_tokens

    @property
    def phase(self) -> str:
        """`prefill`, `decode` or `mixed`."""
        if not self.num_decode_tokens:
            return "prefill"
        return "mixed" if self.num_prefill_tokens else "decode"


@dataclass(slots=True)
class Batch:
    """One iteration's work; `sequences` is never empty. What the runner caught, and nobody ends by, is in `caught`."""

    sequences: list[ScheduledSequence]
    counts: IterationCounts = field(default_factory=IterationCounts)
    caught: list[Exception] = field(default_factory=list)


class SampledToken(NamedTuple):
    """One sampled token; or none, where `fault` says why this sequence has no next token. Only that sequence ends."""

    token_id: int
    logprobs: TokenLogprobs | None
    fault: str | None = None


class Runner(Protocol):
    """What computes batches: the model, or a stand-in for tests and for measuring the loop alone."""

    def run(self, batch: Batch) -> list[SampledToken]:
        """Compute the batch. One sampled token per sequence with `samples`, in the batch's order."""

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget what is kept per sequence: these ended and never come again."""
