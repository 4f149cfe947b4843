"""`join` over what API servers may have received from engines that really ran."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from metrics.snapshot import Snapshot
from metrics.snapshot import join as join_of_one

View = dict[int, Snapshot]


def join(a: View, b: View) -> View:
    """What is known of all engines after hearing both."""
    return a | {engine: join_of_one(a.get(engine), snapshot) for engine, snapshot in b.items()}


def run_engine(engine: int, lives: list[int]) -> list[Snapshot]:
    """All snapshots of one engine, in order: each life (incarnation) publishes so many, of a tally that only grows."""
    history: list[Snapshot] = []
    for incarnation, num_snapshots in enumerate(lives, start=1):
        for sequence in range(1, num_snapshots + 1):
            total = float(len(history) + 1)
            history.append(
                Snapshot(
                    layout_digest=bytes(16),
                    engine=engine,
                    incarnation=incarnation,
                    sequence=sequence,
                    created_unix=0.0,
                    published_unix=total,
                    grant=None,
                    echo=0,
                    is_stuck=False,
                    cells=struct.pack("<d", total),
                )
            )
    return history


@st.composite
def runs(draw: st.DrawFn) -> list[list[Snapshot]]:
    """What each of up to three engines published. Only simulated engines keep the invariant that a position is never
    reused; arbitrary snapshots would not, and `join` of them would not be commutative."""
    lives = st.lists(st.integers(0, 4), min_size=1, max_size=3)
    return [run_engine(engine, draw(lives)) for engine in range(draw(st.integers(1, 3)))]


def draw_view(data: st.DataObject, run: list[list[Snapshot]]) -> View:
    """One API server's view: some snapshot of each engine, or none."""
    view: View = {}
    for history in run:
        snapshot = data.draw(st.sampled_from([None, *history]))
        if snapshot is not None:
            view[snapshot.engine] = snapshot
    return view


@given(runs(), st.data())
def test_join_is_commutative_associative_and_idempotent(run: list[list[Snapshot]], data: st.DataObject) -> None:
    a, b, c = (draw_view(data, run) for _ in range(3))
    assert join(a, b) == join(b, a)
    assert join(join(a, b), c) == join(a, join(b, c))
    assert join(a, a) == a
    assert join(join(a, b), b) == join(a, b)


@given(runs(), st.data())
def test_join_never_loses_the_greatest_position(run: list[list[Snapshot]], data: st.DataObject) -> None:
    views = [draw_view(data, run) for _ in range(4)]
    joined: View = {}
    for view in views:
        joined = join(joined, view)
    for engine in range(len(run)):
        positions = [view[engine].position for view in views if engine in view]
        assert (joined[engine].position if engine in joined else None) == max(positions, default=None)


@given(runs(), st.data())
def test_no_total_falls_in_whatever_order_snapshots_arrive_and_repeat(
    run: list[list[Snapshot]], data: st.DataObject
) -> None:
    arrivals = data.draw(st.lists(st.sampled_from([None, *(s for h in run for s in h)]), max_size=20))
    view: View = {}
    totals = [0.0] * len(run)
    for snapshot in filter(None, arrivals):
        view = join(view, {snapshot.engine: snapshot})
        total = struct.unpack("<d", view[snapshot.engine].cells)[0]
        assert total >= totals[snapshot.engine]
        totals[snapshot.engine] = total
