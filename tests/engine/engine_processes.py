"""What an engine process consists of, in this process: loop or beacon over real sockets in one directory."""

from __future__ import annotations

from typing import Any

from engine.config import CacheConfig, ModelConfig, Patience, SchedulerConfig, StatsConfig
from engine.wire import EngineConfig
from engine.wire.deployment import Deployment, ProcessEntry
from metrics.catalogue import API_SERVER, ENGINE
from metrics.files.store import TallyStore, tally_path
from metrics.layout import Layout, Shape, build_layout
from tests.fakes import FakeRunner

NUM_API_SERVERS = 2
VOCAB_SIZE = 1000


class SizedRunner(FakeRunner):
    """A FakeRunner that says how large it is."""

    def __init__(self, num_blocks: int = 64, block_size: int = 16) -> None:
        super().__init__(num_blocks, block_size, VOCAB_SIZE)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = 512
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = frozenset({VOCAB_SIZE})
        self.cache_dtype = "float32"
        self.suited_budget = 64
        self.suited_iteration_s: float | None = None


def make_config(
    directory: str, *, incarnation: int = 1, lifeline_fd: int = 0, stall_timeout_s: float = 60.0, **stats: Any
) -> EngineConfig:
    return EngineConfig(
        index=0,
        incarnation=incarnation,
        num_engines=1,
        num_api_servers=NUM_API_SERVERS,
        directory=directory,
        lifeline_fd=lifeline_fd,
        model=ModelConfig(path="/nowhere", served_model_names=("tiny",)),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        cache=CacheConfig(),
        stats=StatsConfig(**stats),
        patience=Patience(stall_timeout_s=stall_timeout_s),
        facts=None,
    )


def engine_layout() -> Layout:
    return build_layout(ENGINE, Shape(num_engines=1, num_api_servers=NUM_API_SERVERS, max_model_len=512))


def open_store(directory: str, incarnation: int = 1) -> TallyStore:
    layout = engine_layout()
    return TallyStore.open(tally_path(directory, ENGINE, 0), layout, incarnation=incarnation, now_unix=1.0)


def table(version: int, *api_servers: tuple[int, int, str]) -> Deployment:
    """A table of API servers, each (index, incarnation, state)."""
    rows = (ProcessEntry(role=API_SERVER, index=i, incarnation=n, pid=1, state=s) for i, n, s in api_servers)
    return Deployment(version=version, facts=None, processes=tuple(rows))
