"""What runs, as the supervisor says it: the newest deployment table received, and whom a newer one concerns.

The supervisor repeats the table ten times a second, so whoever is called may do things by and by. A table that does
not decode is counted, logged once, and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from engine.wire import DEPLOYMENT_TOPIC, Deployment, WireError, decode_deployment, deployment_endpoint
from frontend.sockets import Messages, SocketReader
from metrics import broadcast
from metrics.bulkhead import FaultLog

log = logging.getLogger(__name__)


class DeploymentView:
    """Calls every callback with every table that is not older than the one held, so also with repetitions."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: str) -> None:
        self.table: Deployment | None = None
        self.num_rejected = 0
        self._faults = FaultLog(log)
        self._callbacks: list[Callable[[Deployment], None]] = []
        socket = broadcast.make_subscriber(context, [deployment_endpoint(directory)], [DEPLOYMENT_TOPIC])
        self._reader = SocketReader(socket, self._on_messages)

    def subscribe(self, callback: Callable[[Deployment], None]) -> Callable[[], None]:
        """Call back from now on, at once with the table held. Returns what ends it."""
        self._callbacks.append(callback)
        if self.table is not None:
            callback(self.table)
        return lambda: self._callbacks.remove(callback)

    def close(self) -> None:
        self._callbacks.clear()
        self._reader.close()

    def _on_messages(self, messages: Messages) -> None:
        for parts in messages:
            try:
                table = decode_deployment(parts[-1])
            except WireError as error:
                self._on_rejected(error)
                continue
            if self.table is None or table.version >= self.table.version:
                self.table = table
        if self.table is not None:
            for callback in list(self._callbacks):
                callback(self.table)

    def _on_rejected(self, error: WireError) -> None:
        self._faults.rejected("deployment", error)
        self.num_rejected += 1
