"""The election's rules, one by one; `test_election_machine` drives them through everything at once."""

from __future__ import annotations

import pickle

from metrics.election import LEASE_MARGIN, Granter, Holder
from metrics.snapshot import NOWHERE, Grant, Heartbeat, Resign, Snapshot, Term
from tests.fakes import FakeClock

LEASE_S = 0.6
HOLD_S = LEASE_MARGIN * LEASE_S


def beat(api_server: int, number: int, ack: tuple[int, int], incarnation: int = 1) -> Heartbeat:
    return Heartbeat(api_server=api_server, incarnation=incarnation, number=number, ack=ack)


def snapshot_at(sequence: int, grant: Grant | None, echo: int, incarnation: int = 1) -> Snapshot:
    return Snapshot(
        layout_digest=bytes(16),
        engine=0,
        incarnation=incarnation,
        sequence=sequence,
        created_unix=0.0,
        published_unix=0.0,
        grant=grant,
        echo=echo,
        is_stuck=False,
        cells=b"",
    )


def grant_to(api_server: int, term: Term = (1, 1), incarnation: int = 1) -> Grant:
    return Grant(term=term, api_server=api_server, incarnation=incarnation)


def granter_with_live(*api_servers: int, now: float = 10.0) -> Granter:
    """A first-incarnation engine at `now` that published snapshot 1 and heard it acknowledged by these."""
    granter = Granter(1, LEASE_S, now)
    granter.on_publish(1, now)
    for api_server in api_servers:
        granter.on_heartbeat(beat(api_server, 1, (1, 1)), now)
    return granter


# --- the granter ---


def test_nobody_is_granted_anything_before_somebody_is_live() -> None:
    granter = Granter(1, LEASE_S, 10.0)
    assert granter.on_publish(1, 10.0) == (None, 0)
    granter.on_heartbeat(beat(0, 1, NOWHERE), 10.0)  # has not heard this engine yet
    assert granter.on_publish(2, 10.05) == (None, 0)


def test_a_first_engine_grants_to_the_lowest_live_index_at_once_and_echoes_its_heartbeat() -> None:
    granter = granter_with_live(2, 1)
    assert granter.on_publish(2, 10.05) == (grant_to(1), 1)


def test_the_incumbent_keeps_its_grant_when_a_lower_index_comes_to_life() -> None:
    granter = granter_with_live(1)
    granter.on_publish(2, 10.05)
    granter.on_heartbeat(beat(0, 1, (1, 2)), 10.1)
    granter.on_heartbeat(beat(1, 2, (1, 2)), 10.1)
    assert granter.on_publish(3, 10.15) == (grant_to(1), 2)


def test_another_is_granted_only_after_the_lease_and_its_margin_since_the_last_echoed_heartbeat() -> None:
    granter = granter_with_live(0, 1)
    granter.on_publish(2, 10.0)
    for sequence in range(3, 100):
        now = 10.0 + 0.01 * (sequence - 2)
        granter.on_heartbeat(beat(1, sequence, (1, sequence - 1)), now)
        grant, _ = granter.on_publish(sequence, now)
        assert grant == (grant_to(0) if now < 10.0 + HOLD_S else grant_to(1, term=(1, 2)))


def test_the_wait_runs_from_the_receipt_of_a_heartbeat_not_from_its_echo() -> None:
    granter = granter_with_live(0)  # heartbeat 1 received at 10.0
    granter.on_publish(2, 10.5)  # and echoed only now
    granter.on_heartbeat(beat(1, 1, (1, 2)), 10.5)
    assert granter.on_publish(3, 10.0 + HOLD_S)[0] == grant_to(1, term=(1, 2))


def test_a_grant_that_ran_out_with_nobody_else_alive_is_withdrawn() -> None:
    granter = granter_with_live(0)
    granter.on_publish(2, 10.05)
    assert granter.on_publish(3, 10.0 + HOLD_S) == (None, 0)


