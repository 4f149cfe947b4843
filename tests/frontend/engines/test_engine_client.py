"""An API server's requests on an engine: over a real socket, with a stand-in for the engine that does as it is told."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine import wire
from engine.wire import Abort, Goodbye, Hello, SamplingParams
from engine.wire.deployment import Deployment, ProcessEntry
from frontend.counters.request_record import RequestRecord
from frontend.engines import engine_client
from frontend.engines.engine_client import EngineClients, Identity
from frontend.engines.generation import Ask, Asked, Delta, Generation
from frontend.errors import ApiError, EngineLost, EngineUnavailable, TooManyRequests
from metrics.catalogue import API_SERVER, ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.contexts import OwningContext
from tests.fakes import fake_asked, fake_group, no_admission
from tests.frontend.deployments import START, FakeEngine, deltas_of, finish, output, until

LAYOUT = build_layout(API_SERVER, Shape(num_engines=1, num_api_servers=1, max_model_len=2048))
SAMPLING = SamplingParams(max_tokens=8)


class Watcher:
    """Observes one request, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def refused(self, error: ApiError) -> None:
        self.told.append(f"refused {error.code}")

    def arrived(self, at: float) -> None:
        self.told.append(f"arrived {at}")

    def finished(self) -> None:
        self.told.append("finished")

    def closed(self, generation: Generation) -> None:
        self.told.append(f"closed {generation.num_delivered}")


class Bench:
    """One API server's engine clients, without the rest of the server."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.context = OwningContext()
        self.tally = Tally(LAYOUT)
        self.num_commits = 0
        self.committed = list(self.tally.cells)
        self.record = RequestRecord(self.tally, LAYOUT, 1)
        self.group = fake_group(self._commit)
        self.observers: list[Watcher] = []
        self.clients = EngineClients(
            self.context,
            directory,
            Identity(index=0, incarnation=1),
            self.record,
            self.group,
            no_admission(),
            observe=self._observe,
        )
        self._version = 0

    def _observe(self, asked: Asked) -> Watcher:
        self.observers.append(Watcher())
        return self.observers[-1]

    def _commit(self) -> None:
        self.num_commits += 1
        self.record.flush()
        self.committed = list(self.tally.cells)

    def table(self, incarnation: int, state: str) -> None:
        self._version += 1
        entry = ProcessEntry(role=ENGINE, index=0, incarnation=incarnation, pid=1, state=state)
        self.clients.on_deployment(Deployment(version=self._version, facts=None, processes=(entry,)))

    @asynccontextmanager
    async def engine(self, incarnation: int = 1) -> AsyncIterator[FakeEngine]:
        """A ready engine that has had its Hello."""
        engine = FakeEngine(self.directory, incarnation)
        try:
            self.table(incarnation, "ready")
            hello = await engine.receive()
            assert isinstance(hello, Hello)
            assert (hello.api_server, hello.incarnation, hello.engine_incarnation) == (0, 1, incarnation)
            yield engine
        finally:
            engine.close()

    async def submit(self, n: int = 1, sampling: SamplingParams = SAMPLING) -> Generation:
        (generation,) = self.clients.submit([Ask([1, 2, 3], fake_asked(num_prompt_tokens=3, sampling=sampling, n=n))])
        return generation

    def count(self, name: str, **labels: str) -> float:
        return self.tally.cells[LAYOUT.cell(name, engine="0", **labels)]

    def tokens(self) -> dict[str, float]:
        """Where the received tokens went; what is not there is held."""
        self.record.flush()
        reasons = ("disconnect", "stop", "error", "server_lost")
        undelivered = {r: self.count("wholebatch:undelivered_tokens_total", reason=r) for r in reasons}
        counts = {name: self.count(f"wholebatch:{name}_tokens_total") for name in ("received", "delivered")}
        return {name: value for name, value in (counts | undelivered).items() if value}

    def ended(self, reason: str) -> float:
        return self.count("wholebatch:sequences_ended_total", finished_reason=reason)

    def success(self, reason: str) -> float:
        return self.count("vllm:request_success_total", finished_reason=reason)

    def whole_requests(self, reason: str) -> float:
        return self.count("wholebatch:request_ended_total", finished_reason=reason)

    def observed(self, name: str) -> tuple[float, float]:
        """(count, sum)"""
        histogram = LAYOUT.histogram(f"vllm:{name}", engine="0")
        cells = self.tally.cells[histogram.offset : histogram.offset + len(histogram.bounds) + 2]
        return sum(cells[:-1]), cells[-1]

    def in_flight(self) -> float:
        return self.count("wholebatch:api_server_requests_in_flight")


@pytest.fixture
def directory() -> Iterator[str]:
    """A short path: those of ipc sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="wb") as path:
        yield str(Path(path))


