"""An engine process whose statistics plane fails all the time: what P8 says must cost no request.

Run in place of `engine.loop.process` (see `serve_faulty`). Every fault comes every few times, so that what is counted
can also be seen: a tally that is never committed says nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from engine.loop import process
from engine.schedule.record import Recorder
from metrics.broadcast import TOPIC_TALLY, Publisher
from metrics.files.store import TallyStore
from metrics.usage import ProcessMetrics
from tests.e2e import jumping_clock

UNTIL_OPEN = 3  # commits of a start: where the disk is full then, the process cannot start, and says so


def every(number: int, what: Callable[..., Any], instead: Callable[..., Any], first: int = 0) -> Callable[..., Any]:
    """`what`, but each `number`-th call, after the first ones, is `instead`."""
    calls: Iterator[int] = itertools.count(1)

    def either(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        return (instead if call > first and call % number == 0 else what)(*args, **kwargs)

    return either


def full_disk(*args: object) -> None:
    raise OSError(28, "No space left on device")


def broken_send(*args: object) -> bool:
    raise RuntimeError("a send that raises")


def no_proc(*args: object) -> None:
    raise PermissionError("no /proc")


def main() -> int:
    iteration, publish = Recorder.iteration, Publisher.publish

    def of_no_duration(recorder: Recorder, counts: Any, duration_s: float) -> None:
        iteration(recorder, counts, float("nan"))

    def garbage(publisher: Publisher, topic: bytes, payload: bytes) -> bool:
        return publish(publisher, topic, b"\xc1" if topic == TOPIC_TALLY else payload)

    Recorder.iteration = every(5, iteration, of_no_duration)  # type: ignore[method-assign]
    Publisher.publish = every(7, every(5, publish, garbage), broken_send)  # type: ignore[method-assign]
    TallyStore.commit = every(3, TallyStore.commit, full_disk, UNTIL_OPEN)  # type: ignore[method-assign]
    ProcessMetrics.update = every(2, ProcessMetrics.update, no_proc)  # type: ignore[method-assign]
    jumping_clock.install()
    return process.main()


if __name__ == "__main__":
    sys.exit(main())