def test_a_holder_that_speaks_but_does_not_hear_loses_the_grant() -> None:
    granter = granter_with_live(0)
    for number in range(2, 40):
        now = 10.0 + 0.05 * number
        granter.on_publish(number, now)
        granter.on_heartbeat(beat(0, number, (1, 1)), now)
    # Snapshot 1 was acknowledged afresh until 10.6; the last of those heartbeats was echoed until 10.6 + 0.63.
    assert granter.grant is None


def test_a_heartbeat_that_acknowledges_another_incarnation_of_the_engine_counts_for_nothing() -> None:
    granter = Granter(2, LEASE_S, 10.0)
    granter.on_publish(1, 11.0)
    granter.on_heartbeat(beat(0, 1, (1, 1)), 11.0)
    assert granter.on_publish(2, 11.05) == (None, 0)
    granter.on_heartbeat(beat(0, 2, (2, 2)), 11.1)
    assert granter.on_publish(3, 11.1) == (grant_to(0, term=(2, 1)), 2)


def test_a_restarted_engine_waits_for_its_predecessors_grants_to_run_out() -> None:
    granter = Granter(2, LEASE_S, 10.0)
    granter.on_publish(1, 10.0)
    granter.on_heartbeat(beat(0, 1, (2, 1)), 10.3)
    assert granter.on_publish(2, 10.0 + HOLD_S - 0.001) == (None, 0)
    assert granter.on_publish(3, 10.0 + HOLD_S) == (grant_to(0, term=(2, 1)), 1)


def test_a_resignation_frees_the_grant_for_the_very_next_snapshot() -> None:
    granter = granter_with_live(0, 1)
    granter.on_publish(2, 10.05)
    granter.on_resign(Resign(api_server=0, incarnation=1, term=(1, 1)), 10.06)
    assert granter.on_publish(3, 10.06) == (grant_to(1, term=(1, 2)), 1)


def test_a_resignation_of_another_term_or_process_frees_nothing() -> None:
    granter = granter_with_live(0, 1)
    granter.on_publish(2, 10.05)
    for api_server, incarnation, term in [(0, 1, (1, 0)), (0, 1, (1, 2)), (1, 1, (1, 1)), (0, 2, (1, 1))]:
        granter.on_resign(Resign(api_server=api_server, incarnation=incarnation, term=term), 10.06)
        assert granter.on_publish(3, 10.06)[0] == grant_to(0)


def test_who_resigned_is_a_candidate_again_only_with_its_next_heartbeat() -> None:
    granter = granter_with_live(0)
    granter.on_publish(2, 10.05)
    granter.on_resign(Resign(api_server=0, incarnation=1, term=(1, 1)), 10.06)
    granter.on_heartbeat(beat(0, 1, (1, 1)), 10.07)  # a repeated one
    assert granter.on_publish(3, 10.1) == (None, 0)
    granter.on_heartbeat(beat(0, 2, (1, 3)), 10.15)
    assert granter.on_publish(4, 10.2) == (grant_to(0, term=(1, 2)), 2)


def test_after_the_holders_reported_end_the_very_next_snapshot_names_another() -> None:
    granter = granter_with_live(0, 1)
    granter.on_publish(2, 10.05)
    granter.on_ended(0, 1, 10.06)
    assert granter.on_publish(3, 10.06) == (grant_to(1, term=(1, 2)), 1)


def test_the_end_of_an_earlier_incarnation_takes_nothing_from_a_later_one() -> None:
    granter = granter_with_live()
    granter.on_heartbeat(beat(0, 1, (1, 1), incarnation=2), 10.0)
    granter.on_publish(2, 10.05)
    granter.on_ended(0, 1, 10.06)
    assert granter.on_publish(3, 10.06)[0] == grant_to(0, incarnation=2)


def test_the_first_word_of_a_later_incarnation_ends_its_predecessors_grant() -> None:
    granter = granter_with_live(0, 1)
    granter.on_publish(2, 10.05)
    granter.on_heartbeat(beat(0, 1, NOWHERE, incarnation=2), 10.06)
    assert granter.on_publish(3, 10.06)[0] == grant_to(1, term=(1, 2))


