"""Which tokens of which requests run in this iteration. Pure.

Continuous batching under a token budget. Each iteration serves, in this order, within `max_num_batched_tokens`:

1. every running request that needs one more position: decodes;
2. the next prompt chunk of running requests that are still in prefill;
3. requests from the waiting queue, while there are blocks for the whole of what is known of them.

Where somebody decodes, the tokens of 2 and 3 are bounded further by what iterations cost (`engine.schedule.pace`).
Within each, by `RequestState.order`: priority (all have the same, unless the operator lets clients choose), then
arrival. The head of the queue is never overtaken.

Blocks are taken for the whole known sequence at admission and one at a time while it grows, so only a decode can run
out of them. Then the last in order among the running gives up its blocks and goes back to the queue; it is recomputed
later, from the prefix cache where that still holds its blocks. Nothing is admitted in an iteration that preempted.

Why this always gets on: a sequence that the whole cache could not hold ends by `error` before it is queued or as soon
as it has grown so far; so the first in order always finds blocks, is never the victim, and is served or waits
only for earlier phases, whose requests are served instead and end in finite time.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from engine.config import SchedulerConfig
from engine.schedule.batch import Batch, IterationCounts, SampledToken
from engine.schedule.block_pool import BlockPool, extend_hashes
from engine.schedule.pace import Pace
from engine.schedule.request import RequestState
from engine.wire import Submit

_ORDER = attrgetter("order")


class Scheduler:
    """The queue, the running requests and their blocks. `schedule` and `update` alternate."""

    __slots__ = (
        "_budget",
        "_config",
        "_eos_token_ids",
        "_in_flight",
        "_longest_chunk",
        "_max_model_len",
        "_pace",
        "_pool",
        "_requests",
        "_running",
        "_scheduled",
        "_vocab_size",
        "_waiting",
    )

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        suited_budget: int = 2048,
        suited_iteration_s: float | None = None,
    ) -> None:
        self._config = config
        self._budget = config.budget(suited_budget, max_model_len)
        self._pool = pool
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._longest_chunk = self._budget
        if config.enable_chunked_prefill and config.long_prefill_token_threshold:
            self._longest_chunk = min(self._longest_chunk, config.long_prefill_token_threshold)
        # Who chose the length of chunks has chosen how long others wait for them.
        is_paced = config.enable_chunked_prefill and not config.long_prefill_token_threshold
        self._pace = Pace(suited_iteration_s, self._budget) if suited_iteration_s and is_paced else None
        self._requests: dict[int, RequestState] = {}  # running and waiting, by sequence id
        self._running: list[RequestState] = []  # in order
        self._waiting: list[RequestState] = []  # in order
        self._scheduled: list[RequestState] = []  # whom the batch in flight serves, in its order
        self._in_flight: Batch | None = None

    # --- what may come, and what is there ---

    def refusal(self, submit: Submit) -> str | None:
        """Why this can never run here, or None."""
        prompt, sampling, config = submit.prompt_token_ids, submit.sampling, self._config
        if not prompt:
            return "the prompt is empty"
        if submit.priority and config.scheduling_policy != "priority":
            return f"the priority is {submit.priority}; this engine serves who came first"
        if len(prompt) + 1 > self._max_model_len:
            return (
                f"the prompt has {len(prompt)} tokens; with one token to generate it exceeds"
                f" the context of {self._max_model_len}"
            )
        if len(prompt) > self._pool.num_tokens:
            return f"the prompt has {len(prompt)} tokens; the KV cache holds {self._pool.num_tokens}"
        if len(prompt) > self._budget and not config.enable_chunked_prefill:
            return (
                f"the prompt has {len(prompt)} tokens; without chunked prefill an iteration takes"
                f" at most {self._budget}"
            )
        biased = [token for token, _ in sampling.logit_bias]
        for what, tokens in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids), ("logit_bias", biased)):
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self._vocab_size:
                    return f"{what} holds token {token}; the vocabulary has {self._vocab_size}"
        return None

    def add(self, request: RequestState) -> None:
        """Queue a request that `refusal` has nothing against."""
        assert request.sequence_id not in self._requests, f"sequence {request.sequence_id} is here already"
        sampling = request.sampling
        request.length_limit = min(
            request.num_prompt_tokens + sampling.max_tokens, self._max_model_len, self._pool.num_tokens + 1
        )
        request.end_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            request.end_token_ids |= self._eos_token_ids
        self._requests[request.sequence_id] = request
        insort(self._waiting, request, key=_ORDER)

    def abort(self, sequence_id: int) -> RequestState | None:
        """Take a request out, wherever it is; None when it has ended before."""
        assert self._in_flight is None, "abort between iterations"
        request = self._requests.get(sequence_id)
        if request is None:
            return None
        (self._running if request.block_table else self._waiting).remove(request)
        self._end(request, "abort")
        return request

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting_capacity(self) -> int:
        """Waiting for blocks, budget or a place in the batch; preempted ones included."""
        return len(self._waiting)

    @property
    def num_waiting_deferred(self) -> int:
        """Held back for another reason than capacity: no such reason exists here."""
        return 0

    @property
    def kv_usage(self) -> float:
        """Held share of the KV blocks, 0 to 1."""
        return self._pool.usage

    # --- before the iteration ---

    def schedule(self, now: float) -> Batch | None:
        """The next iteration's batch; None when there is nothing to do. Run it, then `update`."""
        assert self._in_flight is None, "schedule and update alternate"
        counts = IterationCounts()
        scheduled: list[RequestState] = []
        self._scheduled = scheduled
        prefills = self._schedule_decodes(counts)
        budget = self._budget - len(scheduled)
        if self._pace is not None:
            budget = min(budget, self._pace.limit(len(scheduled)))
        for request in prefills:
            if not budget:
                break
            budget -= self._schedule_chunk(request, budget, counts)
        if not counts.num_preemptions:
            self._admit(budget, counts, now)
        assert scheduled or not self._requests, f"no progress with {len(self._requests)} requests"
        if not scheduled:
            return None
        counts.num_requests = len(scheduled)
        self._in_flight = Batch([request.scheduled for request in scheduled], counts)
        return self._in_flight

    def _schedule_decodes(self, counts: IterationCounts) -> list[RequestState]:
        """Schedule every request that needs one position and return the other running ones. This loop costs time for
        every token."""
        scheduled, block_size, budget = self._scheduled, self._pool.block_size, self._budget
        prefills = []
        # NOTE: `_grow` takes victims off the end of this very list. They are at or behind the cursor, so the loop
        # ends earlier and neither they nor anything scheduled before needs to be undone.
        for request in self._running:
            position = request.num_computed_tokens
            if position + 1 != len(request.token_ids) or position < request.num_prompt_tokens:
                prefills.append(request)
                continue
            if len(scheduled) == budget:
                break
            if position == len(request.block_table) * block_size and not self._grow(request, counts):
                break
            part = request.scheduled
            part.start = position
            part.num_tokens = 1
            scheduled.append(request)
        counts.num_decode_tokens = len(scheduled)
        return prefills

    def _grow(self, request: RequestState, counts: IterationCounts) -> bool:
        """Give it one more block, at the cost of the last in order; False when that is the request itself."""
        while (blocks := self._pool.allocate(1)) is None:
            victim = self._running.pop()
            self._preempt(victim)
            counts.num_preemptions += 1
            if victim is request:
                return False
        request.block_table.extend(blocks)
        return True

    def _preempt(self, request: RequestState) -> None:
        self._release_blocks(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        insort(self._waiting, request, key=_ORDER)

    def _schedule_chunk(self, request: RequestState, budget: int, counts: IterationCounts) -> int:
        """Schedule the next chunk of a request in prefill; its number of tokens."""
        start = request.num_computed_tokens
        num_tokens = min(len(request.token_ids) - start, budget, self._longest_chunk)
        part = request.scheduled
        part.start = start
        part.num_tokens = num_tokens
        self._scheduled.append(request)
        end, seen, num_prompt = start + num_tokens, request.high_water, request.num_prompt_tokens
        # [start, seen) again | [seen, num_prompt) prompt, first time | [num_prompt, end) output, first time
        counts.num_recomputed_tokens += max(0, min(end, seen) - start)
        counts.num_prompt_tokens_computed += max(0, min(end, num_prompt) - max(start, seen))
        if num_tokens == 1 and start >= num_prompt and end == len(request.token_ids):
            counts.num_decode_tokens += 1
        else:
            counts.num_prefill_tokens += num_tokens
        return num_tokens

    def _admit(self, budget: int, counts: IterationCounts, now: float) -> None:
        """Move requests from the head of the queue into the batch while they fit."""
        pool, is_whole = self._pool, not self._config.enable_chunked_prefill
        while budget and self._waiting and len(self._running) < self._config.max_num_seqs:
            request = self._waiting[0]
            shared = self._find_cached(request)
            num_tokens = len(request.token_ids)
            num_missing = num_tokens - len(shared) * pool.block_size
            if is_whole and budget < num_missing <= self._budget:
                break  # NOTE: what has grown beyond a whole budget is recomputed in chunks all the same
            blocks = pool.allocate(pool.num_blocks_for(num_tokens) - len(shared), shared)
            if blocks is None:
                break
            del self._waiting[0]
            insort(self._running, request, key=_ORDER)
            request.block_table.extend(blocks)
            request.num_computed_tokens = num_tokens - num_missing
            self._note_admission(request, counts, now)
            budget -= self._schedule_chunk(request, budget, counts)

    def _find_cached(self, request: RequestState) -> list[int]:
        """Cached blocks of its prefix; never of its newest token, which must be computed to be followed."""
        if not self._pool.caches:
            return []
        num_blocks = (len(request.token_ids) - 1) // self._pool.block_size
        self._extend_hashes(request, num_blocks)
        return self._pool.lookup(request.block_hashes[:num_blocks])

    def _extend_hashes(self, request: RequestState, num_blocks: int) -> None:
        extend_hashes(request.block_hashes, request.token_ids, self._pool.block_size, num_blocks, request.root_hash)

    def _note_admission(self, request: RequestState, counts: IterationCounts, now: float) -> None:
        if not request.num_preemptions:  # what a resumed request finds again is no hit: it was counted before
            request.begin(now)
            request.num_cached_tokens = request.num_computed_tokens
            if self._pool.caches:
                counts.num_cache_queries += request.num_prompt_tokens
                counts.num_cache_hits += request.num_cached_tokens
        request.high_water = max(request.high_water, request.num_computed_tokens)

    # --- after the iteration ---

    def update(self, batch: Batch, sampled: Sequence[SampledToken]) -> list[RequestState]:
        """Book what ran: positions are computed, sampled tokens appended, what is complete ended. The request of each
        sampled token or fault, in the batch's order; its `finish_reason` says whether it has ended with that."""
        assert batch is self._in_flight, "update what was scheduled last"
        self._in_flight = None
        block_size, caches = self._pool.block_size, self._pool.caches
        stepped: list[RequestState] = []
        has_ended = False
        for request in self._scheduled:
            part = request.scheduled
            start = part.start
            request.num_computed_tokens = computed = start + part.num_tokens
            if computed > request.high_water:
                request.high_water = computed
            if caches and start // block_size != computed // block_size:
                self._cache_blocks(request, start // block_size, computed // block_size)
            if computed < len(request.token_ids):
                continue
            token_id, _, fault = sampled[len(stepped)]
            if computed == request.num_prompt_tokens:
                _note_completed_prompt(request, batch.counts)
            stepped.append(request)
            if fault is not None:
                request.message = fault
                self._pool.forget(request.block_table)  # whatever broke it, others shall not meet it there
                self._end(request, "error")
                batch.counts.num_sampling_faults += 1
                has_ended = True
                continue
            request.token_ids.append(token_id)
            if (computed + 1 >= request.length_limit or token_id in request.end_token_ids) and self._is_complete(
                request, token_id
            ):
                has_ended = True
        assert len(stepped) == len(sampled), f"{len(sampled)} tokens sampled for {len(stepped)} sequences"
        batch.counts.num_generated_tokens = len(stepped) - batch.counts.num_sampling_faults
        if has_ended:
            self._running = [request for request in self._running if request.finish_reason is None]
        return stepped

    def observe(self, counts: IterationCounts, duration_s: float) -> None:
        """What an iteration cost, for those that come."""
        if self._pace is not None:
            self._pace.observe(counts.num_prefill_tokens, counts.num_decode_tokens, duration_s)

    def _cache_blocks(self, request: RequestState, first: int, end: int) -> None:
        """Make blocks [first, end) of the sequence known: they are full now."""
        self._extend_hashes(request, end)
        for index in range(first, end):
            self._pool.cache(request.block_table[index], request.block_hashes[index])

    def _is_complete(self, request: RequestState, token_id: int) -> bool:
        """End the request if this token, appended already, was its last."""
        sampling = request.sampling
        length = len(request.token_ids)
        num_output = length - request.num_prompt_tokens
        if num_output >= sampling.min_tokens:
            if token_id in self._eos_token_ids and not sampling.ignore_eos:
                self._end(request, "stop")
                return True
            if token_id in sampling.stop_token_ids:
                request.stop_token_id = token_id
                self._end(request, "stop")
                return True
        if num_output >= sampling.max_tokens or length >= self._max_model_len:
            self._end(request, "length")
            return True
        if length > self._pool.num_tokens:
            request.message = f"the sequence has {length} tokens; the KV cache holds {self._pool.num_tokens}"
            self._end(request, "error")
            return True
        return False

    def _end(self, request: RequestState, reason: str) -> None:
        request.finish_reason = reason
        self._release_blocks(request)
        del self._requests[request.sequence_id]

    def _release_blocks(self, request: RequestState) -> None:
        self._pool.free(request.block_table)
        request.block_table.clear()


def _note_completed_prompt(request: RequestState, counts: IterationCounts) -> None:
    counts.num_completed_prompt_tokens += request.num_prompt_tokens
    counts.num_completed_cached_tokens += request.num_cached_tokens