@pytest.fixture
async def bench(directory: str) -> AsyncIterator[Bench]:
    bench = Bench(directory)
    try:
        yield bench
    finally:
        bench.clients.close()
        bench.context.destroy(linger=0)


async def read(generation: Generation) -> list[Delta]:
    """All of them."""
    found: list[Delta] = []
    while deltas := await deltas_of(generation):
        found += deltas
    return found


async def test_without_a_ready_engine_a_request_is_refused_and_not_counted(bench: Bench):
    with pytest.raises(EngineUnavailable):
        await bench.submit()
    assert bench.count("wholebatch:sequences_submitted_total") == 0


async def test_a_request_that_the_engine_cannot_be_sent_is_refused_and_counted_as_that_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_client, "SEND_HWM", 1)
    bench.table(1, "ready")  # there is nobody to read: Hello takes the only place
    with pytest.raises(TooManyRequests) as caught:
        await bench.submit()
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "queue_full", {"Retry-After": "1"})
    cell = LAYOUT.cell("vllm:admission_rejections_total", reason="max_num_queued_reqs")
    assert bench.tally.cells[cell] == 1
    assert bench.count("wholebatch:sequences_submitted_total") == bench.in_flight() == 0


async def test_the_prompts_of_a_request_are_counted_together_and_spread_as_they_are_many(bench: Bench):
    async with bench.engine() as engine:
        num_commits = bench.num_commits
        asks = [Ask([token], fake_asked(sampling=SAMPLING, n=2)) for token in (1, 2, 3)]
        generations = bench.clients.submit(asks)
        assert bench.num_commits == num_commits + 1
        assert bench.committed[LAYOUT.cell("wholebatch:sequences_submitted_total", engine="0")] == 6
        submits = await engine.receive_submits(6)
        assert [submit.prompt_token_ids for submit in submits] == [[1], [1], [2], [2], [3], [3]]
        assert len({submit.request_id for submit in submits}) == 6
        for generation in generations:
            generation.close()


async def test_after_its_end_it_says_hello_to_nobody(bench: Bench):
    async with bench.engine():
        bench.clients.close()
        bench.table(1, "ready")
        assert not bench.clients.has_ready_engine
        assert bench.clients._connections == [None]


async def test_prompts_are_in_prefill_until_the_first_token_or_the_end_of_their_sequence(bench: Bench):
    def prefilling() -> float:
        return bench.count("wholebatch:api_server_prefill_tokens")

    async with bench.engine() as engine:
        generation, other = await bench.submit(n=2), await bench.submit()
        submits = await engine.receive_submits(3)
        assert prefilling() == 9
        await engine.send(output(submits[0], 0, [7]))
        await until(lambda: prefilling() == 6)
        await engine.send(output(submits[0], 1, [8], finish()), output(submits[1], 0, [8], finish()))
        await until(lambda: prefilling() == 3)
        other.close()
        assert prefilling() == 0
        generation.close()
        assert prefilling() == 0


async def test_a_request_is_counted_committed_and_sent_to_the_incarnation_that_is_ready(bench: Bench):
    async with bench.engine(incarnation=3) as engine:
        generation = await bench.submit()
        assert bench.committed[LAYOUT.cell("wholebatch:sequences_submitted_total", engine="0")] == 1
        (submit,) = await engine.receive_submits(1)
        assert (submit.engine_incarnation, submit.prompt_token_ids, submit.sampling) == (3, [1, 2, 3], SAMPLING)
        assert bench.in_flight() == 1
        generation.close()


async def test_a_whole_answer_is_received_counted_and_observed_once(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [7]), at=2.0)
        await engine.send(output(submit, 1, [8]), at=2.5)
        await engine.send(output(submit, 2, [9], finish()), at=4.0)
        deltas = await read(generation)
        assert [token for delta in deltas for token in delta.token_ids] == [7, 8, 9]
        assert deltas[-1].finish == finish()
        generation.delivered(3)
        generation.finish()
        await bench.group.committed()
        generation.close()
        assert bench.tokens() == {"received": 3, "delivered": 3}
        assert (bench.ended("length"), bench.success("length"), bench.in_flight()) == (1, 1, 0)
        for name, (count, total) in {
            "inter_token_latency_seconds": (2, 2.0),
            "request_queue_time_seconds": (1, 0.5),
            "request_prefill_time_seconds": (1, 0.5),
            "request_decode_time_seconds": (1, 2.0),
            "request_inference_time_seconds": (1, 2.5),
            "request_time_per_output_token_seconds": (1, 1.0),
            "request_prefill_kv_computed_tokens": (1, 2),
        }.items():
            assert bench.observed(name) == (count, total), name


