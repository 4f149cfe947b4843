"""The door: what is refused at which limit, who counts towards it, and how often the others are asked."""

from __future__ import annotations

import pytest

from frontend.engines.admission import REFRESH_S, Admission, InFlight, Limits
from frontend.errors import Overloaded
from tests.fakes import FakeClock


class Door:
    """An admission whose surroundings are numbers."""

    def __init__(self, max_reqs: int | None = None, max_tokens: int | None = None) -> None:
        self.own = InFlight(0, 0)
        self.others = InFlight(0, 0)
        self.num_reads = 0
        self.rejected: list[str] = []
        self.clock = FakeClock()
        limits = Limits(max_num_queued_reqs=max_reqs, max_num_queued_tokens=max_tokens)
        self.check = Admission(limits, lambda: self.own, self._read, self.rejected.append, self.clock).check

    def _read(self) -> InFlight:
        self.num_reads += 1
        return self.others

    def admits(self, n: int = 1) -> bool:
        try:
            self.check(n)
        except Overloaded:
            return False
        return True


def test_what_is_refused_is_told_so_with_the_limit_and_when_to_try_again():
    door = Door(max_reqs=0)
    with pytest.raises(Overloaded, match="0 requests of 0") as caught:
        door.check(1)
    assert (caught.value.status, caught.value.code) == (503, "max_num_queued_reqs")
    assert caught.value.headers == {"Retry-After": "1"}


def test_without_limits_everything_is_admitted_and_nobody_is_asked():
    door = Door()
    door.own = InFlight(10**6, 10**9)
    assert door.admits(128)
    assert (door.num_reads, door.rejected) == (0, [])


@pytest.mark.parametrize(("own", "others"), [(4, 0), (0, 4), (1, 3)])
def test_sequences_of_the_whole_deployment_count_and_a_request_for_n_takes_n_places(own: int, others: int):
    door = Door(max_reqs=6)
    door.own, door.others = InFlight(own, 0), InFlight(others, 0)
    assert door.admits(1)
    assert door.admits(2)
    assert not door.admits(3)
    assert door.rejected == ["max_num_queued_reqs"]


def test_prompt_tokens_in_prefill_refuse_the_next_once_they_reach_the_limit():
    door = Door(max_tokens=100)
    door.own, door.others = InFlight(9, 60), InFlight(9, 39)
    assert door.admits()
    door.own = InFlight(9, 61)
    assert not door.admits()
    assert door.rejected == ["max_num_queued_tokens"]


def test_the_others_are_read_again_only_after_a_while_and_own_requests_count_at_once():
    door = Door(max_reqs=2)
    assert door.admits()
    door.own = InFlight(2, 0)
    assert not door.admits()
    door.own, door.others = InFlight(0, 0), InFlight(2, 0)
    door.clock.advance(REFRESH_S / 2)
    assert door.admits()
    assert door.num_reads == 1
    door.clock.advance(REFRESH_S)
    assert not door.admits()
    assert door.num_reads == 2
