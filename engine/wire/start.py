"""What each child is told at its start, by the supervisor, through an inherited descriptor. Pure.

No secret is an argument or an environment variable. A configuration is made of the operator's own parts, so that a new
flag reaches a child by being declared in one of them, and of what is this child's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.bounds import Count, Port, Positive, Text
from engine.config import CacheConfig, ChatConfig, HttpConfig, ModelConfig, Patience, SchedulerConfig, StatsConfig
from engine.wire.codec import decode, kinds
from engine.wire.deployment import Facts
from metrics.layout import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildConfig:
    """What every child is told. The descriptors are its own: it closes them."""

    index: Count
    incarnation: Count
    num_engines: Positive
    num_api_servers: Positive
    directory: Text  # the deployment's
    lifeline_fd: Count
    model: ModelConfig
    scheduler: SchedulerConfig
    stats: StatsConfig
    patience: Patience

    def shape(self, max_model_len: int) -> Shape:
        """What the layouts of this deployment's tallies depend on."""
        return Shape(
            num_engines=self.num_engines,
            num_api_servers=self.num_api_servers,
            max_model_len=max_model_len,
            bucket_overrides=self.stats.bucket_overrides,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(ChildConfig):
    """One engine. `facts` is None for the first that gets ready: it fixes them."""

    cache: CacheConfig
    facts: Facts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ChildConfig):
    """What one API server is told at its start."""

    http: HttpConfig
    chat: ChatConfig
    port: Port  # the one that is listened on, where `http` may say 0
    listen_fd: Count  # the public socket, listening already, shared by all API servers
    admin_fd: Count  # this API server's own listening socket
    admin_addresses: tuple[tuple[str, Port], ...]  # of every API server, by index

    def __post_init__(self) -> None:
        if len(self.admin_addresses) != self.num_api_servers:
            raise ValueError(f"admin_addresses are {len(self.admin_addresses)}, API servers {self.num_api_servers}")


_ENGINE: Final = kinds(EngineConfig)
_SERVER: Final = kinds(ServerConfig)


def decode_engine_config(raw: bytes) -> EngineConfig:
    """Read an engine's start message; raises WireError."""
    config: EngineConfig = decode(raw, _ENGINE)
    return config


def decode_server_config(raw: bytes) -> ServerConfig:
    """Read an API server's start message; raises WireError."""
    config: ServerConfig = decode(raw, _SERVER)
    return config
