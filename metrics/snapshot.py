"""What an engine broadcasts, what its beacon receives, and how what two have heard of an engine joins. Pure.

A message is a MessagePack array: version, kind, then the fields in the order of its dataclass; `decode_*` accepts
exactly what `encode` writes and raises `SnapshotError` for anything else.

A snapshot is an engine's whole tally, so losing, repeating or reordering snapshots costs nothing: whoever receives
them keeps the one with the greatest position. Invariant: a position is never used for two different contents (the
incarnation is durable before the first send, the sequence only grows within it), and therefore `join` is
commutative, associative and idempotent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import msgpack

SNAPSHOT_VERSION: Final = 1
MAX_SNAPSHOT_BYTES: Final = 4 * 2**20
MAX_PROCESS_INDEX: Final = 2**16  # P9: what is remembered by process index stays bounded, whoever sends
DIGEST_BYTES: Final = 16
CELL_BYTES: Final = 8

Position = tuple[int, int]  # (incarnation, sequence) of a snapshot; greater is newer
Term = tuple[int, int]  # (engine incarnation, n) of a grant; greater is newer
NOWHERE: Final[Position] = (0, 0)  # before every position: acknowledges nothing


class SnapshotError(ValueError):
    """Bytes from another process that are no message of this version; the text names what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The engine's word on which API server exports its series."""

    term: Term
    api_server: int
    incarnation: int

    def names(self, api_server: int, incarnation: int) -> bool:
        """Whether it is given to this very process."""
        return self.api_server == api_server and self.incarnation == incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One broadcast: the engine's tally as of a commit, its identity, and its grant."""

    layout_digest: bytes  # (16,) of the layout that `cells` follows
    engine: int
    incarnation: int
    sequence: int  # of this publication within the incarnation
    created_unix: float  # when the tally began
    published_unix: float  # this and `is_stuck` are for subscribers outside: no process here reads them
    grant: Grant | None
    echo: int  # number of the holder's newest heartbeat that the grant rests on; 0: none
    is_stuck: bool  # the engine's loop makes no progress
    cells: bytes  # little-endian float64

    @property
    def position(self) -> Position:
        """Where this snapshot stands among the engine's snapshots."""
        return (self.incarnation, self.sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """An API server lives, and has received the engine's snapshot at position `ack`."""

    api_server: int
    incarnation: int
    number: int  # from 1, within the API server's incarnation and for this engine
    ack: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Resign:
    """An API server has stopped exporting at `term`, for good."""

    api_server: int
    incarnation: int
    term: Term


def join(held: Snapshot | None, heard: Snapshot) -> Snapshot:
    """What is known of an engine after hearing both: the snapshot at the greater position."""
    return heard if held is None or heard.position > held.position else held


def encode(message: Snapshot | Heartbeat | Resign) -> bytes:
    """One message as bytes."""
    match message:
        case Snapshot():
            body: list[Any] = ["snapshot", *_pack_snapshot(message)]
        case Heartbeat():
            body = ["heartbeat", message.api_server, message.incarnation, message.number, *message.ack]
        case Resign():
            body = ["resign", message.api_server, message.incarnation, *message.term]
    packed: bytes = msgpack.packb([SNAPSHOT_VERSION, *body])
    return packed


def _pack_snapshot(s: Snapshot) -> list[Any]:
    grant = None if s.grant is None else [*s.grant.term, s.grant.api_server, s.grant.incarnation]
    identity = [s.layout_digest, s.engine, s.incarnation, s.sequence]
    return [*identity, float(s.created_unix), float(s.published_unix), grant, s.echo, s.is_stuck, s.cells]


# --- decoding: every check raises SnapshotError ---


def decode_snapshot(raw: bytes) -> Snapshot:
    """What an API server may receive; raises SnapshotError."""
    match _unpack(raw):
        case [_, "snapshot", digest, engine, incarnation, sequence, created, published, grant, echo, stuck, cells]:
            return Snapshot(
                layout_digest=_digest(digest),
                engine=_index(engine, "engine"),
                incarnation=_count(incarnation, "incarnation"),
                sequence=_count(sequence, "sequence"),
                created_unix=_float(created, "created_unix"),
                published_unix=_float(published, "published_unix"),
                grant=_grant(grant),
                echo=_count(echo, "echo"),
                is_stuck=_bool(stuck, "is_stuck"),
                cells=_cells(cells),
            )
        case message:
            raise _fail("no snapshot", message[1])


def decode_to_beacon(raw: bytes) -> Heartbeat | Resign:
    """What an engine's beacon may receive; raises SnapshotError."""
    match _unpack(raw):
        case [_, "heartbeat", api_server, incarnation, number, ack_incarnation, ack_sequence]:
            return Heartbeat(
                api_server=_index(api_server, "api_server"),
                incarnation=_count(incarnation, "incarnation"),
                number=_count(number, "number"),
                ack=(_count(ack_incarnation, "ack"), _count(ack_sequence, "ack")),
            )
        case [_, "resign", api_server, incarnation, term_incarnation, term_number]:
            return Resign(
                api_server=_index(api_server, "api_server"),
                incarnation=_count(incarnation, "incarnation"),
                term=(_count(term_incarnation, "term"), _count(term_number, "term")),
            )
        case message:
            raise _fail("no message to a beacon", message[1])


def _fail(what: str, value: object) -> SnapshotError:
    return SnapshotError(f"{what}: {str(value)[:80]!r}")


def _unpack(raw: bytes) -> list[Any]:
    if len(raw) > MAX_SNAPSHOT_BYTES:
        raise _fail("message is too long (bytes)", len(raw))
    try:
        message = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException) as error:
        raise SnapshotError(f"not MessagePack: {error}") from error
    if type(message) is not list or len(message) < 2:
        raise _fail("message is not a list of version, kind, fields", message)
    if type(message[0]) is not int or message[0] != SNAPSHOT_VERSION:
        raise _fail(f"snapshot version is not {SNAPSHOT_VERSION}", message[0])
    return message


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise _fail(f"{what} is not a whole number from 0", value)
    return value


def _index(value: Any, what: str) -> int:
    if _count(value, what) >= MAX_PROCESS_INDEX:
        raise _fail(f"{what} is not below {MAX_PROCESS_INDEX}", value)
    return int(value)


def _float(value: Any, what: str) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise _fail(f"{what} is not a finite float", value)
    return value


def _bool(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise _fail(f"{what} is not a boolean", value)
    return value


def _digest(value: Any) -> bytes:
    if type(value) is not bytes or len(value) != DIGEST_BYTES:
        raise _fail(f"layout_digest is not {DIGEST_BYTES} bytes", value)
    return value


def _cells(value: Any) -> bytes:
    if type(value) is not bytes or len(value) % CELL_BYTES:
        raise _fail(f"cells are not bytes, {CELL_BYTES} a cell", value)
    return value


def _grant(value: Any) -> Grant | None:
    if value is None:
        return None
    if type(value) is not list or len(value) != 4:
        raise _fail("grant is not a list of 4", value)
    term_incarnation, number, api_server, incarnation = value
    return Grant(
        term=(_count(term_incarnation, "term"), _count(number, "term")),
        api_server=_index(api_server, "grant's api_server"),
        incarnation=_count(incarnation, "grant's incarnation"),
    )
