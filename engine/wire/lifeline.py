"""The socket between the supervisor and one child: the child reports on it, and either end sees the other's end.

A SEQPACKET pair: a message is a whole report or nothing. Nothing here waits: an `Alive` that the supervisor has no room
for is dropped, as the next one says as much; other reports are kept, and go before the next.
"""

from __future__ import annotations

import signal
import socket
import threading

from engine.wire.codec import WireError, encode
from engine.wire.deployment import Alive, Report, decode_report

MAX_REPORT_BYTES = 65_536
# How the supervisor tells a child to end in order. Not SIGTERM: service managers, terminals and `timeout` send that to
# all processes of a group, and children that obeyed would cut their streams while the supervisor drains.
STOP_SIGNAL = signal.SIGUSR1


def obey_the_supervisor_alone() -> None:
    """For a child: what others send to the whole group is the supervisor's to answer, and its end is seen on the
    lifeline."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def make_lifeline() -> tuple[socket.socket, socket.socket]:
    """(the supervisor's end, the child's end); the child's is to be inherited."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Lifeline:
    """A child's end, by inherited descriptor. Any thread may report."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._kept: list[Report] = []
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor that becomes readable when the supervisor has ended."""
        return self._socket.fileno()

    def report(self, report: Report) -> bool:
        """False when it did not get through: the supervisor does not read, or is gone."""
        with self._lock:
            waiting, self._kept = [*self._kept, report], []
            for position, one in enumerate(waiting):
                if not self._send(one):
                    self._kept = [r for r in waiting[position:] if not isinstance(r, Alive)]
                    return False
        return True

    def _send(self, report: Report) -> bool:
        try:
            self._socket.send(encode(report))
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def is_severed(self) -> bool:
        """Whether the supervisor has ended."""
        try:
            return self._socket.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def close(self) -> None:
        """Close this end; the supervisor takes that for the process's end."""
        self._socket.close()


def read_reports(end: socket.socket) -> tuple[list[Report], bool]:
    """On the supervisor's end, without waiting: all reports that have come, and whether the child may send more. What
    is no report is passed over: a child that babbles is noticed by its silence."""
    reports: list[Report] = []
    while True:
        try:
            raw = end.recv(MAX_REPORT_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return reports, True
        except ConnectionError:
            return reports, False
        if not raw:
            return reports, False
        try:
            reports.append(decode_report(raw))
        except WireError:
            continue
