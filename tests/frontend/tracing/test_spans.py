"""What is told of a request when it is over: its times on one clock, its numbers, no word; and how it is sent."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.config import StatsConfig
from engine.wire import Finish, Output, SamplingParams, Start
from frontend.counters.request_record import RequestRecord
from frontend.engines.generation import Asked, Generation
from frontend.errors import EngineLost, TooManyRequests
from frontend.tracing.otlp import DURATIONS, FLUSH_S, Telemetry, signal_url
from frontend.tracing.spans import RequestTrace, Stage, Trace
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.fakes import fake_asked, fake_group
from tests.frontend.deployments import make_config, until
from tests.otlp import Receiver, plain, receiving

LAYOUT = build_layout(API_SERVER, Shape(num_engines=1, num_api_servers=1, max_model_len=2048))
SECRET = 987_654_321  # a token id, as good as a word
SAMPLING = SamplingParams(max_tokens=8, temperature=0.5, top_p=0.9, seed=7)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Clock:
    """This process's."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Where the generations run."""

    def abort(self, request_ids: Sequence[int], reason: str) -> None:
        pass

    def forget(self, request_id: int) -> None:
        pass


class Bench:
    """An engine whose clock is `offset_s` ahead of this process's, and the traces that come of it."""

    def __init__(self, offset_s: float = 5000.0) -> None:
        self.clock = Clock()
        self.engine = Engine()
        self.offset_s = offset_s
        self.traces: list[Trace] = []
        self.faults: list[str] = []
        self.bulkhead = Bulkhead(self.faults.append, logging.getLogger(__name__))
        self.sink: Callable[[Trace], None] = self.traces.append

    def observer(self, asked: Asked) -> RequestTrace:
        return RequestTrace(asked, self.sink, self.bulkhead, self.clock)

    def asked(self, n: int = 1) -> Asked:
        return fake_asked(num_prompt_tokens=2, sampling=SAMPLING, n=n, arrived_at=self.clock.now)

    def submit(self, n: int = 1) -> Generation:
        asked = self.asked(n)
        record = RequestRecord(Tally(LAYOUT), LAYOUT, 1).engines[0]
        group = fake_group(lambda: None)
        return Generation(self.engine, record, group, self.clock, asked, range(n), self.observer(asked))

    async def arrive(
        self,
        generation: Generation,
        made_at: float,
        *,
        delay_s: float = 0.001,
        tokens: int = 1,
        sequence: int = 0,
        start: Start | None = None,
        reason: str | None = None,
    ) -> None:
        """Tokens made at an instant of this process's clock, seen `delay_s` later."""
        state = generation.sequences[sequence]
        finish = None if reason is None else Finish(reason, None, "a secret" if reason == "error" else None)
        output = Output(sequence, state.num_tokens, [SECRET] * tokens, None, finish, start)
        self.clock.now = made_at + delay_s
        generation.on_output(state, output, made_at + self.offset_s)
        assert generation.take()

    def start(self, arrived_at: float, scheduled_at: float, cached: int = 0, preemptions: int = 0) -> Start:
        return Start(arrived_at + self.offset_s, scheduled_at + self.offset_s, cached, preemptions)


async def whole(bench: Bench, delays: Sequence[float] = (0.001, 0.001)) -> Trace:
    """A request that arrives at 100, waits 1 s, is prefilled for 2 s, and decodes 3 tokens for 4 s."""
    generation = bench.submit()
    start = bench.start(100.0, 101.0, cached=1)
    await bench.arrive(generation, 103.0, delay_s=delays[0], start=start)
    await bench.arrive(generation, 107.0, delay_s=delays[1], tokens=2, reason="length")
    generation.delivered(3)
    generation.finish()
    generation.close()
    (trace,) = bench.traces
    return trace


async def test_the_engines_stages_are_told_on_this_processs_clock():
    trace = await whole(Bench())
    assert (trace.begin, trace.end) == pytest.approx((100.0, 107.001))
    assert [stage.name for stage in trace.stages] == ["queue", "prefill", "decode"]
    edges = [trace.stages[0].begin, *(stage.end for stage in trace.stages)]
    assert edges == pytest.approx([100.001, 101.001, 103.001, 107.001])


