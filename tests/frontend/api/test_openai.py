"""The OpenAI routes over engines that play a script: what clients get, and that every token is accounted for."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from engine.wire import TokenLogprobs
from frontend.api.answer import Answer, Piece
from frontend.api.openai import OpenAIService, routes
from frontend.api.protocol import Terms
from frontend.errors import EngineLost, EngineUnavailable, TooManyRequests, error_middleware
from frontend.parsing import TOOL_FORMATS, ToolCallParser
from frontend.routes import mount
from frontend.text.detokenizer import SequenceText, Stops, StopStrings
from tests.fakes import FakeClients, FakeGeneration, fake_delta, fake_finish, fake_start
from tests.frontend.small_tokenizers import END, START, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
HTTP = TestClient[web.Request, web.Application]
Script = list[Any]
STOP, LENGTH = fake_finish("stop"), fake_finish("length")


def says(text: str, *, reason: str = "length", index: int = 0, cached: int = 0) -> Script:
    """A token a wake-up, each a byte; the last with the finish."""
    deltas = [fake_delta(index, [byte]) for byte in text.encode()]
    deltas[0].start = fake_start(num_cached_tokens=cached)
    deltas[-1].finish = fake_finish(reason)
    return [[delta] for delta in deltas]


TERMS = Terms(max_model_len=64, vocab_size=300, max_sequences=256, allows_priority=True)


def application(clients: FakeClients, terms: Terms = TERMS) -> web.Application:
    service = OpenAIService(
        clients=clients,
        group=clients.group,
        tokenizer=TOKENIZER,
        served_model_names=["tiny", "alias/tiny"],
        terms=terms,
        created_unix=1,
    )
    app = web.Application(middlewares=[error_middleware], client_max_size=2**20)
    mount(app, routes(lambda: service))
    return app


@asynccontextmanager
async def serving(clients: FakeClients, terms: Terms = TERMS) -> AsyncIterator[HTTP]:
    async with TestClient(TestServer(application(clients, terms))) as http:
        yield http


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
JSON = {"Content-Type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


async def post(clients: FakeClients, path: str, status: int = 200, *, terms: Terms = TERMS, **body: Any) -> Any:
    async with serving(clients, terms) as http:
        answer = await http.post(path, json=body)
        assert answer.status == status, await answer.text()
        return await answer.json()


async def stream(clients: FakeClients, path: str, terms: Terms = TERMS, **body: Any) -> list[Any]:
    """The events' data; the last is "[DONE]" where it should be."""
    async with serving(clients, terms) as http:
        answer = await http.post(path, json=body | {"stream": True})
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        events = (await answer.text()).split("\n\n")
        assert events.pop() == ""
        data = [event.removeprefix("data: ") for event in events]
        return [json.loads(text) if text != "[DONE]" else text for text in data]


def texts(chunks: Sequence[Any], index: int = 0) -> list[str]:
    return [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def written(monkeypatch: pytest.MonkeyPatch, log: list[str] | None = None) -> list[bytes]:
    """What goes to clients' sockets from now on, a write an item."""
    writes: list[bytes] = []
    write = _SelectorSocketTransport.write

    def spy(self: _SelectorSocketTransport, data: bytes) -> None:
        if b"HTTP/1.1\r\n" not in data:  # a request: the test's own client
            writes.append(bytes(data))
            if log is not None:
                log.append("write")
        write(self, data)

    monkeypatch.setattr(_SelectorSocketTransport, "write", spy)
    return writes


# --- whole answers ---


async def test_a_completion():
    clients = FakeClients(says("hello", cached=2))
    answer = await post(clients, COMPLETIONS, prompt="abc", max_tokens=5, temperature=0, priority=3)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    asked = clients.asks[0]
    assert (asked.prompt_token_ids, asked.n, asked.priority) == (list(b"abc"), 1, 3)
    assert (asked.sampling.max_tokens, asked.sampling.temperature) == (5, 0.0)


async def test_a_chat():
    clients = FakeClients(says("yes", reason="stop"))
    answer = await post(clients, CHAT, model="alias/tiny", messages=MESSAGES)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "alias/tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ye", "refusal": None},  # the stop token is not shown
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = [START, *b"user:Hi", END, START, *b"assistant:"]
    assert clients.asks[0].prompt_token_ids == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == 3
    assert clients.asks[0].sampling.max_tokens == 64 - len(prompt)


