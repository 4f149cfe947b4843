"""Prompt tokens beside decodes: an iteration comes to take what is wanted, within the bounds, whatever it costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.schedule.pace import FEWEST_TOKENS, TOKENS_PER_DECODE, Pace

WANTED_S, MOST = 0.1, 512
seconds = st.floats(1e-6, 100)
observations = st.lists(st.tuples(st.integers(0, MOST), st.integers(0, 64), seconds), max_size=40)


def settled(base_s: float, token_s: float, num_decodes: int = 4, most: int = MOST) -> Pace:
    """After many iterations, of such a cost, that had as many prompt tokens as they might."""
    pace = Pace(WANTED_S, most)
    for _ in range(200):
        num_tokens = pace.limit(num_decodes)
        pace.observe(num_tokens, num_decodes, base_s + num_tokens * token_s)
    return pace


@given(base_s=st.floats(0, 0.06), token_s=st.floats(1e-6, 1e-1))
def test_an_iteration_comes_to_take_what_is_wanted_unless_a_bound_is_met(base_s: float, token_s: float):
    limit = settled(base_s, token_s).limit(4)
    took_s = base_s + limit * token_s
    is_near = abs(took_s - WANTED_S) <= 0.1 * WANTED_S + token_s
    assert is_near or (limit == FEWEST_TOKENS and took_s > WANTED_S) or (limit == MOST and took_s < WANTED_S)


@given(seen=observations, num_decodes=st.integers(1, 300), most=st.integers(1, 4096))
def test_the_limit_stays_within_its_bounds_whatever_was_seen(
    seen: list[tuple[int, int, float]], num_decodes: int, most: int
):
    pace = Pace(WANTED_S, most)
    for observation in seen:
        pace.observe(*observation)
    fewest = min(most, max(FEWEST_TOKENS, TOKENS_PER_DECODE * num_decodes))
    assert fewest <= pace.limit(num_decodes) <= most
    assert pace.limit(0) == most


@given(seen=observations, slower=st.floats(1, 10))
def test_slower_iterations_never_get_more(seen: list[tuple[int, int, float]], slower: float):
    fast, slow = Pace(WANTED_S, MOST), Pace(WANTED_S, MOST)
    for num_tokens, num_decodes, duration_s in seen:
        before = fast.limit(1), slow.limit(1)
        if before[0] == before[1]:
            fast.observe(num_tokens, num_decodes, duration_s)
            slow.observe(num_tokens, num_decodes, duration_s * slower)
            assert slow.limit(1) <= fast.limit(1)


def test_iterations_that_only_prefill_or_only_decode_say_nothing():
    pace = settled(0.02, 1e-3)
    before = pace.limit(1)
    pace.observe(512, 0, 9.0)
    pace.observe(0, 8, 9.0)
    pace.observe(8, 8, 0.0)
    pace.observe(8, 8, -1.0)
    assert pace.limit(1) == before


def test_few_prompt_tokens_that_were_quick_do_not_say_that_many_would_be():
    pace = settled(0.02, 1e-3)
    before = pace.limit(1)
    for _ in range(50):
        pace.observe(3, 4, 0.023)
    assert pace.limit(1) == before


def test_one_slow_iteration_costs_no_more_than_half_and_is_forgotten():
    pace = settled(0.02, 1e-3)
    before = pace.limit(1)
    pace.observe(before, 4, 60.0)
    assert pace.limit(1) >= before // 2
    for _ in range(5):
        pace.observe(pace.limit(4), 4, 0.02 + 1e-3 * pace.limit(4))
    assert pace.limit(1) >= 0.9 * before
