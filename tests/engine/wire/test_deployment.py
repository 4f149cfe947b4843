"""The deployment table and the reports of children, as bytes."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.wire.codec import WIRE_VERSION, WireError, encode
from engine.wire.deployment import (
    MAX_MESSAGE_CHARS,
    STATES,
    Alive,
    Deployment,
    Facts,
    Failed,
    ProcessEntry,
    Ready,
    Report,
    decode_deployment,
    decode_report,
)
from metrics.catalogue import API_SERVER, ENGINE, ROLES

counts = st.integers(0, 2**63)
facts = st.builds(
    Facts,
    model_name=st.text(max_size=8),
    max_model_len=counts,
    vocab_size=counts,
    block_size=counts,
    num_gpu_blocks=counts,
    cache_dtype=st.sampled_from(["float32", "bfloat16"]),
    enable_prefix_caching=st.booleans(),
)
entries = st.builds(
    ProcessEntry,
    role=st.sampled_from(ROLES),
    index=counts,
    incarnation=counts,
    pid=counts,
    state=st.sampled_from(STATES),
)
tables = st.builds(
    Deployment, version=counts, facts=st.none() | facts, processes=st.lists(entries, max_size=4).map(tuple)
)
reports = st.one_of(
    st.builds(Ready, facts=st.none() | facts),
    st.builds(Alive, progress=counts, is_busy=st.booleans()),
    st.builds(Failed, message=st.text(max_size=20)),
)
# Almost a message: the right frame around wrong fields finds more than random bytes do.
scalars = st.none() | st.booleans() | st.integers(-1, 2**63) | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
fields = scalars | st.lists(scalars, max_size=5) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
near_tables = st.fixed_dictionaries(
    {"version": counts | fields, "facts": st.none() | fields, "processes": st.lists(fields, max_size=2)}
)
near_reports = st.tuples(
    st.just(WIRE_VERSION),
    st.sampled_from(["ready", "alive", "failed"]) | scalars,
    st.fixed_dictionaries({}, optional=dict.fromkeys(("facts", "progress", "is_busy", "message"), fields)) | fields,
)


def table_bytes(fields: Any) -> bytes:
    packed: bytes = msgpack.packb([WIRE_VERSION, "deployment", fields])
    return packed


def alive_bytes(progress: Any) -> bytes:
    packed: bytes = msgpack.packb([WIRE_VERSION, "alive", {"progress": progress, "is_busy": True}])
    return packed


PROCESS = {"role": ENGINE, "index": 0, "incarnation": 1, "pid": 2, "state": "ready", "is_silent": False}


def table_of(*processes: ProcessEntry) -> Deployment:
    return Deployment(version=1, facts=None, processes=processes)


def entry(role: str, index: int, incarnation: int, state: str = "ready") -> ProcessEntry:
    return ProcessEntry(role=role, index=index, incarnation=incarnation, pid=1, state=state)


@given(tables)
def test_a_table_comes_back_as_it_was(table: Deployment) -> None:
    assert decode_deployment(encode(table)) == table


@given(reports)
def test_a_report_comes_back_as_it_was(report: Report) -> None:
    assert decode_report(encode(report)) == report


@given(st.binary(max_size=100) | near_tables.map(table_bytes))
@example(table_bytes({"version": float("inf"), "facts": None, "processes": []}))
@example(table_bytes({"version": -1, "facts": None, "processes": []}))
@example(table_bytes({"version": 1.5, "facts": None, "processes": []}))
def test_any_bytes_are_a_table_or_raise_wire_error(raw: bytes) -> None:
    try:
        table = decode_deployment(raw)
    except WireError:
        return
    assert decode_deployment(encode(table)) == table
    assert table.version >= 0
    assert msgpack.unpackb(raw)[2]["version"] == table.version


@given(st.binary(max_size=100) | near_reports.map(msgpack.packb))
@example(alive_bytes(True))
@example(alive_bytes(-1))
def test_any_bytes_are_a_report_or_raise_wire_error(raw: bytes) -> None:
    try:
        report = decode_report(raw)
    except WireError:
        return
    assert decode_report(encode(report)) == report
    if isinstance(report, Alive):
        assert type(report.progress) is int
        assert report.progress >= 0


@given(tables, st.data())
def test_a_table_cut_anywhere_raises_wire_error(table: Deployment, data: st.DataObject) -> None:
    raw = encode(table)
    with pytest.raises(WireError):
        decode_deployment(raw[: data.draw(st.integers(0, len(raw) - 1))])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": "many"}, r"version: Expected `int`, got `str`, not 'many'"),
        ({"facts": {"model_name": "m"}}, "facts: .*missing required field"),
        ({"processes": [["dog"]]}, r"processes\[0\]"),
        ({"processes": [PROCESS | {"role": "dog"}]}, r"processes\[0\].role: .*not 'dog'"),
        ({"processes": [PROCESS | {"state": "asleep"}]}, r"processes\[0\].state: .*not 'asleep'"),
        ({"processes": [PROCESS | {"pid": -1}]}, r"processes\[0\].pid: .*not -1"),
        ({"processes": [PROCESS | {"mood": 1}]}, r"processes\[0\]: fields missing or unknown: \['mood'\]"),
        ({"surprise": 1}, r"fields missing or unknown: \['surprise'\]"),
    ],
)
def test_the_error_shows_what_is_wrong(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode_deployment(table_bytes({"version": 1, "facts": None, "processes": [PROCESS]} | changes))


@given(st.text())
def test_a_failure_is_reported_shortened_and_as_text(message: str) -> None:
    failed = Failed(message=message + "\udcff" + "x" * 3000)
    assert decode_report(encode(failed)) == failed
    assert failed.message.startswith(message[:2000])
    assert len(failed.message) == MAX_MESSAGE_CHARS


def test_find_gives_the_process_of_this_role_and_index() -> None:
    table = table_of(entry(ENGINE, 0, 1), entry(API_SERVER, 0, 2), entry(API_SERVER, 1, 3))
    assert table.find(API_SERVER, 1) == entry(API_SERVER, 1, 3)
    assert table.find(API_SERVER, 2) is None


def test_an_incarnation_has_ended_when_the_table_says_so_or_shows_a_later_one() -> None:
    table = table_of(entry(ENGINE, 0, 2), entry(ENGINE, 1, 1, state="ended"), entry(API_SERVER, 0, 1, state="stopping"))
    assert table.has_ended(ENGINE, 0, 1)
    assert not table.has_ended(ENGINE, 0, 2)
    assert not table.has_ended(ENGINE, 0, 3)  # the table is older than this incarnation
    assert table.has_ended(ENGINE, 1, 1)
    assert not table.has_ended(ENGINE, 1, 2)
    assert not table.has_ended(API_SERVER, 0, 1)
    assert not table.has_ended(API_SERVER, 5, 1)