async def test_many_prompts_are_as_many_requests_with_choices_in_order():
    first = [[fake_delta(1, [ord("b")], finish=LENGTH)], [fake_delta(0, [ord("a")], finish=LENGTH)]]
    second = [[fake_delta(0, [ord("c")], finish=LENGTH), fake_delta(1, [ord("d")], finish=LENGTH)]]
    clients = FakeClients(first, second)
    answer = await post(clients, COMPLETIONS, prompt=["x", [1, 2]], n=2, max_tokens=1)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert [ask.prompt_token_ids for ask in clients.asks] == [[ord("x")], [1, 2]]
    assert answer["usage"]["total_tokens"] == 3 + 4
    assert all(ask.generation.is_finished for ask in clients.asks)


async def test_echo_repeats_the_prompt_once_a_choice():
    clients = FakeClients(
        [[fake_delta(0, [ord("x"), ord("y")], finish=LENGTH), fake_delta(1, [ord("z")], finish=LENGTH)]]
    )
    answer = await post(clients, COMPLETIONS, prompt=list(b"ab"), n=2, echo=True, max_tokens=2)
    assert [c["text"] for c in answer["choices"]] == ["abxy", "abz"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_echo_alone_answers_the_prompt_and_shows_no_token(is_streamed: bool):
    clients = FakeClients([[fake_delta(0, [ord("x")], finish=LENGTH, start=fake_start(num_cached_tokens=1))]])
    body: dict[str, Any] = {"prompt": "ab", "echo": True, "max_tokens": 0}
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": 0,
        "total_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    if is_streamed:
        *chunks, last, _ = await stream(clients, COMPLETIONS, **body, stream_options={"include_usage": True})
        assert (texts(chunks), chunks[-1]["choices"][0]["finish_reason"], last["usage"]) == (["ab"], "length", usage)
    else:
        answer = await post(clients, COMPLETIONS, **body)
        assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("ab", "length")]
        assert answer["usage"] == usage
    generation = clients.asks[0].generation
    assert (generation.counts, generation.is_finished) == ({"delivered": 0, "stop": 1}, True)
    assert "stop 0" not in generation.log, "it ended by itself"


async def test_a_cache_salt_reaches_the_engine_with_every_prompt():
    clients = FakeClients(says("a"), says("b"))
    await post(clients, COMPLETIONS, prompt=["a", "b"], cache_salt="tenant-a")
    assert [ask.cache_salt for ask in clients.asks] == ["tenant-a"] * 2


async def test_what_the_deployment_does_not_offer_is_refused_before_anything_is_submitted():
    clients = FakeClients()
    terms = replace(TERMS, max_sequences=2, allows_priority=False)
    for path, prompt in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})):
        for param, value in (("n", 3), ("priority", 1)):
            async with serving(clients, terms) as http:
                answer = await http.post(path, json=prompt | {param: value})
                assert (answer.status, (await answer.json())["error"]["param"]) == (400, param)


async def test_special_tokens_are_shown_where_asked_for():
    script = [[fake_delta(0, [ord("a"), START, ord("b"), END], finish=STOP)]]
    assert (await post(FakeClients(script), COMPLETIONS, prompt="x"))["choices"][0]["text"] == "ab"
    shown = await post(FakeClients(script), COMPLETIONS, prompt="x", skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "a<start>b"
    stop_too: dict[str, Any] = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    shown = await post(FakeClients(script), COMPLETIONS, prompt="x", **stop_too)
    assert shown["choices"][0]["text"] == "a<start>b<end>"


@pytest.mark.parametrize("reason", ["abort", "repetition"])
async def test_other_ways_to_end_are_said(reason: str):
    answer = await post(FakeClients(says("a", reason=reason)), COMPLETIONS, prompt="x")
    assert answer["choices"][0]["finish_reason"] == reason


# --- log probabilities ---

LOGPROBS = [
    TokenLogprobs(-0.5, 1, ((ord("a"), -0.5), (ord("b"), -1.5))),
    TokenLogprobs(-2.0, 3, ((ord("c"), -0.25), (ord("d"), -0.75))),
]


async def test_logprobs_of_a_completion():
    clients = FakeClients([[fake_delta(0, list(b"ae"), LOGPROBS, LENGTH)]])
    answer = await post(clients, COMPLETIONS, prompt="x", logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "e"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"c": -0.25, "d": -0.75, "e": -2.0}],
        "text_offset": [0, 1],
    }


