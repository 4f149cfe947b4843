"""One sequence on its way through the engine. Pure.

State only; `engine.schedule.scheduler` alone changes it, but for what `engine.loop.core` has told of it. Positions
count from 0 over prompt and output together:

    0 ... num_computed_tokens ... len(token_ids) - 1
    in the KV cache | to be computed, the newest token last

`high_water` is the greatest `num_computed_tokens` ever. After a preemption the positions below it are *re*computed;
at and above it, computed for the first time. The newest token has never been computed: high_water < len(token_ids).
"""

from __future__ import annotations

from engine.schedule.batch import ScheduledSequence
from engine.schedule.block_pool import root_hash
from engine.wire import Submit


class RequestState:
    """One accepted sequence. Times are the engine's monotonic seconds; 0 means not yet."""

    __slots__ = (
        "api_server",
        "arrived_at",
        "block_hashes",
        "block_table",
        "end_token_ids",
        "finish_reason",
        "high_water",
        "length_limit",
        "message",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_preemptions_told",
        "num_prompt_tokens",
        "order",
        "priority",
        "request_id",
        "root_hash",
        "sampling",
        "scheduled",
        "scheduled_at",
        "sequence_id",
        "stop_token_id",
        "token_ids",
    )

    def __init__(
        self, sequence_id: int, api_server: tuple[int, int], submit: Submit, arrived_at: float, index: int = 0
    ) -> None:
        """Sequence `index` of those that are submitted."""
        self.sequence_id = sequence_id  # grows with arrival
        self.api_server = api_server  # (index, incarnation)
        self.request_id = submit.request_id + index  # unique within one api_server
        self.priority = submit.priority
        self.order = (submit.priority, sequence_id)  # who is served first, and preempted last
        self.sampling = submit.sampling.of_sequence(index)
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        # Prompt, then output. Until `begin` it is the one list of all n sequences. Measured, 15 prompts of 8,190 tokens
        # with n = 128: 7 MiB, with a message and a list each 604.
        self.token_ids = submit.prompt_token_ids
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the first full blocks, as far as they were needed
        self.root_hash = root_hash(submit.cache_salt)
        # The one object the runner sees of this sequence in every iteration: making a new one for each token of each
        # sequence would cost a third of the scheduler's time.
        self.scheduled = ScheduledSequence(
            sequence_id=sequence_id,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            start=0,
            num_tokens=0,
            block_table=self.block_table,
            sampling=self.sampling,
        )
        self.num_computed_tokens = 0
        self.high_water = 0
        self.num_cached_tokens = 0  # found in the prefix cache at the first admission
        self.num_preemptions = 0
        self.num_preemptions_told = -1  # with its `Start`; -1: none was sent yet
        # Set by the scheduler's `add`: what tells of most tokens, at once, that they are not the last.
        self.length_limit = 0  # no longer than this
        self.end_token_ids: frozenset[int] = frozenset()  # any of these may end it
        self.arrived_at = arrived_at
        self.scheduled_at = 0.0  # the first time
        self.finish_reason: str | None = None
        self.stop_token_id: int | None = None
        self.message: str | None = None  # why, when it ends by error

    def begin(self, now: float) -> None:
        """It is scheduled for the first time: from here on its tokens are its own."""
        self.scheduled_at = now
        self.token_ids = self.scheduled.token_ids = list(self.token_ids)