async def test_the_least_delay_of_all_messages_maps_the_engines_clock():
    trace = await whole(Bench(), delays=(0.5, 0.01))
    edges = [trace.stages[0].begin, *(stage.end for stage in trace.stages)]
    assert edges == pytest.approx([100.01, 101.01, 103.01, 107.01])


delays = st.floats(0, 10)


@given(offset_s=st.floats(-1e6, 1e6), first=delays, second=delays)
def test_stages_follow_one_another_inside_the_request_whatever_the_clocks(offset_s, first, second):
    trace = asyncio.run(whole(Bench(offset_s), delays=(first, max(0.0, second - 4))))
    edges = [trace.begin, trace.stages[0].begin, *(stage.end for stage in trace.stages), trace.end]
    assert edges == sorted(edges)
    assert [stage.begin for stage in trace.stages[1:]] == [stage.end for stage in trace.stages[:-1]]


async def test_a_trace_has_the_numbers_of_its_request():
    trace = await whole(Bench())
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.n": 1,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.prompt_tokens": 2,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.latency.e2e": pytest.approx(7.001),
        "gen_ai.latency.time_to_first_token": pytest.approx(3.001),
        "gen_ai.latency.time_in_queue": pytest.approx(1.0),
        "gen_ai.latency.time_in_model_prefill": pytest.approx(2.0),
        "gen_ai.latency.time_in_model_decode": pytest.approx(4.0),
        "gen_ai.latency.time_in_model_inference": pytest.approx(6.0),
    }
    assert {name: trace.attributes.get(name) for name in wanted} == wanted
    assert "gen_ai.request.top_k" not in trace.attributes, "what was not asked for is not told"
    assert (trace.error_type, trace.has_failed) == (None, False)
    assert trace.time_to_first_token_s == pytest.approx(3.001)
    assert trace.time_per_output_token_s == pytest.approx(2.0)


async def test_no_trace_has_a_word_of_the_prompt_or_of_the_answer():
    bench = Bench()
    await whole(bench)
    generation = bench.submit()
    await bench.arrive(generation, 110.0, start=bench.start(108.0, 109.0), reason="error")
    generation.close()
    for trace in bench.traces:
        assert str(SECRET) not in repr(trace)
        assert "secret" not in repr(trace)


async def test_of_n_sequences_the_first_and_the_last_bound_the_stages():
    bench = Bench()
    generation = bench.submit(n=2)
    await bench.arrive(generation, 103.0, sequence=1, start=bench.start(100.0, 102.0, preemptions=1))
    await bench.arrive(generation, 104.0, sequence=0, start=bench.start(100.0, 101.0, preemptions=2), reason="stop")
    await bench.arrive(generation, 106.0, sequence=1, reason="length")
    generation.finish()
    generation.close()
    (trace,) = bench.traces
    edges = [trace.stages[0].begin, *(stage.end for stage in trace.stages)]
    assert edges == pytest.approx([100.001, 101.001, 103.001, 106.001])
    assert trace.attributes["gen_ai.response.finish_reasons"] == ["stop", "length"]
    assert trace.attributes["gen_ai.request.choice.count"] == 2
    assert trace.attributes["wholebatch.num_preemptions"] == 3


async def test_a_request_ended_at_a_stop_string_is_whole():
    bench = Bench()
    generation = bench.submit()
    await bench.arrive(generation, 103.0, tokens=3, start=bench.start(100.0, 101.0))
    generation.stop(0)
    generation.delivered(2)
    generation.undelivered(1, "stop")
    generation.finish()
    generation.close()
    (trace,) = bench.traces
    assert (trace.error_type, len(trace.stages)) == (None, 3)
    assert trace.attributes["gen_ai.usage.output_tokens"] == 2, "what was cut off was not used"


async def test_a_client_that_goes_is_an_abort_and_no_failure():
    bench = Bench()
    generation = bench.submit()
    await bench.arrive(generation, 103.0, start=bench.start(100.0, 101.0))
    generation.close()
    (trace,) = bench.traces
    assert (trace.error_type, trace.has_failed) == ("abort", False)
    assert trace.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert (trace.time_to_first_token_s, trace.time_per_output_token_s) == (None, None)