async def test_logprobs_of_a_chat_have_bytes():
    clients = FakeClients([[fake_delta(0, list("é".encode()), LOGPROBS, LENGTH)]])
    answer = await post(clients, CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [(token["token"], token["bytes"], token["logprob"]) for token in content] == [
        ("\ufffd", [0xC3], -0.5),
        ("\ufffd", [0xA9], -2.0),
    ]
    assert content[1]["top_logprobs"] == [
        {"token": "c", "logprob": -0.25, "bytes": [ord("c")]},
        {"token": "d", "logprob": -0.75, "bytes": [ord("d")]},
    ]


async def test_logprobs_of_held_back_tokens_come_with_the_next_text():
    deltas = [fake_delta(0, [byte], [logprob]) for byte, logprob in zip("é".encode(), LOGPROBS, strict=True)]
    deltas[1].finish = LENGTH
    chunks = await stream(FakeClients([[delta] for delta in deltas]), COMPLETIONS, prompt="x", logprobs=2)
    assert [chunk["choices"][0]["logprobs"]["token_logprobs"] for chunk in chunks[:-1]] == [[-0.5, -2.0]]


# --- streams ---


async def test_a_completion_streamed():
    chunks = await stream(FakeClients(says("héy")), COMPLETIONS, prompt="x", stream_options={"include_usage": True})
    assert chunks.pop() == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert texts(chunks) == ["h", "é", "y"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_with_continuous_usage_every_chunk_says_what_its_choice_has_used(path: str):
    clients = FakeClients([[fake_delta(1, [ord("b")])], [fake_delta(0, [ord("a")]), fake_delta(1, [ord("c")])]])
    clients.scripts[0] += [[fake_delta(i, [ord("d")], finish=LENGTH) for i in range(2)]]  # type: ignore[operator]
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: dict[str, Any] = {"prompt": "xyz"} if path == COMPLETIONS else {"messages": MESSAGES}
    *chunks, last, _ = await stream(clients, path, **asked, n=2, stream_options=options)
    used: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        used[chunk["choices"][0]["index"]].append(usage["completion_tokens"])
    assert [sorted(set(counts)) for counts in used.values()] == [[1, 2], [1, 2, 3]]
    assert last["usage"]["completion_tokens"] == 5


async def test_a_chat_streamed_begins_with_its_role_and_ends_with_its_reason():
    chunks = await stream(FakeClients(says("ok.")), CHAT, messages=MESSAGES)
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "o"}, None),
        ({"content": "k"}, None),
        ({"content": "."}, None),
        ({}, "length"),
    ]
    assert all("usage" not in chunk for chunk in chunks)


async def test_streams_of_many_prompts_are_told_apart():
    chunks = await stream(FakeClients(says("abc"), says("xyz")), COMPLETIONS, prompt=["p", "q"], echo=True)
    assert chunks.pop() == "[DONE]"
    assert ["".join(texts(chunks, index)) for index in (0, 1)] == ["pabc", "qxyz"]


async def test_what_arrives_together_is_written_together(monkeypatch: pytest.MonkeyPatch):
    writes = written(monkeypatch)
    script = [
        [fake_delta(i, [ord("a"), ord("b")]) for i in range(3)],
        [fake_delta(i, [ord("c")]) for i in range(3)],
        [fake_delta(i, [1], finish=STOP) for i in range(3)],
    ]
    await stream(FakeClients(script), COMPLETIONS, prompt="x", n=3)
    assert [data.count(b"data: ") for data in writes if b"data: " in data] == [3, 3, 4]


