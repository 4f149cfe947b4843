"""Requests go to the least loaded engine that is ready."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from frontend.engines.routing import Router


def ready_router(num_engines: int) -> Router:
    router = Router(num_engines)
    for engine in range(num_engines):
        router.on_ready(engine)
    return router


def test_no_engine_is_chosen_while_none_is_ready():
    router = Router(3)
    assert router.choose() is None
    assert not router.has_ready()


def test_only_ready_engines_are_chosen():
    router = Router(3)
    router.on_ready(1)
    assert {router.choose() for _ in range(5)} == {1}
    router.on_ended(1)
    assert router.choose() is None


def test_idle_engines_take_turns():
    router = ready_router(3)
    assert [router.choose() for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_least_loaded_engine_by_the_snapshots_is_chosen():
    router = ready_router(3)
    for engine, load in enumerate([5, 2, 9]):
        router.on_load(engine, load)
    assert router.choose() == 1


def test_what_was_submitted_since_the_snapshot_counts():
    router = ready_router(2)
    router.on_load(0, 3)
    router.on_load(1, 5)
    router.on_open(0, 4)
    assert router.choose() == 1


def test_what_has_ended_since_the_snapshot_no_longer_counts():
    router = ready_router(2)
    router.on_open(0, 6)
    router.on_load(0, 6)
    router.on_load(1, 3)
    router.on_open(0, 1)
    assert router.choose() == 0


def test_a_snapshot_that_repeats_its_number_does_not_hide_what_was_submitted_meanwhile():
    router = ready_router(2)
    router.on_load(0, 4)
    router.on_load(1, 6)
    router.on_open(0, 3)
    router.on_load(0, 4)  # a long iteration: the engine has not taken in the three yet
    assert router.choose() == 1


def test_a_restarted_engine_begins_without_load():
    router = ready_router(2)
    router.on_load(0, 50)
    router.on_load(1, 1)
    router.on_ended(0)
    router.on_ready(0)
    assert router.choose() == 0


@given(st.integers(1, 6), st.integers(1, 60))
def test_requests_that_never_end_spread_evenly(num_engines: int, num_requests: int):
    router = ready_router(num_engines)
    ours: Counter[int] = Counter()
    for _ in range(num_requests):
        engine = router.choose()
        assert engine is not None
        ours[engine] += 1
        router.on_open(engine, ours[engine])
    assert max(ours.values()) - min(ours[e] for e in range(num_engines)) <= 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=8))
def test_the_chosen_engine_is_ready_and_none_that_is_ready_has_less_load(engines: list[tuple[bool, int]]):
    router = Router(len(engines))
    for engine, (is_ready, load) in enumerate(engines):
        if is_ready:
            router.on_ready(engine)
        router.on_load(engine, load)
    chosen = router.choose()
    ready = {engine: load for engine, (is_ready, load) in enumerate(engines) if is_ready}
    assert (chosen is None) == (not ready)
    if chosen is not None:
        assert ready[chosen] == min(ready.values())
