"""What the operator chose, one frozen dataclass per owner; facts found at start travel elsewhere. Pure.

`engine.serve` makes these from flags; `to_json` and `engine_config_from_json` carry them to an engine process by an
inherited descriptor, so that nothing secret is ever an argument or an environment variable.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.wire import Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, and how they are held."""

    path: str  # a Hugging Face directory or a .gguf file
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str | None = None  # int8: of the matrices, on a CPU
    max_model_len: int | None = None  # None: what the model was trained for
    seed: int | None = None  # of samples without a seed of their own; None: drawn at each start
    device: str = "auto"  # auto, cpu, cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 16  # tokens a block
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one iteration's batch."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: what suits the device, and what the other limits need
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # longest prefill chunk, in tokens; 0: only the budget limits it

    def budget(self, suited: int, max_model_len: int) -> int:
        """Tokens of one iteration, where `suited` would be well for the device."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(suited, self.max_num_seqs, 0 if self.enable_chunked_prefill else max_model_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsConfig:
    """The statistics plane of one deployment, the same in every process."""

    log_stats: bool = True
    publish_interval_s: float = 0.05
    lease_s: float = 0.6
    bucket_overrides: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (family, bounds)
    log_iteration_details: bool = False
    stall_timeout_s: float = 60.0  # a busy loop without progress for so long is stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that one engine process is told. `facts` is None for the first engine that gets ready: it fixes them."""

    index: int
    incarnation: int
    num_engines: int
    num_api_servers: int
    directory: str  # the deployment's
    served_model_name: str
    lifeline_fd: int
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    stats: StatsConfig = field(default_factory=StatsConfig)
    facts: Facts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """All that the operator chose: what the supervisor starts, and how."""

    num_engines: int
    num_api_servers: int
    host: str
    port: int
    admin_host: str
    admin_port: int  # of API server 0; 0: free ports
    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(repr=False)
    runtime_directory: str
    drain_timeout_s: float
    freeze_timeout_s: float
    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    stats: StatsConfig
    engine_module: str = "engine.loop.process"
    api_server_module: str = "frontend.server"
    max_num_queued_reqs: int | None = None  # of the whole deployment; None: no limit
    max_num_queued_tokens: int | None = None
    otlp_traces_endpoint: str | None = None
    otlp_metrics_endpoint: str | None = None


def to_json(config: EngineConfig) -> str:
    """The config as text; `engine_config_from_json` is its inverse."""
    return json.dumps(asdict(config))


def engine_config_from_json(text: str) -> EngineConfig:
    """Raises ValueError, TypeError or KeyError when the text is not what `to_json` writes."""
    raw: dict[str, Any] = json.loads(text)
    stats = raw["stats"]
    overrides = tuple((family, tuple(bounds)) for family, bounds in stats["bucket_overrides"])
    parts = {
        "model": ModelConfig(**raw["model"]),
        "cache": CacheConfig(**raw["cache"]),
        "scheduler": SchedulerConfig(**raw["scheduler"]),
        "stats": StatsConfig(**{**stats, "bucket_overrides": overrides}),
        "facts": None if raw["facts"] is None else Facts(**raw["facts"]),
    }
    return EngineConfig(**{**raw, **parts})