async def ask_raw(http: HTTP, version: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream asked for by hand, and nothing read of it yet."""
    body = json.dumps({"prompt": "x", "stream": True, "skip_special_tokens": False})
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that not much is between the two
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", http.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    head = f"POST {COMPLETIONS} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return reader, writer


async def test_a_client_without_chunks_is_streamed_to():
    async with serving(FakeClients(says("abc"))) as http:
        reader, writer = await ask_raw(http, "1.0")
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        writer.close()
    assert b"chunked" not in head
    events = body.decode().split("\n\n")
    assert [json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]] == ["a", "b", "c"]
    assert events[-2:] == ["data: [DONE]", ""]


async def test_a_client_that_does_not_read_holds_its_own_answer_up_and_gets_all_of_it_later():
    num, size = 250, 5_000
    script = [[fake_delta(0, [START] * size)] for _ in range(num)]
    clients = FakeClients([*script, [fake_delta(0, [ord("z")], finish=LENGTH)]])
    async with serving(clients) as http:
        reader, writer = await ask_raw(http, "1.1")
        async with asyncio.timeout(20):
            await asyncio.wait_for(clients.has_taken_all.wait(), 10)
            left, before = num, 0
            while left != before:  # until the sockets between have taken all that they take
                await asyncio.sleep(0.1)
                left, before = len(clients.asks[0].generation.script), left
            assert left > num // 5
            whole = bytearray()
            while not whole.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
                whole += await reader.read(2**20)
        writer.close()
    assert whole.count(b"<start>" * size) == num


# --- stop strings ---


@pytest.mark.parametrize("batch", [1, 2, 7])
async def test_a_stop_string_ends_the_answer_and_the_engines_work(batch: int):
    tokens = list(b"one END two")
    script: Script = [[fake_delta(0, tokens[at : at + batch])] for at in range(0, len(tokens), batch)]
    script[0][0].start = fake_start(num_cached_tokens=1)
    clients = FakeClients([*script, None])  # the engine would go on for ever
    answer = await post(clients, COMPLETIONS, prompt="x", stop=["END"])
    assert answer["choices"][0] == {"index": 0, "text": "one ", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 7  # up to the token that completes END
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}  # known though the engine had no last word
    generation = clients.asks[0].generation
    assert "stop 0" in generation.log
    assert generation.counts["delivered"] == 7
    assert generation.counts["stop"] == -7 % batch  # what came together with it


async def test_a_stop_string_ends_one_sequence_of_several():
    script = [
        [fake_delta(0, list(b"a.")), fake_delta(1, list(b"b"))],
        [fake_delta(0, list(b"late")), fake_delta(1, list(b"c"), finish=LENGTH)],
    ]
    clients = FakeClients(script)
    answer = await post(clients, COMPLETIONS, prompt="x", n=2, stop=".")
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("a", "stop"), ("bc", "length")]
    assert clients.asks[0].generation.counts == {"delivered": 4, "stop": 4}


async def test_text_held_back_for_a_stop_string_comes_at_the_end():
    chunks = await stream(FakeClients(says("the EN")), COMPLETIONS, prompt="x", stop="END")
    assert texts(chunks[:-1]) == ["t", "h", "e", " ", "EN"]


# --- the account ---


@given(
    wakeups=st.lists(st.lists(st.sampled_from([*b"ab.", *"é".encode(), END]), max_size=4), max_size=6),
    stop=st.sampled_from([[], ["."], ["ab", "é"]]),
    logprobs=st.booleans(),
)
def test_every_token_is_delivered_or_past_the_stop(wakeups: list[list[int]], stop: list[str], logprobs: bool):
    def given_logprobs(tokens: list[int]) -> list[TokenLogprobs] | None:
        return [TokenLogprobs(-1.0, 1, ())] * len(tokens) if logprobs else None

    script = [[fake_delta(0, tokens, given_logprobs(tokens))] for tokens in wakeups]
    script.append([fake_delta(0, [ord("z")], given_logprobs([1]), LENGTH)])
    generation = FakeGeneration(script)

    async def run() -> list[Piece]:
        text = SequenceText(TOKENIZER.detokenizer(), StopStrings(Stops(stop)))
        answer = Answer([generation], lambda: text, n=1, num_prompt_tokens=1)
        pieces = []
        answer.listen(lambda: None)
        while not answer.is_finished:
            await asyncio.sleep(0)
            pieces += answer.deliver_ready()[0]
        assert answer.is_delivered
        return pieces

    pieces = asyncio.run(run())
    tokens = [token for wakeup in wakeups for token in wakeup] + [ord("z")]
    whole = TOKENIZER.decode(tokens)
    earliest = min(((whole.find(s), s) for s in stop if s in whole), default=None)
    if earliest is None:
        assert "".join(piece.text for piece in pieces) == whole
        assert generation.counts["delivered"] == len(tokens)
    else:
        counted = generation.counts["delivered"]
        assert any(s in TOKENIZER.decode(tokens[:counted]) for s in stop)
        assert not any(s in TOKENIZER.decode(tokens[: counted - 1]) for s in stop)
        assert "stop 0" in generation.log
    assert sum(piece.num_tokens for piece in pieces) == generation.counts["delivered"]
    assert sum(len(piece.tokens) for piece in pieces) == logprobs * generation.counts["delivered"]
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert generation.is_finished


@pytest.mark.parametrize("streams", [False, True])
async def test_tokens_are_counted_and_committed_before_they_are_written(streams: bool, monkeypatch: pytest.MonkeyPatch):
    clients = FakeClients(says("abc"))
    written(monkeypatch, clients.log)
    if streams:
        await stream(clients, COMPLETIONS, prompt="x")
        first, middle = ["count", "commit", "write", "write"], ["count", "commit", "write"]  # the head is a write
        assert clients.log == [*first, *middle, "count", "finish", "commit", "write", "close"]
    else:
        await post(clients, COMPLETIONS, prompt="x")
        assert clients.log == ["commit", "commit", "count", "finish", "commit", "close", "write"]


async def test_a_client_that_goes_away_ends_the_request():
    clients = FakeClients([[fake_delta(0, [ord("a")])], None])
    async with serving(clients) as http:
        answer = await http.post(COMPLETIONS, json={"prompt": "x", "stream": True})
        assert await answer.content.readline()
        answer.close()
        await asyncio.wait_for(clients.asks[0].generation.closed.wait(), timeout=5)
    assert not clients.asks[0].generation.is_finished


async def test_a_client_that_goes_away_before_any_word_ends_all_its_requests():
    clients = FakeClients([None], [None])
    async with serving(clients) as http:
        asking = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": ["x", "y"]}))
        await asyncio.wait_for(clients.has_taken_all.wait(), timeout=5)
        asking.cancel()
        for ask in clients.asks:
            await asyncio.wait_for(ask.generation.closed.wait(), timeout=5)
    assert len(clients.asks) == 2


# --- errors ---


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("fault", "status"), [(EngineUnavailable("none is ready"), 503), (TooManyRequests("queue is full"), 429)]
)
async def test_a_request_that_no_engine_takes_has_an_honest_status(fault: Exception, status: int, streams: bool):
    answer = await post(FakeClients(fault), COMPLETIONS, status, prompt="x", stream=streams)
    assert answer["error"]["message"] == str(fault)


@pytest.mark.parametrize("streams", [False, True])
async def test_an_engine_lost_before_the_first_word_is_an_honest_status(streams: bool):
    clients = FakeClients([EngineLost("engine 0 ended")])
    answer = await post(clients, COMPLETIONS, 503, prompt="x", stream=streams)
    assert answer["error"]["message"] == "engine 0 ended"
    assert clients.log[-2:] == ["close", "commit"]


async def test_an_engine_lost_in_a_stream_is_an_event_and_the_end():
    clients = FakeClients([[fake_delta(0, [ord("a")])], EngineLost("engine 0 ended")])
    chunks = await stream(clients, COMPLETIONS, prompt="x")
    assert texts(chunks[:1]) == ["a"]
    assert [chunk["error"]["message"] for chunk in chunks[1:]] == ["engine 0 ended"]
    assert clients.log == ["count", "commit", "commit", "close", "commit"]


async def test_a_sequence_that_faults_in_a_stream_is_an_event_and_the_end():
    fault = fake_delta(0, [], finish=fake_finish("error", message="no token can be sampled"))
    chunks = await stream(FakeClients([[fake_delta(0, [ord("a")])], [fault]]), COMPLETIONS, prompt="x")
    assert texts(chunks[:1]) == ["a"]
    assert [chunk["error"]["message"] for chunk in chunks[1:]] == ["no token can be sampled"]


async def test_an_engine_that_gives_a_request_up_is_an_error_not_an_answer():
    script = [[fake_delta(0, [], finish=fake_finish("error", message="the KV cache is too small"))]]
    answer = await post(FakeClients(script), COMPLETIONS, 503, prompt="x")
    assert answer["error"]["message"] == "the KV cache is too small"


BAD: dict[str, tuple[str, Any, int, str]] = {
    "malformed JSON": (COMPLETIONS, b'{"prompt": "a"', 400, "not JSON"),
    "invalid UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', 400, "not JSON"),
    "no object": (CHAT, [1], 400, "no JSON object"),
    "an unknown model": (COMPLETIONS, {"prompt": "a", "model": "gpt-5"}, 404, "gpt-5"),
    "too many tokens": (COMPLETIONS, {"prompt": [1] * 64}, 400, "64"),
    "a text certainly too long": (COMPLETIONS, {"prompt": "a" * 10_000}, 400, "10000 characters"),
    "a text too long": (COMPLETIONS, {"prompt": "a" * 100}, 400, "100 tokens"),
    "a token outside the vocabulary": (COMPLETIONS, {"prompt": [300]}, 400, "300"),
    "an answer longer than the context": (COMPLETIONS, {"prompt": "a", "max_tokens": 65}, 400, "max_tokens"),
    "a conversation too long": (CHAT, {"messages": [{"role": "user", "content": "a" * 64}]}, 400, "messages"),
    "two megabytes": (COMPLETIONS, {"prompt": "a" * 2**21}, 413, "too large"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_never_reaches_an_engine(case: str):
    path, body, status, words = BAD[case]
    clients = FakeClients()
    async with serving(clients) as http:
        answer = await http.post(
            path, data=io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode()), headers=JSON
        )
        assert answer.status == status
        assert words in json.dumps((await answer.json())["error"])
    assert not clients.asks


async def test_a_service_that_is_not_there_yet_says_so():
    def nothing() -> OpenAIService:
        raise EngineUnavailable("no engine is ready yet")

    app = web.Application(middlewares=[error_middleware])
    mount(app, routes(nothing))
    async with TestClient(TestServer(app)) as http:
        assert (await http.get("/v1/models")).status == 503
        assert (await http.post(COMPLETIONS, json={"prompt": "a"})).status == 503


# --- models, and the official client ---


async def test_models_are_listed_by_every_name():
    async with serving(FakeClients()) as http:
        cards = (await (await http.get("/v1/models")).json())["data"]
        assert [card["id"] for card in cards] == ["tiny", "alias/tiny"]
        assert await (await http.get("/v1/models/alias/tiny")).json() == cards[1]
        assert cards[0] == {
            "id": "tiny",
            "object": "model",
            "created": 1,
            "owned_by": "wholebatch",
            "root": "tiny",
            "parent": None,
            "max_model_len": 64,
            "permission": [
                {
                    "id": "modelperm-tiny",
                    "object": "model_permission",
                    "created": 1,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
        assert (await http.get("/v1/models/other")).status == 404


@asynccontextmanager
async def official_client(clients: FakeClients) -> AsyncIterator[openai.AsyncOpenAI]:
    async with TestServer(application(clients)) as server:
        url = str(server.make_url("/v1"))
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


async def test_the_official_client_is_served():
    logprobs = [[fake_delta(0, list(b"ae"), LOGPROBS, LENGTH)]]
    clients = FakeClients(says("hello"), says("hi", cached=3), logprobs, logprobs)
    async with official_client(clients) as client:
        completion = await client.completions.create(model="tiny", prompt="x", max_tokens=5)
        assert completion.choices[0].text == "hello"
        chat = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert chat.choices[0].message.content == "hi"
        assert chat.usage is not None
        assert chat.usage.prompt_tokens_details is not None
        assert chat.usage.prompt_tokens_details.cached_tokens == 3
        completion = await client.completions.create(model="tiny", prompt="x", logprobs=2)
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == ["a", "e"]
        chat = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=2,
        )
        assert chat.choices[0].logprobs is not None
        assert chat.choices[0].logprobs.content is not None
        assert chat.choices[0].logprobs.content[1].top_logprobs[0].token == "c"
        assert [model.id async for model in client.models.list()] == ["tiny", "alias/tiny"]


async def test_the_official_client_streams():
    clients = FakeClients(says("hello"), says("hi"))
    async with official_client(clients) as client:
        completion = await client.completions.create(model="tiny", prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in completion]) == "hello"
        chat = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in chat]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hi"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


async def test_the_official_client_meets_its_own_errors():
    lost: Script = [[fake_delta(0, [ord("a")])], EngineLost("engine 0 ended")]
    clients = FakeClients(EngineUnavailable("none is ready"), lost)
    async with official_client(clients) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-5"):
            await client.completions.create(model="gpt-5", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.completions.create(model="tiny", prompt="x", temperature=9)
        with pytest.raises(openai.InternalServerError, match="none is ready"):
            await client.completions.create(model="tiny", prompt="x")
        streamed = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="engine 0 ended"):
            [chunk async for chunk in streamed]


@pytest.mark.parametrize(("path", "operation"), [(COMPLETIONS, "text_completion"), (CHAT, "chat")])
async def test_what_runs_for_a_request_is_handed_its_context(path: str, operation: str):
    clients = FakeClients(says("hello"))
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=b", "Authorization": "Bearer secret"}
    asked: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    async with (
        serving(clients) as http,
        http.post(path, json={**asked, "model": "alias/tiny"}, headers=headers) as answer,
    ):
        body = await answer.json()
    (ask,) = clients.asks
    assert (ask.context.operation, ask.context.model, ask.context.response_id) == (operation, "alias/tiny", body["id"])
    assert ask.context.trace_headers == {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    assert ask.context.origin == ("trace_id", TRACEPARENT.split("-")[1])


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Type": "text/plain"}, "application/json"),
        ({}, "application/json"),
        ({**JSON, "Content-Encoding": "gzip"}, "compressed"),
        ({**JSON, "Content-Encoding": "br"}, "compressed"),
    ],
)
async def test_a_body_in_another_form_is_refused_unread(headers: dict[str, str], words: str):
    body = gzip.compress(b'{"prompt": "x"}') if "Content-Encoding" in headers else b'{"prompt": "x"}'
    server = TestServer(application(FakeClients()))
    await server.start_server(auto_decompress=False)
    async with TestClient(server) as http, http.post(COMPLETIONS, data=io.BytesIO(body), headers=headers) as answer:
        assert answer.status == 415
        assert words in (await answer.json())["error"]["message"]


async def test_an_answer_is_cut_to_what_the_context_leaves_as_by_vllm():
    clients = FakeClients(says("hello"))
    await post(clients, COMPLETIONS, prompt=[1] * 60, max_tokens=64)
    assert clients.asks[0].sampling.max_tokens == 4


async def test_nothing_is_tokenised_for_a_request_that_has_no_place(monkeypatch: pytest.MonkeyPatch):
    clients = FakeClients()

    def full(num_sequences: int) -> None:
        raise TooManyRequests("queue is full")

    def never(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(clients, "check", full)
    monkeypatch.setattr(TOKENIZER, "encode", never)
    await post(clients, COMPLETIONS, 429, prompt="x")


# --- tool calls ---

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ROOMY = replace(TERMS, max_model_len=1000)
STOP_TOKEN = "$"  # which nobody sees
CALLING = 'Yes. <tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>'


async def test_a_tool_call_is_told_apart_from_the_words_before_it():
    answer = await post(
        FakeClients(says(CALLING + STOP_TOKEN, reason="stop")), CHAT, terms=ROOMY, messages=MESSAGES, tools=TOOLS
    )
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Yes."
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "f", "arguments": '{"a": "b"}'}
    assert call["id"].startswith("call_")
    assert answer["usage"]["completion_tokens"] == len(CALLING) + 1


async def test_a_streamed_tool_calls_deltas_join_to_the_same_message():
    chunks = await stream(
        FakeClients(says(CALLING + STOP_TOKEN, reason="stop")), CHAT, terms=ROOMY, messages=MESSAGES, tools=TOOLS
    )
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    deltas = [choice["delta"] for choice in choices]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    assert [call["index"] for call in calls] == [0] * len(calls)
    assert (calls[0]["type"], calls[0]["function"]["name"]) == ("function", "f")
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": "b"}'
    assert len(calls) > 3, "arguments are streamed as they come"
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_every_token_of_a_tool_call_is_delivered():
    generation = FakeGeneration(says(CALLING + STOP_TOKEN, reason="stop"))
    answer = Answer(
        [generation],
        lambda: SequenceText(TOKENIZER.detokenizer(), StopStrings(Stops([]))),
        n=1,
        num_prompt_tokens=1,
        new_parser=lambda: ToolCallParser(TOOL_FORMATS["hermes"]),
    )
    answer.listen(lambda: None)
    while not answer.is_finished:
        await asyncio.sleep(0)
        answer.deliver_ready()
    assert generation.counts == {"delivered": len(CALLING) + 1}


async def test_without_tools_the_same_text_is_words():
    answer = await post(FakeClients(says(CALLING + STOP_TOKEN, reason="stop")), CHAT, terms=ROOMY, messages=MESSAGES)
    assert answer["choices"][0]["message"]["content"] == CALLING
    assert answer["choices"][0]["finish_reason"] == "stop"
