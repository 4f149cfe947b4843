"""Snapshots, heartbeats and resignations as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics.snapshot import (
    MAX_PROCESS_INDEX,
    MAX_SNAPSHOT_BYTES,
    Grant,
    Heartbeat,
    Resign,
    Snapshot,
    SnapshotError,
    decode_snapshot,
    decode_to_beacon,
    encode,
)

counts = st.integers(0, 2**63)
indexes = st.integers(0, MAX_PROCESS_INDEX - 1)
pairs = st.tuples(counts, counts)
instants = st.floats(0, 2**40)
grants = st.builds(Grant, term=pairs, api_server=indexes, incarnation=counts)
snapshots = st.builds(
    Snapshot,
    layout_digest=st.binary(min_size=16, max_size=16),
    engine=indexes,
    incarnation=counts,
    sequence=counts,
    created_unix=instants,
    published_unix=instants,
    grant=st.none() | grants,
    echo=counts,
    is_stuck=st.booleans(),
    cells=st.integers(0, 20).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n)),
)
heartbeats = st.builds(Heartbeat, api_server=indexes, incarnation=counts, number=counts, ack=pairs)
resigns = st.builds(Resign, api_server=indexes, incarnation=counts, term=pairs)
# Almost a message: the right frame around wrong fields finds more than random bytes do.
scalars = st.none() | st.booleans() | st.integers(-1, 2**63) | st.floats() | st.text(max_size=3) | st.binary(max_size=9)
fields = st.lists(scalars | st.lists(scalars, min_size=4, max_size=4), max_size=11)
kinds = st.sampled_from(["snapshot", "heartbeat", "resign"]) | scalars
near_messages = st.builds(lambda kind, rest: [1, kind, *rest], kinds, fields)

SNAPSHOT = Snapshot(
    layout_digest=b"d" * 16,
    engine=1,
    incarnation=2,
    sequence=3,
    created_unix=4.0,
    published_unix=5.0,
    grant=Grant(term=(2, 6), api_server=7, incarnation=8),
    echo=9,
    is_stuck=False,
    cells=b"c" * 16,
)


@given(snapshots)
def test_a_snapshot_comes_back_as_it_was(snapshot: Snapshot) -> None:
    assert decode_snapshot(encode(snapshot)) == snapshot


@given(heartbeats | resigns)
def test_what_a_beacon_receives_comes_back_as_it_was(message: Heartbeat | Resign) -> None:
    assert decode_to_beacon(encode(message)) == message


@given(st.binary(max_size=200) | near_messages.map(msgpack.packb))
def test_any_bytes_decode_or_raise_snapshot_error(raw: bytes) -> None:
    for decode in (decode_snapshot, decode_to_beacon):
        try:
            message = decode(raw)
        except SnapshotError:
            continue
        assert decode(encode(message)) == message


@given(snapshots, st.data())
def test_a_snapshot_cut_anywhere_raises_snapshot_error(snapshot: Snapshot, data: st.DataObject) -> None:
    raw = encode(snapshot)
    with pytest.raises(SnapshotError):
        decode_snapshot(raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(snapshots, st.integers(0, 9), scalars)
def test_a_field_of_another_type_or_range_is_refused_or_kept_as_it_is(snapshot: Snapshot, at: int, value: Any) -> None:
    message = msgpack.unpackb(encode(snapshot))
    message[2 + at] = value
    try:
        decoded = decode_snapshot(msgpack.packb(message))
    except SnapshotError:
        return
    assert msgpack.unpackb(encode(decoded)) == message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.__setitem__(0, 2), "version"),
        (lambda m: m.__setitem__(0, True), "version"),
        (lambda m: m.__setitem__(2, b"short"), "layout_digest"),
        (lambda m: m.__setitem__(3, MAX_PROCESS_INDEX), "engine"),
        (lambda m: m.__setitem__(4, -1), "incarnation"),
        (lambda m: m.__setitem__(5, True), "sequence"),
        (lambda m: m.__setitem__(6, float("nan")), "created_unix"),
        (lambda m: m.__setitem__(8, [1, 2, 3]), "grant"),
        (lambda m: m.__setitem__(10, 1), "is_stuck"),
        (lambda m: m.__setitem__(11, b"seven b"), "cells"),
        (lambda m: m.append(0), "no snapshot"),
    ],
)
def test_the_error_says_which_field_is_wrong(change: Callable[[list[Any]], None], complaint: str) -> None:
    message = msgpack.unpackb(encode(SNAPSHOT))
    change(message)
    with pytest.raises(SnapshotError, match=complaint):
        decode_snapshot(msgpack.packb(message))


def test_each_side_refuses_what_is_for_the_other() -> None:
    heartbeat = Heartbeat(api_server=0, incarnation=1, number=1, ack=(1, 1))
    with pytest.raises(SnapshotError, match="heartbeat"):
        decode_snapshot(encode(heartbeat))
    with pytest.raises(SnapshotError, match="snapshot"):
        decode_to_beacon(encode(SNAPSHOT))


def test_a_message_that_is_too_long_is_not_even_unpacked() -> None:
    with pytest.raises(SnapshotError, match="too long"):
        decode_snapshot(encode(dataclasses.replace(SNAPSHOT, cells=bytes(MAX_SNAPSHOT_BYTES))))
