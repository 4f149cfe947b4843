"""An API server process whose statistics plane fails all the time: what P8 says must cost no request.

Run in place of `frontend.server` (see `serve_faulty`).
"""

from __future__ import annotations

import sys
from typing import Any

import zmq

from frontend import server
from frontend.counters.request_record import EngineRecord
from metrics import broadcast
from metrics.files.store import TallyStore
from metrics.usage import ProcessMetrics
from tests.e2e import jumping_clock
from tests.e2e.faulty_engine import UNTIL_OPEN, every, full_disk, no_proc


class FaultyBeats:
    """A heartbeat socket that raises at every third send."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.send = every(3, socket.send, self._fail)

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def _fail(*args: object) -> None:
        raise zmq.ZMQError(zmq.ENOTSOCK)


def main() -> int:
    connect, first_token = broadcast.connect_heartbeats, EngineRecord.first_token

    def faulty(*args: Any) -> Any:
        return FaultyBeats(connect(*args))

    broadcast.connect_heartbeats = faulty  # type: ignore[assignment]
    EngineRecord.first_token = every(  # type: ignore[method-assign]
        2, first_token, lambda record, seconds, origin: first_token(record, float("nan"), origin)
    )
    TallyStore.commit = every(3, TallyStore.commit, full_disk, UNTIL_OPEN)  # type: ignore[method-assign]
    ProcessMetrics.update = every(2, ProcessMetrics.update, no_proc)  # type: ignore[method-assign]
    jumping_clock.install()
    return server.main()


if __name__ == "__main__":
    sys.exit(main())
