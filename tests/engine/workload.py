"""Random work for an engine without sockets or weights, and the engine to run it: for the property tests here."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.loop.core import ApiServer, EngineCore
from engine.schedule.batch import Batch
from engine.schedule.block_pool import BlockPool
from engine.schedule.record import Recorder
from engine.schedule.scheduler import Scheduler
from engine.wire import Finish, Outputs, SamplingParams, Start, Submit
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.fakes import FakeClock, FakeRunner

costly = settings(max_examples=max(100, settings().max_examples * 3 // 10))  # one example runs whole engines

VOCAB_SIZE = 40
EOS = 7
MAX_MODEL_LEN = 48
NUM_API_SERVERS = 4
LAYOUT = build_layout(
    ENGINE, Shape(num_engines=1, num_api_servers=NUM_API_SERVERS, max_model_len=MAX_MODEL_LEN, bucket_overrides=())
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the engine under test is made."""

    block_size: int = 4
    num_blocks: int = 64
    enable_prefix_caching: bool = True
    scheduler: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(scheduling_policy="priority"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence, when it comes and when its sender loses patience (in iterations)."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    temperature: float = 1.0
    ignore_eos: bool = False
    priority: int = 0
    api_server: int = 0
    arrives: int = 0
    aborted: int | None = None


PREFIXES = tuple(tuple((seed * 11 + i * 5) % VOCAB_SIZE for i in range(16)) for seed in range(3))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """A prefix that others have too, and something of its own."""
    shared = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 16))]
    own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if shared else 1, max_size=10))
    return shared + tuple(own)


@st.composite
def jobs(draw: st.DrawFn, *, can_abort: bool = False) -> tuple[Job, ...]:
    one = st.builds(
        Job,
        prompt=prompts(),
        max_tokens=st.integers(1, 24),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
        api_server=st.integers(0, NUM_API_SERVERS - 1),
        arrives=st.integers(0, 12),
        aborted=st.none() | st.integers(0, 20) if can_abort else st.none(),
    )
    return tuple(draw(st.lists(one, min_size=1, max_size=8)))


schedulers = st.builds(
    SchedulerConfig,
    scheduling_policy=st.just("priority"),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from((1, 2, 3, 5, 8, 13, 32, 128)),
    enable_chunked_prefill=st.just(True),
    long_prefill_token_threshold=st.sampled_from((0, 1, 3, 7)),
)
setups = st.builds(
    Setup,
    block_size=st.sampled_from((1, 2, 4)),
    num_blocks=st.sampled_from((48, 60, 96, 400)),  # with 48 of one token each, a single long sequence fills all
    enable_prefix_caching=st.booleans(),
    scheduler=schedulers,
)
tight_setups = st.builds(
    lambda block_size, config: Setup(
        block_size=block_size, num_blocks=-(-MAX_MODEL_LEN // block_size), scheduler=config
    ),
    st.sampled_from((1, 2, 4)),
    schedulers,
)


class Engine:
    """An EngineCore, its tally, and everything that came out of it."""

    def __init__(self, setup: Setup, *, tally: Tally | None = None) -> None:
        self.clock = FakeClock()
        self.pool = BlockPool(setup.num_blocks, setup.block_size, setup.enable_prefix_caching)
        self.scheduler = Scheduler(
            setup.scheduler,
            self.pool,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=frozenset({EOS}),
            vocab_size=VOCAB_SIZE,
        )
        self.tally = Tally(LAYOUT) if tally is None else tally
        self.recorder = Recorder(self.tally, LAYOUT, NUM_API_SERVERS)
        self.runner = FakeRunner(setup.num_blocks, setup.block_size, VOCAB_SIZE)
        self.seen: list[tuple[int, ...]] = []  # the log's own count of each batch: tokens of each of its parts
        self.faults: list[str] = []  # where, of each
        self.core = EngineCore(
            self.scheduler,
            self.runner,
            self.recorder,
            self.clock,
            Bulkhead(self._count_fault, logging.getLogger(__name__)),
            iteration_log=self._log,
        )
        self.tokens: dict[tuple[ApiServer, int], list[int]] = {}
        self.starts: dict[tuple[ApiServer, int], Start] = {}  # the newest one sent
        self.finishes: dict[tuple[ApiServer, int], Finish] = {}

    def _count_fault(self, where: str) -> None:
        self.faults.append(where)
        self.recorder.faulted(where)

    def _log(self, batch: Batch) -> None:
        self.seen.append(tuple(part.num_tokens for part in batch.sequences))

    def submit(self, request_id: int, job: Job) -> None:
        sampling = SamplingParams(max_tokens=job.max_tokens, temperature=job.temperature, ignore_eos=job.ignore_eos)
        submit = Submit(request_id, 1, list(job.prompt), sampling, job.priority)
        self.core.submit((job.api_server, 1), submit, self.clock())

    def step(self) -> dict[ApiServer, Outputs]:
        """One iteration; its outputs are checked for gaps and kept."""
        self.clock.advance(0.01)
        sent = self.core.step()
        for server, outputs in sent.items():
            for output in outputs.outputs:
                key = (server, output.request_id)
                tokens = self.tokens.setdefault(key, [])
                assert key not in self.finishes, f"an output after its last: {key}"
                assert output.first_index == len(tokens), f"a gap: {key}"
                tokens += output.token_ids
                if output.start is not None:
                    self.starts[key] = output.start
                if output.finish is not None:
                    self.finishes[key] = output.finish
        return sent

    def run(self, work: Iterable[Job]) -> None:
        """All of it, to the end: each job arrives before its iteration, aborts come between iterations."""
        pending = list(enumerate(work))
        limit = 200 + 40 * sum(len(job.prompt) + job.max_tokens for _, job in pending)
        for now in range(limit):
            for request_id, job in pending:
                if job.arrives == now:
                    self.submit(request_id, job)
                if job.aborted == now:
                    self.core.abort((job.api_server, 1), [request_id])
            self.step()
            assert not self.faults, self.faults
            if not self.core.has_work and now >= max(job.arrives for _, job in pending):
                return
        raise AssertionError(f"no end after {limit} iterations")

    def output(self, request_id: int) -> list[int]:
        """What one job generated, whoever its API server is."""
        return next((tokens for (_, known), tokens in self.tokens.items() if known == request_id), [])

    def value(self, name: str, **labels: str) -> float:
        return self.tally.cells[LAYOUT.cell(name, **labels)]

    def histogram(self, name: str, **labels: str) -> tuple[int, float]:
        """(count, sum)."""
        at, bounds = LAYOUT.histogram(name, **labels)
        cells = self.tally.cells[at : at + len(bounds) + 2]
        return int(sum(cells[:-1])), cells[-1]


def run(setup: Setup, work: Iterable[Job]) -> Engine:
    engine = Engine(setup)
    engine.run(work)
    return engine


def with_scheduler(setup: Setup, **changes: Any) -> Setup:
    """The same engine with other limits."""
    return replace(setup, scheduler=replace(setup.scheduler, **changes))
