"""The pure parts of the benchmarks: what they make of answers, and what they call too slow."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.benchmarks import arrivals
from tests.benchmarks.bench_check import BENCHMARKS, Benchmark, Bound, find, judge
from tests.benchmarks.offline import workload
from tests.benchmarks.roofline import Machine, Work, limit_tokens_per_s
from tests.benchmarks.serving import add_ratios, num_requests, quantile_ms
from tests.benchmarks.sse_client import (
    Answer,
    Arrival,
    Load,
    LoadError,
    Stream,
    make_answer,
    random_prompts,
    stream_all,
    stream_arrivals,
)
from tests.benchmarks.tiny_stack import count

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream_of(num_tokens: int) -> bytes:
    """A whole answer: an event for each token, the usage, the end."""
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens}}
    events = [{"choices": [{"text": f"a {n}"}], "usage": None} for n in range(num_tokens)] + [usage]
    parts = [chunk(b"data: %s\n\n" % json.dumps(event).encode()) for event in events]
    return HEAD + b"".join(parts) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class PiecemealTransport:
    """Answers a request with these bytes, cut at these places."""

    def __init__(self, stream: Stream, whole: bytes, cuts: Sequence[int]) -> None:
        places = sorted({0, *cuts, len(whole)})
        self._pieces = [whole[start:end] for start, end in itertools.pairwise(places)]
        self._stream = stream

    def write(self, request: bytes) -> None:
        """One piece in each turn of the event loop."""
        if self._pieces:
            self._stream.data_received(self._pieces.pop(0))
            asyncio.get_running_loop().call_soon(self.write, request)


@given(st.lists(st.integers(0, len(stream_of(4)))))
@example([len(stream_of(4)) - 3])
def test_an_answer_is_taken_whole_however_its_bytes_arrive(cuts: list[int]) -> None:
    async def ask() -> Answer:
        stream = Stream()
        transport = cast(asyncio.WriteTransport, PiecemealTransport(stream, stream_of(4), cuts))
        return await asyncio.wait_for(stream.ask(transport, b""), 10)

    answer = asyncio.run(ask())
    assert (answer.num_tokens, answer.num_events) == (4, 4)


async def load_answered_with(whole: bytes) -> Load:
    """What the client makes of three requests, two at a time, of a server that answers each with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
                writer.write(whole)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        return await asyncio.wait_for(stream_all(f"http://{host}:{port}", "m", [[1]] * 3, 4, concurrency=2), 10)


def test_every_request_of_a_load_is_answered() -> None:
    load = asyncio.run(load_answered_with(stream_of(4)))
    assert [(answer.num_tokens, answer.num_events) for answer in load.answers] == [(4, 4)] * 3
    assert load.tokens_per_s == pytest.approx(12 / load.elapsed_s)


def test_a_load_with_other_tokens_than_were_asked_for_is_an_error() -> None:
    with pytest.raises(LoadError, match=r"\[3, 3, 3\] tokens instead of 4"):
        asyncio.run(load_answered_with(stream_of(3)))


def test_a_refusal_is_an_error_that_says_what_came() -> None:
    with pytest.raises(LoadError, match="503 Service"):
        asyncio.run(load_answered_with(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno"))


def test_an_answers_times_begin_with_its_text_not_with_its_head() -> None:
    whole = stream_of(4)
    first, second = whole.index(b"data: "), whole.index(b"data: [DONE]")
    answer = make_answer(1.0, [2.0, 5.0, 7.0], [whole[:first], whole[first:second], whole[second:]])
    assert (answer.first_s, answer.gaps_s) == (4.0, (2.0,))


def test_requests_that_arrive_are_sent_at_their_instants_whether_or_not_others_are_answered() -> None:
    sent: list[tuple[float, int]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = json.loads(await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0])))
        sent.append((asyncio.get_running_loop().time(), body["max_tokens"]))
        if len(sent) == 3:
            all_sent.set()
        await all_sent.wait()  # nobody is answered before all have asked
        writer.write(stream_of(body["max_tokens"]))
        await writer.drain()
        writer.close()

    async def load() -> Load:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            due = [Arrival(0.1 * number, [1], number + 2) for number in range(3)]
            return await asyncio.wait_for(stream_arrivals(f"http://{host}:{port}", "m", due), 10)

    all_sent = asyncio.Event()
    answers = asyncio.run(load()).answers
    assert [answer.num_tokens for answer in answers] == [2, 3, 4]
    assert [num_tokens for _, num_tokens in sent] == [2, 3, 4]
    assert sent[1][0] - sent[0][0] >= 0.05
    assert sent[2][0] - sent[1][0] >= 0.05
    assert answers[0].first_s >= 0.2 > answers[2].first_s - answers[0].first_s