async def test_a_request_that_never_had_a_token_has_no_stages():
    bench = Bench()
    generation = bench.submit()
    bench.clock.now = 104.0
    generation.close()
    (trace,) = bench.traces
    assert (trace.stages, trace.end) == ((), 104.0)
    assert "gen_ai.latency.time_to_first_token" not in trace.attributes


async def test_a_lost_engine_is_a_failure_that_names_it():
    bench = Bench()
    generation = bench.submit()
    generation.fail(EngineLost("the engine ended", code="engine_lost"))
    generation.close()
    (trace,) = bench.traces
    assert (trace.error_type, trace.has_failed) == ("engine_lost", True)


def test_a_request_that_is_refused_is_told():
    bench = Bench()
    bench.observer(bench.asked()).refused(TooManyRequests("full", code="queue_full"))
    (trace,) = bench.traces
    assert (trace.error_type, trace.stages) == ("queue_full", ())


async def test_a_request_is_told_once():
    bench = Bench()
    generation = bench.submit()
    generation.close()
    generation.close()
    assert len(bench.traces) == 1


async def test_a_fault_in_telling_costs_no_request():
    bench = Bench()

    def fail(trace: Trace) -> None:
        raise RuntimeError("no")

    bench.sink = fail
    bench.submit().close()
    assert bench.faults == ["tracing"]
    generation = bench.submit()
    generation._observer._clock = lambda: 1 / 0  # type: ignore[union-attr]
    await bench.arrive(generation, 103.0, start=bench.start(100.0, 101.0), reason="length")
    generation.delivered(1)
    generation.finish()
    generation.close()
    bench.faults.clear()
    bench.sink = fail
    bench.submit().close()
    bench.observer(bench.asked()).refused(TooManyRequests("full", code="queue_full"))
    assert bench.faults == ["tracing", "tracing"]


@pytest.mark.parametrize("module", ["frontend.server", "frontend.services", "frontend.tracing.spans"])
def test_without_an_endpoint_nothing_of_opentelemetry_is_imported(module):
    program = f"import {module}, sys; print([m for m in sys.modules if m.startswith(('opentelemetry', 'google'))])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- how it is sent ---


def telemetry(url: str, *, with_metrics: bool = True) -> Telemetry:
    return Telemetry(
        instance="api-server-0",
        address="127.0.0.1",
        port=8000,
        traces_endpoint=url,
        metrics_endpoint=url if with_metrics else None,
    )


async def sent(make: Sequence[Trace]) -> Receiver:
    with receiving() as receiver:
        sender = telemetry(receiver.url)
        for trace in make:
            sender.tell(trace)
        await sender.close()
        assert sender.take_faults() == 0
        return receiver


async def recent(traceparent: str = PARENT) -> Trace:
    """A whole request that ended 3 s ago, on the clock that spans are mapped from."""
    trace = await whole(Bench())
    shift = time.monotonic() - 3 - trace.end
    names = {"gen_ai.request.model": "a-model", "gen_ai.response.model": "a-model"}
    return replace(
        trace,
        context=replace(trace.context, operation="chat", trace_headers={"traceparent": traceparent}),
        attributes=trace.attributes | names,
        begin=trace.begin + shift,
        end=trace.end + shift,
        stages=tuple(Stage(s.name, s.begin + shift, s.end + shift) for s in trace.stages),
    )


async def test_a_request_is_one_span_with_its_stages_in_the_callers_trace():
    receiver = await sent([await recent()])
    (root,) = receiver.roots()
    assert root.name == "chat a-model"
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    children = receiver.children(root)
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    assert all(child.trace_id == root.trace_id for child in children)
    edges = [root.start_time_unix_nano, *(c.start_time_unix_nano for c in children), root.end_time_unix_nano]
    assert edges == sorted(edges)
    assert children[1].end_time_unix_nano - children[1].start_time_unix_nano == pytest.approx(2e9, abs=1e3)
    assert plain(root.attributes)["gen_ai.usage.output_tokens"] == 3
    assert receiver.resources()[0]["service.name"] == "wholebatch"


