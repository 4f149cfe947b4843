"""What runs: the table the supervisor publishes, and what its children report to it. Pure.

The supervisor broadcasts the whole table on every change and every 100 ms, on topic `deployment`; receivers keep the
greatest `version`. A process has ended when the table shows it `ended`, or shows a greater incarnation of its index.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack

from metrics.catalogue import ROLES

STATES: Final = ("starting", "ready", "stopping", "ended")

TABLE_VERSION: Final = 1
DEPLOYMENT_TOPIC: Final = b"deployment"
MAX_MESSAGE_CHARS: Final = 2000  # of a failure: a report must fit into one message of a lifeline


class DeploymentError(ValueError):
    """Bytes that are no table or report of this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the first ready engine found, fixed for the deployment's life."""

    model_name: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_gpu_blocks: int
    cache_dtype: str
    enable_prefix_caching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """One process index and its newest incarnation."""

    role: str
    index: int
    incarnation: int
    pid: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The whole table."""

    version: int
    facts: Facts | None
    processes: tuple[ProcessEntry, ...]

    def find(self, role: str, index: int) -> ProcessEntry | None:
        """The newest incarnation of a process index."""
        return next((p for p in self.processes if p.role == role and p.index == index), None)

    def has_ended(self, role: str, index: int, incarnation: int) -> bool:
        """Whether this very incarnation is known to have ended."""
        entry = self.find(role, index)
        if entry is None:
            return False
        return entry.incarnation > incarnation or (entry.incarnation == incarnation and entry.state == "ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A child's report: it serves from now on. An engine says with which facts."""

    facts: Facts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A child's report, several times a second: it runs; `progress` grows while it gets on with its work, and
    `is_busy` says whether there is any."""

    progress: int
    is_busy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A child's last report: it cannot start, and starting it again would not help."""

    message: str


Report = Ready | Alive | Failed


def encode_deployment(table: Deployment) -> bytes:
    """The table as bytes."""
    facts = None if table.facts is None else asdict(table.facts)
    rows = [[p.role, p.index, p.incarnation, p.pid, p.state] for p in table.processes]
    packed: bytes = msgpack.packb([TABLE_VERSION, table.version, facts, rows])
    return packed


def decode_deployment(raw: bytes) -> Deployment:
    """Raises DeploymentError."""
    try:
        version, number, facts, rows = msgpack.unpackb(raw)
        if version != TABLE_VERSION:
            raise DeploymentError(f"table version is not {TABLE_VERSION}: {version!r}")
        processes = tuple(_entry(*row) for row in rows)
        return Deployment(version=_count(number, "version"), facts=_facts(facts), processes=processes)
    except DeploymentError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DeploymentError(f"no deployment table: {error}") from error


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise DeploymentError(f"{what} is not a whole number from 0: {str(value)[:80]!r}")
    return value


def _entry(role: str, index: int, incarnation: int, pid: int, state: str) -> ProcessEntry:
    numbers = (index, incarnation, pid)
    if role not in ROLES or state not in STATES or any(type(n) is not int or n < 0 for n in numbers):
        raise DeploymentError(f"no process entry: {(role, index, incarnation, pid, state)!r}")
    return ProcessEntry(role=role, index=index, incarnation=incarnation, pid=pid, state=state)


_FACT_TYPES: Final[dict[str, type]] = {
    "model_name": str,
    "max_model_len": int,
    "vocab_size": int,
    "block_size": int,
    "num_gpu_blocks": int,
    "cache_dtype": str,
    "enable_prefix_caching": bool,
}


def _facts(raw: Any) -> Facts | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or {name: type(value) for name, value in raw.items()} != _FACT_TYPES:
        raise DeploymentError(f"no facts: {str(raw)[:200]!r}")
    return Facts(**raw)


def encode_report(report: Report) -> bytes:
    """One report as bytes."""
    match report:
        case Ready(facts=facts):
            body: list[Any] = ["ready", None if facts is None else asdict(facts)]
        case Alive(progress=progress, is_busy=is_busy):
            body = ["alive", progress, is_busy]
        case Failed(message=message):
            body = ["failed", message[:MAX_MESSAGE_CHARS]]
    packed: bytes = msgpack.packb([TABLE_VERSION, *body])
    return packed


def decode_report(raw: bytes) -> Report:
    """Raises DeploymentError."""
    try:
        message = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException) as error:
        raise DeploymentError(f"no report: {error}") from error
    match message:
        case [version, *_] if version != TABLE_VERSION:
            raise DeploymentError(f"report version is not {TABLE_VERSION}: {version!r}")
        case [_, "ready", facts]:
            return Ready(facts=_facts(facts))
        case [_, "alive", int(progress), bool(is_busy)]:
            return Alive(progress=_count(progress, "progress"), is_busy=is_busy)
        case [_, "failed", str(message_text)]:
            return Failed(message=message_text)
        case _:
            raise DeploymentError(f"no report: {str(message)[:80]!r}")