def test_late_heartbeats_of_an_ended_incarnation_do_not_revive_it() -> None:
    granter = granter_with_live(0)
    granter.on_publish(2, 10.05)
    granter.on_ended(0, 1, 10.1)
    for sequence in range(3, 100):  # far beyond the time for which the end itself is remembered
        now = 10.1 + 0.05 * sequence
        granter.on_heartbeat(beat(0, sequence, (1, 2)), now)
        assert granter.on_publish(sequence, now) == (None, 0)


def test_repeated_and_overtaken_heartbeats_extend_nothing() -> None:
    granter = granter_with_live(0)
    granter.on_heartbeat(beat(0, 5, (1, 1)), 10.1)
    assert granter.on_publish(2, 10.1)[1] == 5
    granter.on_heartbeat(beat(0, 5, (1, 1)), 10.5)
    granter.on_heartbeat(beat(0, 4, (1, 2)), 10.5)
    assert granter.on_publish(3, 10.5) == (grant_to(0), 5)
    assert granter.on_publish(4, 10.1 + HOLD_S) == (None, 0)


def test_a_granter_remembers_no_more_after_a_long_life_than_after_a_short_one() -> None:
    granter = Granter(1, LEASE_S, 0.0)
    sizes = []
    for sequence in range(1, 20_001):
        now = 0.01 * sequence
        granter.on_publish(sequence, now)
        incarnation = 1 + sequence // 100
        granter.on_heartbeat(beat(sequence % 8, sequence, (1, sequence), incarnation), now)
        granter.on_ended(sequence % 8, incarnation - 1, now)
        if sequence in (1_000, 20_000):
            sizes.append(len(pickle.dumps(granter)))
    assert sizes[1] < 1.2 * sizes[0]


def test_the_margin_covers_a_slow_holder_and_a_fast_engine() -> None:
    """Clocks 2 % off in the worst directions, messages without delay, looked at every millisecond of true time."""
    time = FakeClock(0.0)
    engine_clock, holder_clock = time.skewed(0.0, 1.02), time.skewed(5.0, 0.98)
    granter, holder = Granter(1, LEASE_S, engine_clock()), Holder(0, 1, LEASE_S)
    holder.on_snapshot(snapshot_at(1, *granter.on_publish(1, engine_clock())), holder_clock())
    granter.on_heartbeat(holder.heartbeat(holder_clock()), engine_clock())  # its last
    holder.on_snapshot(snapshot_at(2, *granter.on_publish(2, engine_clock())), holder_clock())
    assert holder.may_export(holder_clock())
    for sequence in range(3, 703):
        time.advance(0.001)
        granter.on_heartbeat(beat(1, sequence, (1, sequence - 1)), engine_clock())
        grant, _ = granter.on_publish(sequence, engine_clock())
        assert grant == grant_to(0) or not holder.may_export(holder_clock())
    assert grant == grant_to(1, term=(1, 2))


# --- the holder ---


def test_the_right_runs_from_the_sending_of_the_echoed_heartbeat() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.heartbeat(10.0)
    assert holder.on_snapshot(snapshot_at(1, grant_to(0), echo=1), 10.5)
    assert holder.may_export(10.599)
    assert not holder.may_export(10.6)


def test_a_grant_to_another_or_to_an_earlier_incarnation_gives_no_right() -> None:
    for grant in (None, grant_to(1), grant_to(0, incarnation=1)):
        holder = Holder(0, 2, LEASE_S)
        holder.heartbeat(10.0)
        holder.on_snapshot(snapshot_at(1, grant, echo=1), 10.01)
        assert not holder.may_export(10.02)


def test_an_echo_of_a_heartbeat_never_sent_gives_no_right() -> None:
    for echo in (0, 2):
        holder = Holder(0, 1, LEASE_S)
        holder.heartbeat(10.0)
        holder.on_snapshot(snapshot_at(1, grant_to(0), echo=echo), 10.01)
        assert not holder.may_export(10.02)


def test_stale_snapshots_change_nothing() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.heartbeat(10.0)
    newest = snapshot_at(7, grant_to(0), echo=1)
    assert holder.on_snapshot(newest, 10.01)
    for sequence in (7, 6, 1):
        assert not holder.on_snapshot(snapshot_at(sequence, None, echo=0), 10.02)
    assert holder.snapshot is newest
    assert holder.may_export(10.03)
    assert holder.on_snapshot(snapshot_at(1, None, echo=0, incarnation=2), 10.04)
    assert not holder.may_export(10.04)