def test_arrivals_are_the_same_requests_at_every_rate_only_closer_together() -> None:
    slow, fast = arrivals.poisson(1, 300, 7), arrivals.poisson(2, 150, 7)
    assert [(one.prompt, one.max_tokens) for one in slow] == [(one.prompt, one.max_tokens) for one in fast]
    assert [one.at_s for one in slow] == pytest.approx([2 * one.at_s for one in fast])
    assert 240 < len(slow) < 360
    assert len({one.max_tokens for one in slow}) > 50
    assert len(arrivals.poisson(0.001, 1, 7)) == 1


@pytest.mark.parametrize(
    ("first_s", "gaps_s", "is_good"),
    [
        (0.9, (0.1,) * 50, True),
        (1.1, (0.1,) * 50, False),
        (0.9, (0.2, *(0.1,) * 50), False),
        (0.9, (0.2, *(0.1,) * 150), True),
        (0.9, (), True),
    ],
)
def test_an_answer_is_in_time_by_its_first_token_and_nearly_all_of_its_others(
    first_s: float, gaps_s: tuple[float, ...], is_good: bool
) -> None:
    assert arrivals.is_good(Answer(first_s, gaps_s, 1, 1)) == is_good


@given(st.floats(0.2, 40))
def test_the_bisection_finds_the_highest_rate_that_holds(limit: float) -> None:
    found = arrivals.highest(lambda rate: rate <= limit, 0.1, 100, 12)
    assert found <= limit <= found * 1.01
    assert arrivals.highest(lambda rate: False, 0.1, 100, 5) == 0


@pytest.mark.parametrize("lost", [b"[DONE]", b'"completion_tokens"', b"\n\n"])
def test_a_stream_without_its_end_its_usage_or_any_event_is_an_error(lost: bytes) -> None:
    with pytest.raises(LoadError, match="no whole stream"):
        make_answer(0.0, [1.0], [stream_of(4).replace(lost, b"")])


def test_prompts_are_as_long_as_asked_and_begin_differently() -> None:
    prompts = random_prompts(20, (5, 9), seed=1)
    assert {len(prompt) for prompt in prompts} == {5, 6, 7, 8, 9}
    assert len({prompt[0] for prompt in prompts}) == 20


def test_the_offline_workload_in_full_is_the_published_one() -> None:
    asked = workload()
    assert (len(asked), sum(ask.max_tokens for ask in asked)) == (256, 133_966)


def test_a_scaled_workload_is_the_beginning_of_the_full_one() -> None:
    full, part = workload(3), workload(2, 0.5)
    assert [ask.prompt for ask in part] == [ask.prompt[: round(len(ask.prompt) / 2)] for ask in full[:2]]
    assert [ask.max_tokens for ask in part] == [round(ask.max_tokens / 2) for ask in full[:2]]


def test_one_request_is_limited_by_reading_the_weights_and_many_by_their_products() -> None:
    machine = Machine(flops=100.0, bytes_per_s=4.0)
    work = Work(layer_parameters=3, head_parameters=1)  # 16 bytes: 4 s to read; 0.08 s for the products of a token

    def limit(concurrency: int) -> float:
        return limit_tokens_per_s(machine, work, prompt_tokens=1, output_tokens=11, concurrency=concurrency)

    assert limit(1) == pytest.approx(11 / (11 * 4.0))
    assert limit(1000) == pytest.approx(1000 * 11 / (11 * 80.0))


