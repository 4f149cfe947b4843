"""What a sequence may say next, where its request constrains it: a JSON schema, a regular expression, a grammar.

A constraint is a grammar in llguidance's words; API servers make and check it (`frontend.api.constraints`). Here it
becomes a mask over the vocabulary for each token that is sampled. What is kept of a sequence can be made again from its
tokens, so preemption and recomputation change nothing; an end token is allowed where the grammar is complete, and
nothing else is once it cannot go on.

P10: a grammar may be short and take seconds to follow (`(a{1000}){1000}`), and the whole batch waits for each mask. So
masks are made in a thread, which is waited for `MOST_S` and no longer: the sequence is then at fault, its grammar is
remembered, and the thread ends by itself, since llguidance bounds what it does. A grammar is built once for all
sequences that have it.

Measured, SmolLM2's vocabulary, a schema of two fields: 0.6 ms to begin, 3 to 113 µs a mask, 30 µs to ask the thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import llguidance.numpy as llguidance_numpy
import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.schedule import ScheduledSequence
from engine.vocabulary import TokenizerParts, token_bytes_of

MOST_S: Final = 0.5  # to build a grammar, and for each mask; a hundred times what usual ones need
MAX_LATE: Final = 2  # threads that have taken too long and still run
# P9: of the grammars that are known for the next sequence. A matcher takes some 80 KB, however short its grammar.
MAX_KNOWN: Final = 64
MAX_KNOWN_CHARS: Final = 2**19
# A state takes 1 to 2 KB, and each sequence has its own. An error would show the grammar, and be as long.
_LIMITS: Final = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


T = TypeVar("T")


class ConstraintError(ValueError):
    """The sequence's grammar, or its tokens under it, cannot be followed; the text says why."""


@dataclass(slots=True)
class _Followed:
    """A sequence's matcher, and how many generated tokens it knows."""

    matcher: LLMatcher
    num_consumed: int = 0


class Constraints:
    """The masks of one model's sequences. `load` reads the model's vocabulary, in a thread, from the beginning: the
    first sequence with a constraint shall not hold the others up."""

    def __init__(
        self,
        load: Callable[[], TokenizerParts],
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        most_s: float = MOST_S,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._most_s = most_s
        self._followed: dict[int, _Followed] = {}  # by sequence id
        self._known: OrderedDict[str, LLMatcher | str] = OrderedDict()  # by grammar: built, or why it is refused
        self._late: list[Future[Any]] = []
        self._begin()
        self._loading = self._thread.submit(self._make_tokenizer, load)

    def apply(self, row: torch.Tensor, sequence: ScheduledSequence) -> None:
        """Hide, in place, what the sequence may not say next. Raises ConstraintError."""
        followed = self._followed.get(sequence.sequence_id)
        grammar = sequence.sampling.constraint
        assert grammar is not None, "a sequence without a constraint has no mask"
        if followed is None:
            followed = self._followed[sequence.sequence_id] = _Followed(self._built(grammar).deep_copy())
        generated = sequence.token_ids[sequence.num_prompt_tokens :]
        new = generated[followed.num_consumed :]
        self._in_time(grammar, partial(_fill, self._mask, followed.matcher, new))
        followed.num_consumed = len(generated)
        allowed = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: len(row)]
        hidden = torch.from_numpy(allowed == 0).to(row.device)
        row[: len(hidden)].masked_fill_(hidden & row[: len(hidden)].isfinite(), -torch.inf)  # a NaN stays a fault

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Forget these sequences: they have ended."""
        for sequence_id in sequence_ids:
            self._followed.pop(sequence_id, None)

    def _built(self, grammar: str) -> LLMatcher:
        """The grammar's matcher at its beginning. Raises ConstraintError."""
        known = self._known.get(grammar)
        if known is None:
            tokenizer = self._loading.result()
            known = self._in_time(grammar, lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))
            self._know(grammar, known)
        self._known.move_to_end(grammar)
        if isinstance(known, str):
            raise ConstraintError(known)
        return known

    def _know(self, grammar: str, what: LLMatcher | str) -> None:
        self._known[grammar] = what
        self._known.move_to_end(grammar)
        while len(self._known) > MAX_KNOWN or (len(self._known) > 1 and sum(map(len, self._known)) > MAX_KNOWN_CHARS):
            self._known.popitem(last=False)

    def _in_time(self, grammar: str, work: Callable[[], T]) -> T:
        """What `work` returns. Raises ConstraintError, also where it takes too long, and then of the grammar at once
        from now on."""
        if isinstance(reason := self._known.get(grammar), str):
            raise ConstraintError(reason)
        self._late = [late for late in self._late if not late.done()]
        if len(self._late) >= MAX_LATE:
            raise ConstraintError("other constraints take too long")
        future = self._thread.submit(work)
        try:
            return future.result(self._most_s)
        except TimeoutError:
            self._late.append(future)
            self._thread.shutdown(wait=False)
            self._begin()
            self._know(grammar, f"the constraint takes more than {self._most_s:g} s to follow")
            raise ConstraintError(self._known[grammar]) from None

    def _begin(self) -> None:
        """A thread, and a mask of its own: one that is late still writes into the mask that it was given."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._mask = llguidance_numpy.allocate_token_bitmask(1, self._vocab_size)

    def _make_tokenizer(self, load: Callable[[], TokenizerParts]) -> LLTokenizer:
        wrapped = TokenizerWrapper(_WrappedTokenizer(load(), self._eos_token_ids))
        return LLTokenizer(wrapped, n_vocab=self._vocab_size, eos_token=sorted(self._eos_token_ids))


def _fill(mask: npt.NDArray[np.int32], matcher: LLMatcher, new: Sequence[int]) -> None:
    """What may come after these tokens too. Raises ConstraintError."""
    if new and not matcher.consume_tokens(list(new)):
        raise ConstraintError(f"the constraint does not allow what was sampled: {matcher.get_error()}")
    llguidance_numpy.fill_next_token_bitmask(matcher, mask)
    if matcher.is_error():
        raise ConstraintError(f"the constraint cannot be followed: {matcher.get_error()}")


class _WrappedTokenizer:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, parts: TokenizerParts, eos_token_ids: frozenset[int]) -> None:
        own, _, _ = token_bytes_of(parts.tokenizer)
        self._tokenizer = parts.tokenizer
        self.eos_token_id = min(eos_token_ids)
        self.tokens = [own[token] for token in range(parts.tokenizer.get_vocab_size(with_added_tokens=True))]
        added = parts.tokenizer.get_added_tokens_decoder()
        self.special_token_ids = sorted({token for token, one in added.items() if one.special} | eos_token_ids)

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
        return ids