async def test_what_arrives_is_committed_as_received_before_a_request_sees_it(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [7]))
        await deltas_of(generation)
        assert bench.committed[LAYOUT.cell("wholebatch:received_tokens_total", engine="0")] == 1
        generation.close()


async def test_sequences_of_one_request_are_told_apart_and_each_counts_as_in_vllm(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit(n=3, sampling=SamplingParams(max_tokens=8, seed=2**63 - 2))
        submits = await engine.receive_submits(3)
        assert [s.sampling.seed for s in submits] == [2**63 - 2, 2**63 - 1, -(2**63)]
        await engine.send(*(output(s, 0, [i], finish("stop")) for i, s in enumerate(submits)))
        assert sorted((d.index, d.token_ids) for d in await read(generation)) == [(0, [0]), (1, [1]), (2, [2])]
        generation.delivered(3)
        generation.finish()
        generation.close()
        assert (bench.ended("stop"), bench.success("stop"), bench.whole_requests("stop")) == (3, 3, 1)
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert bench.observed(name)[0] == 3, name
        assert bench.observed("request_prompt_tokens") == (3, 9)
        assert bench.observed("request_generation_tokens") == (3, 3)
        assert bench.observed("request_params_n") == (1, 3)
        assert bench.tokens() == {"received": 3, "delivered": 3}


async def test_a_client_that_goes_aborts_its_sequences_at_once_and_its_tokens_are_settled(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit(n=2)
        submits = await engine.receive_submits(2)
        await engine.send(output(submits[0], 0, [7]))
        await deltas_of(generation)
        generation.close()
        generation.close()
        assert await engine.receive() == Abort([s.request_id for s in submits])
        assert (bench.ended("abort"), bench.success("abort"), bench.in_flight()) == (2, 2, 0)
        assert bench.whole_requests("abort") == 1
        assert bench.tokens() == {"received": 1, "disconnect": 1}
        await engine.send(output(submits[1], 0, [8]))
        await until(lambda: bench.tokens() == {"received": 2, "disconnect": 2})


async def test_a_sequence_that_ended_before_its_client_went_counts_by_its_own_reason(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit(n=3)
        submits = await engine.receive_submits(3)
        await engine.send(output(submits[0], 0, [7], finish("stop")), output(submits[1], 0, [8]))
        await deltas_of(generation)
        generation.close()
        assert (bench.success("stop"), bench.success("abort")) == (1, 2)
        assert (bench.ended("stop"), bench.ended("abort")) == (1, 2)
        assert bench.observed("request_generation_tokens") == (1, 1)
        assert (bench.whole_requests("abort"), bench.whole_requests("stop")) == (1, 0), "nobody has its answer"
        assert bench.tokens() == {"received": 2, "disconnect": 2}


async def test_tokens_past_a_stop_string_are_settled_as_such_and_the_request_counts_as_stopped(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [1, 2, 3]))
        await deltas_of(generation)
        await engine.send(output(submit, 3, [4]))
        await until(lambda: bench.tokens()["received"] == 4)
        generation.stop(0)
        generation.delivered(2)
        generation.undelivered(1, "stop")
        assert await engine.receive() == Abort([submit.request_id])
        await engine.send(output(submit, 4, [5]))
        assert await read(generation) == []
        generation.finish()
        generation.close()
        await until(lambda: bench.tokens() == {"received": 5, "delivered": 2, "stop": 3})
        assert (bench.ended("stop"), bench.success("stop")) == (1, 1)


async def test_a_request_that_ends_at_a_stop_string_is_observed_like_any_other(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [1]), at=2.0)
        await engine.send(output(submit, 1, [2], start=START._replace(num_preemptions=2)), at=5.0)
        await until(lambda: bench.tokens().get("received") == 2)
        await deltas_of(generation)
        generation.stop(0)
        generation.delivered(2)
        generation.finish()
        generation.close()
        assert bench.success("stop") == 1
        for name, total in {
            "request_queue_time_seconds": 0.5,
            "request_prefill_time_seconds": 0.5,
            "request_decode_time_seconds": 3.0,
            "request_inference_time_seconds": 3.5,
            "request_prefill_kv_computed_tokens": 2,
            "request_num_preemptions": 2,
        }.items():
            assert bench.observed(name) == (1, total), name


async def test_a_hole_in_the_answer_ends_it_with_an_error_after_what_came_before(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [7]), output(submit, 2, [9]))
        assert [d.token_ids for d in await deltas_of(generation)] == [[7]]
        generation.delivered(1)
        with pytest.raises(EngineLost):
            await deltas_of(generation)
        generation.close()
        assert await engine.receive() == Abort([submit.request_id])
        assert bench.tokens() == {"received": 2, "delivered": 1, "error": 1}
        assert (bench.ended("error"), bench.success("error")) == (1, 1)