async def test_spans_are_on_the_wall_clock():
    trace = await recent()
    receiver = await sent([trace])
    (root,) = receiver.roots()
    ended_ago_s = time.monotonic() - trace.end
    assert root.end_time_unix_nano / 1e9 == pytest.approx(time.time() - ended_ago_s, abs=0.5)


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_traceparent_that_says_nothing_begins_a_trace(header):
    receiver = await sent([await recent(header)])
    assert receiver.roots()[0].parent_span_id == b""


async def test_a_caller_that_is_not_sampled_gets_no_spans():
    receiver = await sent([await recent(PARENT[:-2] + "00")])
    assert receiver.spans() == []


async def test_the_three_histograms_are_those_of_the_semantic_conventions():
    trace = await recent()
    aborted = replace(trace, error_type="abort", time_to_first_token_s=None, time_per_output_token_s=None)
    receiver = await sent([trace, trace, aborted])
    metrics = receiver.newest_metrics()
    assert set(metrics) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    ((duration,), (first,), (later,)) = metrics.values()
    points = {plain(p.attributes).get("error.type"): p for p in duration.histogram.data_points}
    assert {error: point.count for error, point in points.items()} == {None: 2, "abort": 1}
    assert tuple(points[None].explicit_bounds) == DURATIONS
    assert points[None].sum == pytest.approx(2 * 7.001, abs=1e-3)
    assert [p.count for p in first.histogram.data_points] == [2]
    assert [p.sum for p in later.histogram.data_points] == pytest.approx([4.0], abs=1e-3)
    assert plain(points[None].attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "wholebatch",
        "gen_ai.request.model": "a-model",
        "gen_ai.response.model": "a-model",
        "server.address": "127.0.0.1",
        "server.port": 8000,
    }
    assert duration.unit == "s"


async def test_histograms_alone_need_no_spans():
    with receiving() as receiver:
        sender = Telemetry(
            instance="i", address="127.0.0.1", port=1, traces_endpoint=None, metrics_endpoint=receiver.url
        )
        sender.tell(await recent())
        await sender.close()
    assert receiver.spans() == []
    assert len(receiver.newest_metrics()) == 3


async def test_an_endpoint_that_is_down_slows_nothing_and_is_said_once(caplog):
    trace = await recent()
    before = set(threading.enumerate())
    sender = telemetry("http://127.0.0.1:9", with_metrics=False)
    began_at = time.monotonic()
    for _ in range(3000):  # more than the queue holds
        sender.tell(trace)
    assert time.monotonic() - began_at < 10, "one retry waits a second"
    began_at = time.monotonic()
    await sender.close()
    assert time.monotonic() - began_at < FLUSH_S + 3
    said = [record.message for record in caplog.records if record.name.startswith("opentelemetry")]
    assert said
    assert len(said) == len({text[:20] for text in said}), said
    await until(lambda: set(threading.enumerate()) <= before)


async def test_a_receiver_that_refuses_is_counted():
    with receiving() as receiver:
        receiver.status = 400
        sender = telemetry(receiver.url)
        sender.tell(await recent())
        await sender.close()
        assert sender.take_faults() == 2, "one export of spans, one of metrics"
        assert sender.take_faults() == 0


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
        ("https://h/otlp/v1/traces?key=1", "https://h/otlp/v1/traces?key=1"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_signals(given, used):
    assert signal_url(given, "traces") == used


@pytest.mark.parametrize("endpoints", [{"otlp_traces_endpoint": "http://h"}, {"otlp_metrics_endpoint": "http://h"}, {}])
def test_tracing_is_on_where_an_endpoint_is_given(endpoints):
    assert StatsConfig(**endpoints).is_traced == bool(endpoints)


def test_an_api_server_without_the_packages_says_so_in_one_line():
    program = (
        "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http'] = None; "
        "from frontend.server import main; sys.exit(main(['--config-fd', '0']))"
    )
    told = wire.encode(make_config("/run/x", otlp_traces_endpoint="http://127.0.0.1:4318"))
    done = subprocess.run([sys.executable, "-c", program], input=told, capture_output=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"wholebatch[otel]" in done.stderr
