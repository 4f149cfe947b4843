"""The door: what is refused at which limit, who counts towards it, and that no limit is passed by several at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.engines.admission import Admission, InFlight, Limits
from frontend.errors import BadRequest, Overloaded


class Door:
    """An admission whose surroundings are numbers."""

    def __init__(self, max_reqs: int | None = None, max_tokens: int | None = None) -> None:
        self.own = InFlight(0, 0)
        self.others = InFlight(0, 0)
        self.num_reads = 0
        self.announced: list[InFlight] = []
        self.rejected: list[str] = []
        limits = Limits(max_num_queued_reqs=max_reqs, max_num_queued_tokens=max_tokens)
        self.admission = Admission(
            limits, lambda: self.own, self._read, self.announced.append, on_rejected=self.rejected.append
        )

    def _read(self) -> InFlight:
        self.num_reads += 1
        return self.others

    def admits(self, n: int = 1) -> bool:
        try:
            self.admission.admit(n, 0)
        except Overloaded:
            return False
        return True


def test_what_is_refused_is_told_so_with_the_limit_and_when_to_try_again():
    door = Door(max_reqs=1)
    door.others = InFlight(1, 0)
    for ask in (door.admission.check, lambda n: door.admission.admit(n, 5)):
        with pytest.raises(Overloaded, match="1 requests of 1") as caught:
            ask(1)
        assert (caught.value.status, caught.value.code) == (503, "max_num_queued_reqs")
        assert caught.value.headers == {"Retry-After": "1"}


def test_what_can_never_have_a_place_is_a_fault_of_the_request():
    door = Door(max_reqs=2)
    for ask in (door.admission.check, lambda n: door.admission.admit(n, 5)):
        with pytest.raises(BadRequest, match="4 sequences can never be served: at most 2"):
            ask(4)
    assert (door.rejected, door.announced) == ([], [])


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


def test_what_is_announced_is_taken_back_whether_it_is_admitted_or_not():
    door = Door(max_reqs=2)
    door.admission.admit(2, 7)
    assert door.announced == [(2, 7), (-2, -7)]
    door.own = InFlight(1, 0)
    assert not door.admits(2)
    assert sum(more.num_sequences for more in door.announced) == 0


class Servers:
    """API servers that share a limit. Each step of an admission may be followed by whole admissions of the others."""

    LIMIT = 4

    def __init__(self, num: int, interrupt: Callable[[], None]) -> None:
        self.in_flight = [0] * num
        self.shown = [0] * num  # what the others can read
        self._interrupt = interrupt
        self._doors = [self._door(index) for index in range(num)]

    def _door(self, index: int) -> Admission:
        def others() -> InFlight:
            self._interrupt()
            found = InFlight(sum(self.shown) - self.shown[index], 0)
            self._interrupt()
            return found

        def announce(more: InFlight) -> None:
            self._interrupt()
            if more.num_sequences > 0:
                self.shown[index] = self.in_flight[index] + int(more.num_sequences)
            self._interrupt()

        return Admission(
            Limits(max_num_queued_reqs=self.LIMIT),
            lambda: InFlight(self.in_flight[index], 0),
            others,
            announce,
            on_rejected=lambda limit: None,
        )

    def ask(self, index: int, n: int) -> bool:
        try:
            self._doors[index].admit(n, 1)
        except Overloaded:
            is_admitted = False
        else:
            is_admitted = True
            self.in_flight[index] += n
        self.shown[index] = self.in_flight[index]  # committed
        return is_admitted


asks = st.tuples(st.integers(0, 3), st.integers(1, Servers.LIMIT))


@given(st.lists(asks, min_size=1, max_size=4), st.lists(st.none() | asks, max_size=16))
def test_no_limit_is_passed_however_the_admissions_of_several_api_servers_interleave(
    first: list[tuple[int, int]], meanwhile: list[tuple[int, int] | None]
):
    busy: set[int] = set()

    def interrupt() -> None:
        """Another one, which is not in the middle of an admission, begins and ends one here; perhaps."""
        one = meanwhile.pop() if meanwhile else None
        if one is not None and one[0] not in busy:
            ask(*one)

    def ask(index: int, n: int) -> None:
        busy.add(index)
        servers.ask(index, n)
        busy.remove(index)
        assert sum(servers.in_flight) <= Servers.LIMIT

    servers = Servers(4, interrupt)
    for one in first:
        ask(*one)


def test_an_api_server_that_is_alone_is_admitted_up_to_the_limit():
    servers = Servers(2, lambda: None)
    assert [servers.ask(index, n) for index, n in ((0, 2), (1, 1), (0, 2), (1, 1), (0, 1))] == [
        True,
        True,
        False,
        True,
        False,
    ]
