"""Real sockets: what is published arrives, and nobody who does not read slows the publisher."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from metrics.broadcast import (
    HEARTBEAT_HWM,
    MAX_IPC_PATH_BYTES,
    SUBSCRIBER_HWM,
    TOPIC_ITERATIONS,
    TOPIC_TALLY,
    BroadcastError,
    Publisher,
    bind_heartbeats,
    connect_heartbeats,
    heartbeat_endpoint,
    make_subscriber,
    snapshot_endpoint,
)
from tests.contexts import OwningContext

PATIENCE_S = 20.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.001)


def receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    assert socket.poll(int(PATIENCE_S * 1000)), "nothing came"
    return socket.recv_multipart(flags=zmq.NOBLOCK)


@pytest.fixture
def context() -> Iterator[OwningContext]:
    context = OwningContext()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def directory() -> Iterator[str]:
    """Short: a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="wb-", dir="/tmp") as path:
        yield path


def test_a_subscriber_receives_the_topics_it_asked_for(context: OwningContext, directory: str) -> None:
    endpoint = snapshot_endpoint(directory, 0)
    publisher = Publisher(context, endpoint)
    subscriber = make_subscriber(context, [endpoint], [TOPIC_TALLY])
    wait_until(lambda: publisher.has_subscribers(TOPIC_TALLY), "the subscription")
    assert not publisher.has_subscribers(TOPIC_ITERATIONS)
    assert publisher.publish(TOPIC_ITERATIONS, b"not asked for")
    assert publisher.publish(TOPIC_TALLY, b"snapshot")
    assert receive(subscriber) == [TOPIC_TALLY, b"snapshot"]


def test_one_socket_hears_several_engines_also_those_that_start_later(context: OwningContext, directory: str) -> None:
    endpoints = [snapshot_endpoint(directory, engine) for engine in range(2)]
    subscriber = make_subscriber(context, endpoints, [TOPIC_TALLY])
    for engine, endpoint in enumerate(endpoints):
        publisher = Publisher(context, endpoint)
        wait_until(partial(publisher.has_subscribers, TOPIC_TALLY), "the subscription")
        publisher.publish(TOPIC_TALLY, b"%d" % engine)
        assert receive(subscriber) == [TOPIC_TALLY, b"%d" % engine]


def has_subscribers_again(publisher: Publisher, subscriber: zmq.Socket[bytes]) -> bool:
    # NOTE: a SUB socket repeats its subscriptions to a publisher that came back only while its owner reads it.
    return not subscriber.poll(1) and publisher.has_subscribers(TOPIC_TALLY)


def test_a_restarted_publisher_is_found_again_at_the_same_path(context: OwningContext, directory: str) -> None:
    endpoint = snapshot_endpoint(directory, 0)
    subscriber = make_subscriber(context, [endpoint], [TOPIC_TALLY])
    for life in (b"1", b"2"):
        publisher = Publisher(context, endpoint)
        wait_until(partial(has_subscribers_again, publisher, subscriber), "the subscription")
        publisher.publish(TOPIC_TALLY, life)
        assert receive(subscriber) == [TOPIC_TALLY, life]
        publisher.close()


def test_a_path_left_behind_by_a_killed_process_is_taken_over(context: OwningContext, directory: str) -> None:
    endpoint = snapshot_endpoint(directory, 0)
    Path(endpoint.removeprefix("ipc://")).touch()
    publisher = Publisher(context, endpoint)
    subscriber = make_subscriber(context, [endpoint], [TOPIC_TALLY])
    wait_until(lambda: publisher.has_subscribers(TOPIC_TALLY), "the subscription")
    subscriber.close(linger=0)


def test_has_subscribers_forgets_who_has_gone(context: OwningContext) -> None:
    publisher = Publisher(context, "inproc://gone")
    subscribers = [make_subscriber(context, ["inproc://gone"], [TOPIC_ITERATIONS]) for _ in range(2)]
    wait_until(lambda: publisher.has_subscribers(TOPIC_ITERATIONS), "the subscription")
    for subscriber in subscribers:
        subscriber.close(linger=0)
    wait_until(lambda: not publisher.has_subscribers(TOPIC_ITERATIONS), "the cancellation")


def test_a_subscription_to_everything_counts_for_every_topic(context: OwningContext) -> None:
    publisher = Publisher(context, "inproc://all")
    subscriber = make_subscriber(context, ["inproc://all"], [b""])
    wait_until(lambda: publisher.has_subscribers(TOPIC_ITERATIONS), "the subscription")
    assert publisher.publish(TOPIC_TALLY, b"whatever")
    assert receive(subscriber) == [TOPIC_TALLY, b"whatever"]


