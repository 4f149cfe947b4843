"""What runs: the table the supervisor publishes, and what its children report to it. Pure.

The supervisor broadcasts the whole table on every change and every 100 ms, on topic `deployment`; receivers keep the
greatest `version`. A process has ended when the table shows it `ended`, or shows a greater incarnation of its index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from msgspec import Meta

from engine.bounds import Count, one_of
from engine.wire.codec import decode, kinds
from metrics.catalogue import ROLES

STATES: Final = ("starting", "ready", "stopping", "ended")

DEPLOYMENT_TOPIC: Final = b"deployment"
MAX_MESSAGE_CHARS: Final = 2000  # of a failure: a report must fit into one message of a lifeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the first ready engine found, fixed for the deployment's life."""

    model_name: str
    max_model_len: Count
    vocab_size: Count
    block_size: Count
    num_gpu_blocks: Count
    cache_dtype: str
    enable_prefix_caching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """One process index and its newest incarnation."""

    role: Annotated[str, one_of(*ROLES)]
    index: Count
    incarnation: Count
    pid: Count
    state: Annotated[str, one_of(*STATES)]
    is_silent: bool = False  # ready, and has said nothing for a while: frozen, it may be

    @property
    def newest_ended(self) -> int:
        """The newest incarnation of this index that has ended, and so have all before it; 0 where none has."""
        return self.incarnation if self.state == "ended" else self.incarnation - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The whole deployment table."""

    version: Count
    facts: Facts | None
    processes: tuple[ProcessEntry, ...]

    def find(self, role: str, index: int) -> ProcessEntry | None:
        """The newest incarnation of a process index."""
        return next((p for p in self.processes if p.role == role and p.index == index), None)

    def has_ended(self, role: str, index: int, incarnation: int) -> bool:
        """Whether this very incarnation is known to have ended."""
        entry = self.find(role, index)
        return entry is not None and incarnation <= entry.newest_ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A child's report: it serves from now on. An engine says with which facts."""

    facts: Facts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A child's report, several times a second: it runs; `progress` grows while it gets on with its work, and
    `is_busy` says whether there is any."""

    progress: Count
    is_busy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A child's last report: it cannot start, and starting it again would not help."""

    message: Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]

    def __post_init__(self) -> None:
        """Errors tell of paths and models, which may be anything: what is sent is short, and text."""
        text = self.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
        object.__setattr__(self, "message", text)


Report = Ready | Alive | Failed


_TABLE: Final = kinds(Deployment)
_REPORT: Final = kinds(Ready, Alive, Failed)


def decode_deployment(raw: bytes) -> Deployment:
    """Read a table; raises WireError."""
    table: Deployment = decode(raw, _TABLE)
    return table


def decode_report(raw: bytes) -> Report:
    """Read a child's report; raises WireError."""
    report: Report = decode(raw, _REPORT)
    return report


def deployment_endpoint(directory: str) -> str:
    """Where the supervisor publishes the table."""
    return f"ipc://{directory}/deployment"
