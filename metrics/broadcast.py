"""The sockets of the statistics plane: snapshots and other broadcasts out, heartbeats back.

Not the messages (`metrics.snapshot`), nor any loop or thread. Plain ZeroMQ: pass a
`zmq.asyncio.Context` to get sockets to await. Every socket is bounded, lingers for nobody and is made here.

Publishing never waits. A subscriber that does not read loses messages once its own queue is full, and nobody else
does; as a snapshot is a whole tally, the next one makes up for all that were lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeVar

import zmq

TOPIC_TALLY: Final = b"tally"
TOPIC_ITERATIONS: Final = b"iterations"

# Messages queued for one subscriber on either side: some seconds of snapshots, a fraction of a second of iterations.
SUBSCRIBER_HWM: Final = 128
# Heartbeats queued for one engine: older ones say nothing that the next does not say better.
HEARTBEAT_HWM: Final = 8
# Heartbeats queued by an engine: every API server's of about a second.
BEACON_HWM: Final = 1024
RECONNECT_MS: Final = 20  # a restarted process is found again well within a lease
# Source: unix(7): sun_path holds 108 bytes with the NUL that ends it.
MAX_IPC_PATH_BYTES: Final = 107

SocketT = TypeVar("SocketT", bound="zmq.Socket[Any]")


class BroadcastError(ValueError):
    """An endpoint that cannot be used; the text names it and says why."""


def snapshot_endpoint(directory: str, engine: int) -> str:
    """Where an engine publishes, whichever its incarnation; raises BroadcastError."""
    return _ipc(f"{directory}/engine-{engine}.snapshots")


def heartbeat_endpoint(directory: str, engine: int) -> str:
    """Where an engine's beacon receives, whichever its incarnation; raises BroadcastError."""
    return _ipc(f"{directory}/engine-{engine}.heartbeats")


def _ipc(path: str) -> str:
    num_bytes = len(path.encode())
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise BroadcastError(f"socket path of {num_bytes} bytes is longer than {MAX_IPC_PATH_BYTES}: {path}")
    return f"ipc://{path}"


class Publisher:
    """Publishes (topic, payload) to whoever subscribed. Belongs to the thread that made it."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        """Binds; raises BroadcastError."""
        # XPUB rather than PUB: it tells who subscribed to what. It drops for full subscribers alone (no XPUB_NODROP).
        self._socket: zmq.Socket[Any] = zmq.Context.socket(context, zmq.XPUB, socket_class=zmq.Socket)
        self._socket.set(zmq.SNDHWM, SUBSCRIBER_HWM)
        self._socket.set(zmq.RCVHWM, BEACON_HWM)  # subscriptions not yet looked at
        self._socket.set(zmq.LINGER, 0)
        self._subscribed: set[bytes] = set()
        _bind(self._socket, endpoint)

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Send to all subscribers that keep up; False when it was dropped for all of them. Never waits or raises."""
        try:
            self._socket.send_multipart([topic, payload], flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def has_subscribers(self, topic: bytes) -> bool:
        """Whether anybody subscribed to this topic, so that packing a message is worth the while."""
        self._take_subscriptions()
        return any(topic.startswith(prefix) for prefix in self._subscribed)

    def close(self) -> None:
        """Unbind; what is queued is dropped."""
        self._socket.close(linger=0)

    def _take_subscriptions(self) -> None:
        """XPUB hands over the first subscription to each prefix and the last cancellation."""
        while True:
            try:
                event = self._socket.recv(flags=zmq.NOBLOCK)
            except zmq.ZMQError:  # EAGAIN: no more
                return
            match event[:1]:
                case b"\x01":
                    self._subscribed.add(event[1:])
                case b"\x00":
                    self._subscribed.discard(event[1:])


def make_subscriber(context: zmq.Context[SocketT], endpoints: Iterable[str], topics: Iterable[bytes]) -> SocketT:
    """A SUB socket; each message is (topic, payload). What is not there yet, or goes and comes back, is connected to
    as soon as it is there."""
    socket = context.socket(zmq.SUB)
    socket.set(zmq.RCVHWM, SUBSCRIBER_HWM)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    for topic in topics:
        socket.set(zmq.SUBSCRIBE, topic)
    for endpoint in endpoints:
        _connect(socket, endpoint)
    return socket


def bind_heartbeats(context: zmq.Context[SocketT], endpoint: str) -> SocketT:
    """The engine's PULL socket; raises BroadcastError."""
    socket = context.socket(zmq.PULL)
    socket.set(zmq.RCVHWM, BEACON_HWM)
    socket.set(zmq.LINGER, 0)
    _bind(socket, endpoint)
    return socket


def connect_heartbeats(context: zmq.Context[SocketT], endpoint: str) -> SocketT:
    """An API server's PUSH socket to one engine. Send with `zmq.NOBLOCK`: it raises `zmq.Again` while the engine is
    away or does not read, and the heartbeat is then lost, as it should be."""
    socket = context.socket(zmq.PUSH)
    socket.set(zmq.SNDHWM, HEARTBEAT_HWM)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IMMEDIATE, 1)  # queue for an engine that is there, never for one that may come
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    _connect(socket, endpoint)
    return socket


def _bind(socket: zmq.Socket[Any], endpoint: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise BroadcastError(f"cannot bind {endpoint}: {error.strerror}") from error


def _connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise BroadcastError(f"cannot connect to {endpoint}: {error.strerror}") from error