async def test_an_engine_that_ends_fails_its_requests_once_what_it_sent_is_delivered(bench: Bench):
    async with bench.engine() as engine:
        whole, half = await bench.submit(), await bench.submit()
        first, second = await engine.receive_submits(2)
        await engine.send(output(first, 0, [1, 2], finish()), output(second, 0, [3]))
        await until(lambda: bench.tokens().get("received") == 3)
    bench.table(1, "ended")
    assert [d.token_ids for d in await read(whole)] == [[1, 2]]
    assert [d.token_ids for d in await deltas_of(half)] == [[3]]
    with pytest.raises(EngineLost):
        await deltas_of(half)
    whole.delivered(2)
    whole.finish()
    whole.close()
    half.close()
    assert bench.tokens() == {"received": 3, "delivered": 2, "error": 1}
    assert (bench.ended("length"), bench.ended("error"), bench.success("error"), bench.in_flight()) == (1, 1, 1, 0)
    with pytest.raises(EngineUnavailable):
        await bench.submit()


async def test_what_an_ended_engine_had_sent_and_nobody_has_read_yet_is_delivered(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [1, 2], finish()))
        connection = bench.clients._connections[0]
        assert connection is not None
        assert connection._reader._socket.poll(10_000)  # it is here, and the event loop has had no turn to read it
        bench.table(1, "ended")
        assert [d.token_ids for d in await read(generation)] == [[1, 2]]
        generation.close()


async def test_a_restarted_engine_is_told_how_many_tokens_were_ever_received(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [1, 2, 3, 4, 5], finish()))
        await read(generation)
        generation.close()
    bench.table(2, "starting")
    assert not bench.clients.has_ready_engine
    engine = FakeEngine(bench.directory, 2)
    bench.table(2, "ready")
    assert await engine.receive() == Hello(0, 1, 2, 5)
    assert bench.clients.has_ready_engine
    engine.close()


async def test_a_goodbye_fails_what_is_open_and_is_answered_by_a_new_hello(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        await engine.receive_submits(1)
        await engine.send_raw(wire.encode(Goodbye(1, "who are you?")))
        with pytest.raises(EngineLost):
            await read(generation)
        generation.close()
        async with asyncio.timeout(10):
            while not bench.clients.has_ready_engine:
                await asyncio.sleep(0.02)
                bench.table(1, "ready")
        hello = await engine.receive()
        while isinstance(hello, Abort):
            hello = await engine.receive()
        assert hello == Hello(0, 1, 1, 0)


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"nonsense", wire.encode(Abort([1]))])
async def test_bytes_that_are_no_message_are_counted_and_dropped(bench: Bench, raw: bytes):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send_raw(raw)
        await engine.send(output(submit, 0, [7], finish()))
        assert [d.token_ids for d in await read(generation)] == [[7]]
        generation.close()
        assert bench.tally.cells[LAYOUT.cell("wholebatch:wire_rejected_total", kind="from_engine")] == 1


async def test_an_observer_is_told_of_a_requests_tokens_and_end_each_once(bench: Bench):
    async with bench.engine() as engine:
        generation = await bench.submit()
        (submit,) = await engine.receive_submits(1)
        await engine.send(output(submit, 0, [7]), at=2.0)
        await engine.send(output(submit, 1, [8], finish()), at=2.5)
        await read(generation)
        generation.delivered(2)
        generation.finish()
        generation.finish()
        generation.close()
        generation.close()
    (observer,) = bench.observers
    assert observer.told == ["arrived 2.0", "arrived 2.5", "finished", "closed 2"]


async def test_an_observer_of_a_request_that_no_engine_takes_is_told_so(bench: Bench):
    with pytest.raises(EngineUnavailable):
        await bench.submit()
    (observer,) = bench.observers
    assert observer.told == ["refused engine_unavailable"]
