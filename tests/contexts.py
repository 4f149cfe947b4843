"""ZeroMQ for tests: one call ends whatever a test has opened."""

from __future__ import annotations

from typing import Any

import zmq


class OwningContext(zmq.Context[zmq.Socket[bytes]]):
    """A context that owns its sockets: they live until `destroy` closes them. An ordinary one forgets a socket that
    nobody else holds, and a test need not hold what it never asks again; that would be a socket left open."""

    _owned: list[zmq.Socket[Any]]

    def __init__(self) -> None:
        super().__init__()
        self._owned = []

    def _add_socket(self, socket: Any) -> None:
        self._owned.append(socket)
        super()._add_socket(socket)