def test_subscribers_that_never_read_neither_stop_the_publisher_nor_starve_who_reads(
    context: OwningContext, directory: str
) -> None:
    """P8. A publisher that waited for them would hang here: they are sent many times what their queues hold."""
    endpoint = snapshot_endpoint(directory, 0)
    publisher = Publisher(context, endpoint)
    # Subscriptions are sent in alphabetical order: whoever is seen to have the later topic has the other.
    deaf = [make_subscriber(context, [endpoint], [TOPIC_TALLY, b"z-deaf"]) for _ in range(8)]
    reader = make_subscriber(context, [endpoint], [TOPIC_TALLY, b"z-reader"])
    wait_until(lambda: all(publisher.has_subscribers(t) for t in (b"z-deaf", b"z-reader")), "the subscriptions")
    payload = bytes(10_000)
    num_heard = 0
    for number in range(20 * SUBSCRIBER_HWM):
        assert publisher.publish(TOPIC_TALLY, payload)
        if number % 16 == 0:  # the reader keeps up; what it lost while its queue was full, the next makes up for
            wait_until(lambda: publisher.publish(TOPIC_TALLY, payload) and bool(reader.poll(1)), "a message")
        while reader.poll(0):
            receive(reader)
            num_heard += 1
    assert num_heard > 2 * SUBSCRIBER_HWM
    assert all(subscriber.get(zmq.RCVHWM) == SUBSCRIBER_HWM for subscriber in deaf)


def test_publishing_into_a_closed_socket_is_a_drop_not_an_error(context: OwningContext) -> None:
    publisher = Publisher(context, "inproc://closed")
    publisher.close()
    assert not publisher.publish(TOPIC_TALLY, b"late")
    assert not publisher.has_subscribers(TOPIC_TALLY)


def test_heartbeats_arrive_in_order(context: OwningContext, directory: str) -> None:
    endpoint = heartbeat_endpoint(directory, 0)
    beacon = bind_heartbeats(context, endpoint)
    sender = connect_heartbeats(context, endpoint)
    assert sender.poll(int(PATIENCE_S * 1000), zmq.POLLOUT)
    for number in range(3):
        sender.send(b"%d" % number, flags=zmq.NOBLOCK)
    assert [receive(beacon) for _ in range(3)] == [[b"0"], [b"1"], [b"2"]]


def test_no_heartbeat_is_kept_for_an_engine_that_is_away(context: OwningContext, directory: str) -> None:
    endpoint = heartbeat_endpoint(directory, 0)
    sender = connect_heartbeats(context, endpoint)
    with pytest.raises(zmq.Again):
        sender.send(b"to nobody", flags=zmq.NOBLOCK)
    beacon = bind_heartbeats(context, endpoint)
    assert sender.poll(int(PATIENCE_S * 1000), zmq.POLLOUT)
    sender.send(b"first", flags=zmq.NOBLOCK)
    assert receive(beacon) == [b"first"]


def test_the_queue_to_a_beacon_that_does_not_read_is_bounded(context: OwningContext) -> None:
    beacon = bind_heartbeats(context, "inproc://frozen")
    sender = connect_heartbeats(context, "inproc://frozen")
    num_queued = 0
    while sender.poll(0, zmq.POLLOUT):
        sender.send(b"beat", flags=zmq.NOBLOCK)
        num_queued += 1
    assert num_queued <= HEARTBEAT_HWM + int(beacon.get(zmq.RCVHWM))


async def test_an_asyncio_context_gives_sockets_to_await(directory: str) -> None:
    context = zmq.asyncio.Context()
    try:
        publisher = Publisher(context, snapshot_endpoint(directory, 0))
        subscriber = make_subscriber(context, [snapshot_endpoint(directory, 0)], [TOPIC_TALLY])
        wait_until(lambda: publisher.has_subscribers(TOPIC_TALLY), "the subscription")
        assert publisher.publish(TOPIC_TALLY, b"snapshot") is True
        assert await subscriber.recv_multipart() == [TOPIC_TALLY, b"snapshot"]
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("endpoint", [lambda d: snapshot_endpoint(d, 0), lambda d: heartbeat_endpoint(d, 0)])
def test_a_path_too_long_for_a_socket_is_refused_by_name_and_length(endpoint: Callable[[str], str]) -> None:
    fits = "/" + "d" * (MAX_IPC_PATH_BYTES - len(endpoint("").removeprefix("ipc://")) - 1)
    assert len(endpoint(fits).removeprefix("ipc://")) == MAX_IPC_PATH_BYTES
    with pytest.raises(BroadcastError, match="108 bytes is longer than 107: /ddd"):
        endpoint(fits + "d")


def test_the_longest_path_that_is_allowed_can_be_bound(context: OwningContext, directory: str) -> None:
    padding = MAX_IPC_PATH_BYTES - len(snapshot_endpoint(directory, 0).removeprefix("ipc://")) - 1
    longest = Path(directory) / ("d" * padding)
    longest.mkdir()
    Publisher(context, snapshot_endpoint(str(longest), 0)).close()


def test_an_endpoint_that_cannot_be_bound_is_named(context: OwningContext, directory: str) -> None:
    missing = snapshot_endpoint(f"{directory}/missing", 0)
    with pytest.raises(BroadcastError, match=r"cannot bind .*missing"):
        Publisher(context, missing)
    with pytest.raises(BroadcastError, match=r"cannot bind .*missing"):
        bind_heartbeats(context, missing)
    with pytest.raises(BroadcastError, match="cannot connect"):
        make_subscriber(context, ["nonsense"], [TOPIC_TALLY])
