"""The deployment table and the reports of children, as bytes."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.wire.deployment import (
    STATES,
    TABLE_VERSION,
    Alive,
    Deployment,
    DeploymentError,
    Facts,
    Failed,
    ProcessEntry,
    Ready,
    Report,
    decode_deployment,
    decode_report,
    encode_deployment,
    encode_report,
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
near_tables = st.tuples(st.just(TABLE_VERSION), counts | fields, st.none() | fields, st.lists(fields, max_size=2))
near_reports = st.tuples(st.just(TABLE_VERSION), st.sampled_from(["ready", "alive", "failed"]) | scalars, fields)


def table_of(*processes: ProcessEntry) -> Deployment:
    return Deployment(version=1, facts=None, processes=processes)


def entry(role: str, index: int, incarnation: int, state: str = "ready") -> ProcessEntry:
    return ProcessEntry(role=role, index=index, incarnation=incarnation, pid=1, state=state)


@given(tables)
def test_a_table_comes_back_as_it_was(table: Deployment) -> None:
    assert decode_deployment(encode_deployment(table)) == table


@given(reports)
def test_a_report_comes_back_as_it_was(report: Report) -> None:
    assert decode_report(encode_report(report)) == report


@given(st.binary(max_size=100) | near_tables.map(msgpack.packb))
@example(msgpack.packb([TABLE_VERSION, float("inf"), None, []]))
@example(msgpack.packb([TABLE_VERSION, -1, None, []]))
@example(msgpack.packb([TABLE_VERSION, 1.5, None, []]))
def test_any_bytes_are_a_table_or_raise_deployment_error(raw: bytes) -> None:
    try:
        table = decode_deployment(raw)
    except DeploymentError:
        return
    assert decode_deployment(encode_deployment(table)) == table
    assert table.version >= 0
    assert msgpack.unpackb(raw)[1] == table.version


@given(st.binary(max_size=100) | near_reports.map(msgpack.packb))
@example(msgpack.packb([TABLE_VERSION, "alive", True, True]))
@example(msgpack.packb([TABLE_VERSION, "alive", -1, True]))
def test_any_bytes_are_a_report_or_raise_deployment_error(raw: bytes) -> None:
    try:
        report = decode_report(raw)
    except DeploymentError:
        return
    assert decode_report(encode_report(report)) == report
    if isinstance(report, Alive):
        assert type(report.progress) is int
        assert report.progress >= 0


@given(tables, st.data())
def test_a_table_cut_anywhere_raises_deployment_error(table: Deployment, data: st.DataObject) -> None:
    raw = encode_deployment(table)
    with pytest.raises(DeploymentError):
        decode_deployment(raw[: data.draw(st.integers(0, len(raw) - 1))])


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, 2, "version"),
        (1, "many", "version"),
        (2, {"model_name": "m"}, "facts"),
        (3, [["dog", 0, 1, 2, "ready"]], "dog"),
    ],
)
def test_the_error_shows_what_is_wrong(at: int, value: Any, complaint: str) -> None:
    message = msgpack.unpackb(encode_deployment(table_of(entry(ENGINE, 0, 1))))
    message[at] = value
    with pytest.raises(DeploymentError, match=complaint):
        decode_deployment(msgpack.packb(message))


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
