"""Bulkheads: what is raised inside ends there, counted each time, logged once a kind, in bounded memory."""

from __future__ import annotations

import asyncio
import logging

import pytest

from metrics.bulkhead import MAX_KINDS, Bulkhead, FaultLog

LOG = logging.getLogger("test")


def test_a_fault_ends_at_the_bulkhead_is_counted_each_time_and_logged_once_a_kind(caplog: pytest.LogCaptureFixture):
    counted: list[str] = []
    bulkhead = Bulkhead(counted.append, LOG)
    for error in (OSError("full"), OSError("full again"), ValueError("NaN")):
        with bulkhead.around("process"):
            raise error
    bulkhead.caught("commit", OSError("full"))
    assert counted == ["process"] * 3 + ["commit"]
    assert [record.message for record in caplog.records] == [
        "event=bulkhead where=process error='full' further=counted_only",
        "event=bulkhead where=process error='NaN' further=counted_only",
        "event=bulkhead where=commit error='full' further=counted_only",
    ]


@pytest.mark.parametrize("end", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_an_end_that_is_no_fault_passes(end: type[BaseException]):
    counted: list[str] = []
    with pytest.raises(end), Bulkhead(counted.append, LOG).around("process"):
        raise end
    assert counted == []


def test_bulkheads_may_be_entered_one_within_the_other():
    counted: list[str] = []
    bulkhead = Bulkhead(counted.append, LOG)
    with bulkhead.around("commit"):
        with bulkhead.around("commit"):
            raise OSError
        raise ValueError
    assert counted == ["commit"] * 2


def test_rejected_messages_are_said_once_a_kind(caplog: pytest.LogCaptureFixture):
    faults = FaultLog(LOG)
    for kind in ("snapshot", "snapshot", "heartbeat"):
        faults.rejected(kind, ValueError("100 % noise"))
    assert [record.message for record in caplog.records] == [
        "event=wire_rejected kind=snapshot error='100 % noise' further=counted_only",
        "event=wire_rejected kind=heartbeat error='100 % noise' further=counted_only",
    ]


def test_however_many_kinds_there_are_what_is_remembered_is_bounded(caplog: pytest.LogCaptureFixture):
    faults = FaultLog(LOG)
    for number in range(3 * MAX_KINDS):
        faults.once(number, f"event=test number={number}")
    assert len(caplog.records) == MAX_KINDS
    faults.once(0, "event=test number=0")
    assert len(caplog.records) == MAX_KINDS