def test_a_holder_that_thaws_has_no_right_even_before_it_hears_anything() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.heartbeat(10.0)
    holder.on_snapshot(snapshot_at(1, grant_to(0), echo=1), 10.01)
    assert not holder.may_export(13.0)
    holder.on_snapshot(snapshot_at(2, grant_to(0), echo=1), 13.0)  # was waiting in the socket
    assert not holder.may_export(13.0)


def test_the_echo_of_an_earlier_time_gives_no_right_when_the_grant_comes_back() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.heartbeat(10.0)
    holder.on_snapshot(snapshot_at(1, grant_to(0), echo=1), 10.01)
    holder.on_snapshot(snapshot_at(20, grant_to(1, term=(1, 2)), echo=9), 10.7)
    holder.heartbeat(10.75)
    holder.on_snapshot(snapshot_at(40, grant_to(0, term=(1, 3)), echo=1), 10.8)
    assert not holder.may_export(10.8)
    holder.on_snapshot(snapshot_at(41, grant_to(0, term=(1, 3)), echo=2), 10.85)
    assert holder.may_export(10.85)


def test_a_holder_never_exports_at_or_below_a_term_it_resigned() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.heartbeat(10.0)
    holder.on_snapshot(snapshot_at(1, grant_to(0, term=(1, 3)), echo=1), 10.01)
    assert holder.resign() == Resign(api_server=0, incarnation=1, term=(1, 3))
    assert not holder.may_export(10.01)
    for sequence, term in [(2, (1, 3)), (3, (1, 2))]:
        holder.on_snapshot(snapshot_at(sequence, grant_to(0, term=term), echo=1), 10.02)
        assert not holder.may_export(10.02)
    holder.on_snapshot(snapshot_at(4, grant_to(0, term=(1, 4)), echo=1), 10.03)
    assert holder.may_export(10.03)


def test_only_who_is_named_has_something_to_resign() -> None:
    holder = Holder(0, 1, LEASE_S)
    assert holder.resign() is None
    holder.on_snapshot(snapshot_at(1, grant_to(1), echo=1), 10.0)
    assert holder.resign() is None


def test_a_lost_resignation_is_said_again_until_the_engine_has_heard_it() -> None:
    holder = Holder(0, 1, LEASE_S)
    holder.on_snapshot(snapshot_at(1, grant_to(0), echo=1), 10.0)
    first = holder.resign()
    holder.on_snapshot(snapshot_at(2, grant_to(0), echo=1), 10.05)
    assert first is not None
    assert holder.resign() == first
    holder.on_snapshot(snapshot_at(3, grant_to(1, term=(1, 2)), echo=4), 10.1)
    assert holder.resign() is None


def test_heartbeats_acknowledge_the_newest_snapshot_but_none_that_names_the_sender_in_vain() -> None:
    holder = Holder(0, 1, LEASE_S)
    assert holder.heartbeat(10.0) == beat(0, 1, NOWHERE)
    holder.on_snapshot(snapshot_at(5, grant_to(0), echo=1), 10.05)
    assert holder.heartbeat(10.1) == beat(0, 2, (1, 5))
    holder.resign()
    assert holder.heartbeat(10.2) == beat(0, 3, NOWHERE)
    holder.on_snapshot(snapshot_at(6, None, echo=0), 10.25)
    assert holder.heartbeat(10.3) == beat(0, 4, (1, 6))


def test_a_holder_remembers_no_more_after_a_long_life_than_after_a_short_one() -> None:
    holder = Holder(0, 1, LEASE_S)
    sizes = []
    for number in range(1, 20_001):
        now = 0.001 * number
        holder.heartbeat(now)
        holder.on_snapshot(snapshot_at(number, grant_to(0), echo=number), now)
        if number in (1_000, 20_000):
            sizes.append(len(pickle.dumps(holder)))
    assert sizes[1] < 1.2 * sizes[0]
