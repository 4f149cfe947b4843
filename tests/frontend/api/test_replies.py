"""Stream events are made from prepared parts; what comes out is what encoding the whole object gives."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from engine.wire import TokenLogprobs
from frontend.api.answer import Piece, ShownToken
from frontend.api.replies import NO_USAGE, ChatReply, CompletionReply, ContinuousUsage

texts = st.text(max_size=20) | st.sampled_from([NO_USAGE, '"', "\\", "\0", "\u2028", "\ud800", '"\\u0000"', "😀"])
names = st.text(min_size=1, max_size=10) | st.sampled_from(["\0", '"\0"', '"text":"'])
reasons = st.sampled_from(["stop", "length", None])
SHOWN = ShownToken(7, 0, TokenLogprobs(-0.5, 1, ((7, -0.5),)))


def token_bytes(token_id: int) -> bytes:
    return b"t%d" % token_id


def encoded(data: dict[str, Any]) -> str:
    return "data: " + json.dumps(data, separators=(",", ":")) + "\n\n"


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """Of two choices, some with log probabilities, and an end."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        shown = draw(st.sampled_from([[], [], [SHOWN]]))
        found.append(Piece(draw(st.integers(0, 1)), draw(texts), 1, shown, draw(reasons)))
    return found


@given(said=pieces(), model=names, has_usage=st.booleans(), echo=st.sampled_from(["", "once"]))
@example(said=[Piece(0, "\0", 1), Piece(0, "a", 1)], model="\0", has_usage=True, echo="")
def test_a_completions_events(said: list[Piece], model: str, has_usage: bool, echo: str):
    reply = CompletionReply(
        id="x", created=1, model=model, has_usage=has_usage, token_bytes=token_bytes, n=2, echoes=[echo] if echo else []
    )
    echoed: set[int] = set()
    for piece in said:
        shown = {"tokens": ["t7"], "token_logprobs": [-0.5], "top_logprobs": [{"t7": -0.5}], "text_offset": [0]}
        choice = {
            "index": piece.choice,
            "text": ("" if piece.choice in echoed else echo) + piece.text,
            "logprobs": shown if piece.tokens else None,
            "finish_reason": piece.finish_reason,
        }
        head = {"id": "x", "object": "text_completion", "created": 1, "model": model, "choices": [choice]}
        assert reply.events(piece) == encoded(head | ({"usage": None} if has_usage else {}))
        echoed.add(piece.choice)


@given(said=pieces(), model=names, has_usage=st.booleans())
def test_a_chats_events(said: list[Piece], model: str, has_usage: bool):
    reply = ChatReply(id="x", created=1, model=model, has_usage=has_usage, token_bytes=token_bytes)
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, str], logprobs: Any = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}
        return encoded(head | ({"usage": None} if has_usage else {}))

    for piece in said:
        token = {"token": "t7", "logprob": -0.5, "bytes": [*b"t7"]}
        shown = {"content": [token | {"top_logprobs": [token]}], "refusal": None}
        wanted = "" if piece.choice in begun else chunk(piece.choice, {"role": "assistant", "content": ""})
        if piece.text or piece.tokens:
            wanted += chunk(piece.choice, {"content": piece.text}, shown if piece.tokens else None)
        if piece.finish_reason is not None:
            wanted += chunk(piece.choice, {}, None, piece.finish_reason)
        assert reply.events(piece) == wanted
        begun.add(piece.choice)


@given(said=pieces(), model=names | st.just(NO_USAGE))
def test_continuous_usage_changes_nothing_else_of_an_event(said: list[Piece], model: str):
    arguments: dict[str, Any] = {"id": "x", "created": 1, "model": model, "has_usage": True, "token_bytes": token_bytes}
    plain, reply = ChatReply(**arguments), ContinuousUsage(ChatReply(**arguments), [3], 2)
    num_tokens = [0, 0]
    for piece in said:
        num_tokens[piece.choice] += piece.num_tokens
        used = num_tokens[piece.choice]
        usage = {"prompt_tokens": 3, "completion_tokens": used, "total_tokens": 3 + used}
        expected = [json.loads(event[6:]) for event in plain.events(piece).split("\n\n")[:-1]]
        found = [json.loads(event[6:]) for event in reply.events(piece).split("\n\n")[:-1]]
        assert found == [event | {"usage": usage} for event in expected]