def test_a_longer_prompt_costs_its_layers_but_no_logits() -> None:
    machine = Machine(flops=1.0, bytes_per_s=1e9)
    work = Work(layer_parameters=3, head_parameters=1)
    limit = limit_tokens_per_s(machine, work, prompt_tokens=10, output_tokens=1, concurrency=1)
    assert limit == pytest.approx(1 / (2 * 3 * 10 + 2 * 1))


def test_a_quantile_is_one_of_the_values_in_milliseconds() -> None:
    assert quantile_ms([0.003, 0.001, 0.002], 0.5) == 2.0
    assert quantile_ms([0.001], 0.99) == 1.0


@pytest.mark.parametrize(("concurrency", "count"), [(1, 8), (8, 32), (32, 64), (128, 128)])
def test_a_round_has_enough_requests_to_keep_the_batch_full(concurrency: int, count: int) -> None:
    assert num_requests(concurrency, 64) == count


def test_a_ratio_is_of_the_first_side_to_each_at_the_same_concurrency() -> None:
    rows = [{"concurrency": c, "x": x} for c, x in ((1, 6.0), (1, 3.0), (8, 1.0), (8, 4.0), (8, 0.0))]
    add_ratios(rows, "x")
    assert [row["x_ratio"] for row in rows] == [1.0, 2.0, 1.0, 0.25, 0.0]


def test_a_counters_series_are_added_up_and_no_other_name_with_them() -> None:
    text = 'x_count{engine="0"} 3.0\nx_count{engine="1"} 4.0\nx_count_created{engine="0"} 9.0\n# HELP x_count 7\n'
    assert count(text, "x_count") == 7.0


def test_a_bound_is_broken_only_when_two_measurements_break_it() -> None:
    bound = Bound("a / b", 3.0, 2.0, lambda results: results["a"] / results["b"])
    benchmark = Benchmark("any", (), (bound,))

    def judged(*measured: float) -> tuple[bool, float, int]:
        left = list(measured)
        [row] = judge(benchmark, lambda _: {"a": left.pop(0), "b": 1.0})
        return row["holds"], row["ratio"], len(measured) - len(left)

    assert judged(2.0, 9.0) == (True, 2.0, 1)
    assert judged(1.5, 2.5) == (True, 2.5, 2)
    assert judged(1.5, 1.0) == (False, 1.5, 2)


def test_a_bound_of_another_instruction_set_is_not_judged() -> None:
    bounds = tuple(Bound(name or "any", 2.0, 1.0, lambda results: 0.5, name) for name in (None, "avx2", "avx512"))
    rows = judge(Benchmark("b", (), bounds), lambda _: None, "avx2")
    assert [(row["what"], row["holds"]) for row in rows] == [("any", False), ("avx2", False)]


def test_every_recorded_bound_reads_the_document_of_its_benchmark() -> None:
    cost = {"median": 2.0, "p99": 3.0}
    steps = [
        {"quantization": q, "step": f"decode {n}", "tokens_per_s": 5.0} for q in ("none", "int8") for n in (1, 8, 32)
    ]
    documents = {
        "statistics_cost": {f"record + commit, batch {n}": cost for n in (1, 256)},
        "engine_loop": {str(n): cost for n in (1, 256, 1024)},
        "scrape": [{"api_servers": n, "engines": 1, "ms": 1.0, "multiprocess_ms": 9.0} for n in (1, 16, 64)],
        "log_stats": {"ratio": 1.0},
        "model_step": steps,
    }
    ratios = {bound.what: bound.ratio(documents[b.name]) for b in BENCHMARKS for bound in b.bounds}
    assert ratios["scrape, 16 API servers: multiprocess mode / ours"] == 9.0
    assert ratios["loop, each request: 256 / 1024"] == 4.0
    assert len(ratios) == sum(len(b.bounds) for b in BENCHMARKS)
    assert all(bound.least < bound.recorded for b in BENCHMARKS for bound in b.bounds)


def test_a_figure_is_that_of_the_row_with_all_of_the_values() -> None:
    rows = [{"a": 1, "b": 1, "x": 5.0}, {"a": 1, "b": 2, "x": 6.0}]
    assert find(rows, "x", a=1, b=2) == 6.0
