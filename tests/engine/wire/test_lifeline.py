"""Both ends of a lifeline, in one process."""

from __future__ import annotations

import pytest

from engine.wire.deployment import Alive, Failed, Ready
from engine.wire.lifeline import Lifeline, make_lifeline, read_reports


@pytest.fixture
def ends():
    ours, theirs = make_lifeline()
    lifeline = Lifeline(theirs.detach())
    yield ours, lifeline
    ours.close()
    lifeline.close()


def test_reports_arrive_whole_and_in_order(ends):
    ours, lifeline = ends
    reports = [Alive(progress=1, is_busy=True), Ready(), Failed(message="no such file")]
    assert all(lifeline.report(report) for report in reports)
    assert read_reports(ours) == (reports, True)
    assert read_reports(ours) == ([], True)


def test_a_supervisor_that_does_not_read_makes_nobody_wait(ends):
    ours, lifeline = ends
    sent = 0
    while lifeline.report(Alive(progress=sent, is_busy=False)):
        sent += 1
        assert sent < 1_000_000, "the socket is never full"
    reports, is_open = read_reports(ours)
    assert is_open
    assert reports == [Alive(progress=number, is_busy=False) for number in range(sent)]
    assert lifeline.report(Alive(progress=0, is_busy=False))


def test_being_ready_is_said_as_soon_as_there_is_room_for_it(ends):
    ours, lifeline = ends
    sent = 0
    while lifeline.report(Alive(progress=sent, is_busy=False)):
        sent += 1
    assert not lifeline.report(Ready())
    assert not lifeline.report(Alive(progress=0, is_busy=False))
    reports, _ = read_reports(ours)
    assert len(reports) == sent
    assert lifeline.report(Alive(progress=7, is_busy=True))
    assert read_reports(ours) == ([Ready(), Alive(progress=7, is_busy=True)], True)


def test_the_longest_failure_fits_into_a_report(ends):
    ours, lifeline = ends
    assert lifeline.report(Failed(message="ü" * 1_000_000))
    [report], _ = read_reports(ours)
    assert isinstance(report, Failed)
    assert set(report.message) == {"ü"}


def test_the_child_sees_the_supervisors_end(ends):
    ours, lifeline = ends
    assert not lifeline.is_severed()
    ours.close()
    assert lifeline.is_severed()
    assert not lifeline.report(Ready())


def test_the_supervisor_reads_last_words_and_sees_the_childs_end(ends):
    ours, lifeline = ends
    lifeline.report(Failed(message="no"))
    lifeline.close()
    assert read_reports(ours) == ([Failed(message="no")], False)


def test_what_is_no_report_is_passed_over():
    ours, theirs = make_lifeline()
    theirs.send(b"\xc1 what is this")
    lifeline = Lifeline(theirs.detach())
    lifeline.report(Ready())
    assert read_reports(ours) == ([Ready()], True)
    ours.close()
    lifeline.close()
