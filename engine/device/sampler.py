"""Hidden states and sampling parameters to tokens, a whole batch at a time.

Stateless: everything is derived from the sequence's tokens, so preemption and recomputation change nothing. The order
of operations is vLLM's: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p. A constraint hides what it
does not allow before temperature.

Randomness is one number in [0, 1) for each token, a hash of (seed, number of tokens generated so far); the token is
where the cumulative distribution, in vocabulary order, passes it: first the block of tokens, then the token in it. So
the batch that a sequence happens to be in, a preemption or a restart cannot change a seeded sample. Sequences without a
seed get one from the engine's seed and their id.

Candidates are cut by a threshold on logits, so tokens that tie at the cut stay together.

P10: what breaks in one sequence's sampling (logits that are not finite, parameters that exclude every token, a bug that
its parameters meet) is that sequence's fault, and the others of the batch get their tokens. What breaks the sampling of
them all together, and of none alone, ends nobody and is told. What the forward pass or the head raises ends the engine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from engine.device.constraints import Constraints
from engine.device.kernels import Head, argmax
from engine.schedule import LEAST_TEMPERATURE, SampledToken, SamplingParams, ScheduledSequence, TokenLogprobs

_NUM_CANDIDATES = 256  # sorted first for top_p
_MORE_CANDIDATES = 8  # times as many next, where the distribution is flatter than that
_RESOLUTION = 48  # bits of the random number: u * total < total holds for every total
_BELOW_ONE = 1 - 2.0**-_RESOLUTION
# Tokens that are added up before any is looked at. Measured: 128 random rows of 49152: 14 ms, as one sum each 84 ms.
_BLOCK_SIZE = 256
_NOTHING_TO_SAMPLE = SampledToken(
    -1, None, "no token can be sampled: the model's logits are not finite, or the parameters exclude every token"
)


class Sampler:
    """Holds what is the same for every batch: the head, the seed and the end tokens."""

    def __init__(
        self, head: Head, *, seed: int, eos_token_ids: frozenset[int], constraints: Constraints | None = None
    ) -> None:
        self._head = head
        self._constraints = constraints
        self._seed = seed
        self.eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def sample(
        self,
        hidden: torch.Tensor,
        sequences: Sequence[ScheduledSequence],
        on_caught: Callable[[Exception], None] = lambda error: None,
    ) -> list[SampledToken]:
        """One token for each row of `hidden` (num_sequences, hidden), or the fault of that row's sequence. `on_caught`
        is told what the whole batch's sampling raised where no sequence alone does.

        Raises what the head raises: it is a part of the model, and its fault is the whole batch's."""
        greedy: list[int] = []
        other: list[int] = []
        for row, sequence in enumerate(sequences):
            (other if _needs_logits(sequence.sampling) else greedy).append(row)
        sampled: dict[int, SampledToken] = {}
        if greedy:
            best = self._head.best(_pick(hidden, greedy))
            found = [_NOTHING_TO_SAMPLE if token < 0 else SampledToken(token, None) for token in best.tolist()]
            sampled.update(zip(greedy, found, strict=True))
        if other:
            found = self._sample_apart(_pick(hidden, other), [sequences[row] for row in other], on_caught)
            sampled.update(zip(other, found, strict=True))
        # A head may make numbers of what is none. The sum is finite only if all is, and float16's own would overflow.
        if not hidden.sum(dtype=torch.float32).isfinite():
            for row in (~hidden.isfinite().all(-1)).nonzero().flatten().tolist():
                sampled[row] = _NOTHING_TO_SAMPLE
        return [sampled[row] for row in range(len(sequences))]

    def _sample_apart(
        self, hidden: torch.Tensor, sequences: Sequence[ScheduledSequence], on_caught: Callable[[Exception], None]
    ) -> list[SampledToken]:
        """The bulkhead between sequences: where one of them breaks the batch's sampling, each is sampled alone."""
        logits = self._head.logits(hidden)
        try:
            return self._sample_logits(logits, sequences)
        except Exception as error:  # noqa: BLE001 - whose fault it is shows when each is sampled alone
            caught = error
        # They were changed in place. Computed for the whole batch again, they are the same to the last bit.
        logits = self._head.logits(hidden)
        found = [self._sample_alone(logits[row : row + 1], sequence) for row, sequence in enumerate(sequences)]
        if all(token.fault is None for token in found):
            on_caught(caught)
        return found

    def _sample_alone(self, logits: torch.Tensor, sequence: ScheduledSequence) -> SampledToken:
        try:
            return self._sample_logits(logits, [sequence])[0]
        except Exception as error:  # noqa: BLE001 - this sequence's fault, which is counted and logged
            return SampledToken(-1, None, f"sampling failed: {type(error).__name__}: {error!s:.200}")

    def _sample_logits(self, logits: torch.Tensor, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        """One token for each row of `logits` (num_sequences, vocab), float32. The logits are changed in place."""
        reported = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        raw = logits[reported].log_softmax(-1) if reported else None
        for row, sequence in enumerate(sequences):
            if _adjusts(sequence.sampling):
                self._adjust(logits[row], sequence)
        tokens = argmax(logits)
        is_sampled = logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite()
        random_rows = [row for row, s in enumerate(sequences) if s.sampling.temperature > 0]
        if random_rows:
            chosen, is_drawn = self._draw(logits[random_rows], [sequences[row] for row in random_rows])
            tokens[random_rows] = chosen
            is_sampled[random_rows] &= is_drawn
        token_ids: list[int] = tokens.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if raw is not None:
            counts = [sequences[row].sampling.logprobs or 0 for row in reported]
            logprobs = dict(zip(reported, _report(raw, tokens[reported], counts), strict=True))
        return [
            SampledToken(token, logprobs.get(row)) if is_one else _NOTHING_TO_SAMPLE
            for row, (token, is_one) in enumerate(zip(token_ids, is_sampled.tolist(), strict=True))
        ]

    def _adjust(self, row: torch.Tensor, sequence: ScheduledSequence) -> None:
        """Apply to one row, in place, what depends on its own tokens."""
        sampling, num_prompt = sequence.sampling, sequence.num_prompt_tokens
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            row.index_add_(0, torch.tensor(tokens, device=row.device), row.new_tensor(biases))
        if len(sequence.token_ids) - num_prompt < sampling.min_tokens:
            ends = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)]
            places = torch.tensor(ends, dtype=torch.int64, device=row.device)
            row[places] = row[places].masked_fill(row[places].isfinite(), -torch.inf)  # a NaN stays, for it is a fault
        if sampling.repetition_penalty != 1.0:
            seen = torch.unique(torch.tensor(sequence.token_ids, device=row.device))
            values = row[seen]
            penalty = sampling.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            output = torch.tensor(sequence.token_ids[num_prompt:], dtype=torch.int64, device=row.device)
            seen, times = torch.unique(output, return_counts=True)
            row[seen] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if sampling.constraint is not None:
            assert self._constraints is not None, "there is nobody to follow a constraint"
            self._constraints.apply(row, sequence)

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget what is kept of these sequences."""
        if self._constraints is not None:
            self._constraints.release(sequence_ids)

    def _draw(self, logits: torch.Tensor, sequences: Sequence[ScheduledSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """One random token a row, and whether there was one to draw. The logits are changed in place."""
        parameters = [sequence.sampling for sequence in sequences]
        logits /= logits.new_tensor([max(p.temperature, LEAST_TEMPERATURE) for p in parameters]).unsqueeze(1)
        _cut(logits, parameters)
        numbers = torch.tensor([self._number(sequence) for sequence in sequences], dtype=torch.float64)
        return _invert(logits.softmax(-1), numbers.to(logits.device).unsqueeze(1))

    def _number(self, sequence: ScheduledSequence) -> float:
        """A number in [0, 1) from the sequence's seed and how many tokens it has generated."""
        seed = sequence.sampling.seed
        position = len(sequence.token_ids) - sequence.num_prompt_tokens
        if seed is None:
            key = struct.pack("<cqqq", b"e", _signed(self._seed), sequence.sequence_id, position)
        else:
            key = struct.pack("<cqq", b"s", seed, position)
        raw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return (raw >> (64 - _RESOLUTION)) * 2.0**-_RESOLUTION


def _pick(hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return hidden if len(rows) == len(hidden) else hidden[rows]


def _needs_logits(sampling: SamplingParams) -> bool:
    """Whether a sequence needs its logits; otherwise its best token is all that it asks for."""
    return sampling.temperature > 0 or sampling.logprobs is not None or _adjusts(sampling)


def _invert(probabilities: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at which each row's cumulative distribution passes its number, `numbers` (rows, 1) in [0, 1); and
    whether it does, which it does not where the probabilities are not finite."""
    num_rows, vocab_size = probabilities.shape
    if missing := -vocab_size % _BLOCK_SIZE:
        probabilities = F.pad(probabilities, (0, missing))
    blocks = probabilities.view(num_rows, -1, _BLOCK_SIZE)
    masses = blocks.sum(-1).double()
    cumulative = masses.cumsum(-1)
    targets = numbers * cumulative[:, -1:]
    is_passed = cumulative[:, -1].isfinite()
    block = torch.searchsorted(cumulative, targets, right=True).clamp_(max=blocks.shape[1] - 1)
    mass = masses.gather(1, block)
    # Held below 1: added up token by token, a block's mass may differ in its last bits.
    share = ((targets - cumulative.gather(1, block) + mass) / mass).clamp_(0.0, _BELOW_ONE)
    inside = blocks[torch.arange(num_rows, device=block.device), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (block * _BLOCK_SIZE + token).squeeze(1).clamp_(max=vocab_size - 1), is_passed


def _signed(seed: int) -> int:
    """An operator's seed of any size, as 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _adjusts(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.min_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.constraint is not None
    )


def _cut(logits: torch.Tensor, parameters: Sequence[SamplingParams]) -> None:
    """Hide, in place, the tokens that min_p, top_k and top_p exclude, of the rows that ask for it."""
    with_min_p = [row for row, p in enumerate(parameters) if p.min_p > 0]
    if with_min_p:
        rows = logits[with_min_p]
        shares = logits.new_tensor([parameters[row].min_p for row in with_min_p]).unsqueeze(1)
        logits[with_min_p] = rows.masked_fill(rows < rows.amax(-1, keepdim=True) + shares.log(), -torch.inf)
    vocab_size = logits.shape[1]
    cut = [row for row, p in enumerate(parameters) if 0 < p.top_k < vocab_size or p.top_p < 1]
    if cut:
        rows = logits[cut]
        logits[cut] = rows.masked_fill(rows < _thresholds(rows, [parameters[row] for row in cut]), -torch.inf)


def _thresholds(
    logits: torch.Tensor, parameters: Sequence[SamplingParams], num_candidates: int = _NUM_CANDIDATES
) -> torch.Tensor:
    """The least logit that top_k and then top_p let in, (rows, 1).

    Only the best candidates of each row are sorted; where they do not settle it, more of that row are.
    """
    vocab_size = logits.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in parameters]
    num_candidates = min(vocab_size, max(num_candidates, *(k for k in top_k if k < vocab_size), 1))
    limits = torch.tensor(top_k, device=logits.device).unsqueeze(1)
    shares = logits.new_tensor([p.top_p for p in parameters], dtype=torch.float64).unsqueeze(1)
    candidates = logits.topk(num_candidates, -1).values.double()
    inside = torch.arange(num_candidates, device=logits.device) < limits
    masses = (candidates - candidates[:, :1]).exp() * inside
    # What top_p is a share of: the whole row, or its best top_k tokens.
    row_mass = (logits.logsumexp(-1, keepdim=True).double() - candidates[:, :1]).exp()
    total = torch.where(limits < vocab_size, masses.sum(-1, keepdim=True), row_mass)
    mass_before = masses.cumsum(-1) - masses
    kept = inside & ((mass_before < shares * total) | (shares == 1))
    kept[:, 0] = True
    thresholds = candidates.gather(1, kept.sum(-1, keepdim=True) - 1).to(logits.dtype)
    is_open = kept[:, -1] & (limits.squeeze(1) > num_candidates)
    if num_candidates < vocab_size and bool(is_open.any()):
        rows = is_open.nonzero().flatten()
        rest = [parameters[row] for row in rows.tolist()]
        thresholds[rows] = _thresholds(logits[rows], rest, _MORE_CANDIDATES * num_candidates)
    return thresholds


def _report(logprobs: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """What is said of each sampled token; `logprobs` (rows, vocab) of the unchanged logits, `counts` alternatives."""
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1).add_(1).tolist()
    best = logprobs.topk(min(max(*counts, 1), logprobs.shape[1]), -1)
    values, indices = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprobs(own, rank, tuple(zip(indices[row][:count], values[row][:count], strict=True)))
        for row, (own, rank, count) in enumerate(zip(chosen.squeeze(1).tolist(), ranks, counts, strict=True))
    ]
