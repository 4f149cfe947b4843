"""What clients of both APIs get, in OpenAI's shapes: whole answers and stream chunks. Pure."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from frontend.api.answer import Piece, ShownToken, Usage
from frontend.parsing import Arguments, Call, Part, Reasoning, Text

TokenBytes = Callable[[int], bytes]
DONE = "data: [DONE]\n\n"
NO_TEXT = "\0"  # stands where a text will be
NO_USAGE = '"usage":null}\n\n'  # ends an event

_quote = json.JSONEncoder().encode  # of a text: what json.dumps makes of it. ASCII only


def event(data: dict[str, Any]) -> str:
    """One server-sent event. ASCII only: some clients take U+2028 for a line end."""
    return "data: " + json.dumps(data, separators=(",", ":")) + "\n\n"


class _TextEvents:
    """Events of one request that differ in a choice's text only, the usual ones: `make` is asked once a choice, and
    from then on only the text is encoded. Equal to `event(make(choice, text))`. Measured: 0.5 µs an event against 5."""

    def __init__(self, make: Callable[[int, str], dict[str, Any]]) -> None:
        self._make = make
        self._frames: dict[int, tuple[str, str]] = {}

    def of(self, choice: int, text: str) -> str:
        frame = self._frames.get(choice)
        if frame is None:
            # From the right: before the text there is a client's word, the model's name; after it there is none.
            head, _, tail = event(self._make(choice, NO_TEXT)).rpartition(_quote(NO_TEXT))
            frame = self._frames[choice] = (head, tail)
        return f"{frame[0]}{_quote(text)}{frame[1]}"


def _usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object; cached tokens only where known."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_completion,
        "total_tokens": usage.num_prompt + usage.num_completion,
    }
    if usage.num_cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.num_cached}
    return counts


class Reply(Protocol):
    """One API's shapes, for one request."""

    def events(self, piece: Piece) -> str:
        """The events that say this piece."""

    def last_events(self, usage: Usage) -> str:
        """What ends the stream, after the last piece."""

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""


class _Envelope:
    """What every object of one request has in common."""

    def __init__(self, kind: str, *, id: str, created: int, model: str, has_usage: bool) -> None:
        self._head = {"id": id, "object": kind, "created": created, "model": model}
        self._has_usage = has_usage

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """With `include_usage`, every chunk but the last says null."""
        usage_field = {"usage": None} if self._has_usage else {}
        return {**self._head, "choices": [choice], **usage_field}

    def of(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": _usage(usage)}

    def last_events(self, usage: Usage) -> str:
        """The usage, where it was asked for, comes with no choice."""
        return (event(self.of([], usage)) if self._has_usage else "") + DONE


class ContinuousUsage:
    """A reply of which every event says what its choice has used up to then, where others say null."""

    def __init__(self, reply: Reply, num_prompt_tokens: Sequence[int], n: int) -> None:
        self._reply = reply
        self._num_prompt_tokens = num_prompt_tokens
        self._n = n
        self._num_tokens: Counter[int] = Counter()  # by choice

    def events(self, piece: Piece) -> str:
        self._num_tokens[piece.choice] += piece.num_tokens
        usage = Usage(self._num_prompt_tokens[piece.choice // self._n], self._num_tokens[piece.choice], None)
        said = json.dumps(_usage(usage), separators=(",", ":"))
        # No text holds this: in JSON its quotes and line ends would be escaped.
        return self._reply.events(piece).replace(NO_USAGE, f'"usage":{said}}}\n\n')

    def last_events(self, usage: Usage) -> str:
        return self._reply.last_events(usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        return self._reply.whole(choices, usage)


class CompletionReply:
    """/v1/completions. `echoes` is each prompt's text where it is to be repeated before the answer."""

    def __init__(
        self,
        *,
        id: str,
        created: int,
        model: str,
        has_usage: bool,
        token_bytes: TokenBytes,
        n: int,
        echoes: Sequence[str] = (),
    ) -> None:
        self._envelope = _Envelope("text_completion", id=id, created=created, model=model, has_usage=has_usage)
        self._token_bytes = token_bytes
        self._echoes = {prompt * n + i: text for prompt, text in enumerate(echoes) for i in range(n)}
        self._text_events = _TextEvents(lambda choice, text: self._chunk(Piece(choice, text)))

    def events(self, piece: Piece) -> str:
        if piece.finish_reason is None and not piece.tokens and piece.choice not in self._echoes:
            return self._text_events.of(piece.choice, piece.text)
        return event(self._chunk(piece))

    def last_events(self, usage: Usage) -> str:
        return self._envelope.last_events(usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        return self._envelope.of([self._choice(piece) for piece in choices], usage)

    def _chunk(self, piece: Piece) -> dict[str, Any]:
        return self._envelope.chunk(self._choice(piece))

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": self._echoes.pop(piece.choice, "") + piece.text,
            "logprobs": self._logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, tokens: list[ShownToken]) -> dict[str, Any]:
        return {
            "tokens": [self._text(token.token_id) for token in tokens],
            "token_logprobs": [token.logprobs.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ShownToken) -> dict[str, float]:
        """The alternatives and the sampled token itself; of tokens with the same text the likelier one."""
        found: dict[str, float] = {}
        for token_id, logprob in (*token.logprobs.top, (token.token_id, token.logprobs.logprob)):
            found.setdefault(self._text(token_id), logprob)
        return found

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


class ChatReply:
    """/v1/chat/completions. In a stream each choice begins with its role and ends with its reason, which is
    `tool_calls` where it has called a tool by its own choice."""

    def __init__(
        self,
        *,
        id: str,
        created: int,
        model: str,
        has_usage: bool,
        token_bytes: TokenBytes,
        tool_is_named: bool = False,
    ) -> None:
        self._tool_is_named = tool_is_named
        self._callers: set[int] = set()  # choices that have called a tool
        self._chunk = _Envelope("chat.completion.chunk", id=id, created=created, model=model, has_usage=has_usage)
        self._whole = _Envelope("chat.completion", id=id, created=created, model=model, has_usage=has_usage)
        self._token_bytes = token_bytes
        self._begun: set[int] = set()
        self._text_events = _TextEvents(lambda choice, text: self._delta(choice, {"content": text}))

    def events(self, piece: Piece) -> str:
        said = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            said.append(event(self._delta(piece.choice, {"role": "assistant", "content": ""})))
        if piece.parts:
            deltas = [self._part(piece.choice, part) for part in piece.parts]
            tokens = [piece.tokens, *([()] * (len(deltas) - 1))]
            said += [
                event(self._delta(piece.choice, delta, tokens=shown))
                for delta, shown in zip(deltas, tokens, strict=True)
            ]
        elif piece.tokens:
            said.append(event(self._delta(piece.choice, {"content": piece.text}, tokens=piece.tokens)))
        elif piece.text:
            said.append(self._text_events.of(piece.choice, piece.text))
        if piece.finish_reason is not None:
            said.append(event(self._delta(piece.choice, {}, finish_reason=self._reason(piece))))
        return "".join(said)

    def _part(self, choice: int, part: Part) -> dict[str, Any]:
        """The delta that says one part."""
        match part:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case Call(number, name):
                self._callers.add(choice)
                return {"tool_calls": [{"index": number, **_call(name, "")}]}
            case Arguments(number, text):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}

    def _reason(self, piece: Piece) -> str | None:
        has_called = piece.choice in self._callers and not self._tool_is_named
        return "tool_calls" if has_called and piece.finish_reason == "stop" else piece.finish_reason

    def last_events(self, usage: Usage) -> str:
        return self._chunk.last_events(usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        return self._whole.of([self._choice(piece) for piece in choices], usage)

    def _delta(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[ShownToken] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens)
        return self._chunk.chunk(
            {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        )

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None} | self._message(piece)
        return {
            "index": piece.choice,
            "message": message,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": self._reason(piece),
        }

    def _message(self, piece: Piece) -> dict[str, Any]:
        """What the parts of a whole answer say in place of its text."""
        calls: list[dict[str, Any]] = []
        said = {Text: "", Reasoning: ""}
        for part in piece.parts:
            match part:
                case Call(_, name):
                    self._callers.add(piece.choice)
                    calls.append(_call(name, ""))
                case Arguments(number, text):
                    calls[number]["function"]["arguments"] += text
                case Text(text) | Reasoning(text):
                    said[type(part)] += text
        if not piece.parts:
            return {}
        message: dict[str, Any] = {"content": said[Text] or (None if calls else "")}
        if said[Reasoning]:
            message["reasoning_content"] = said[Reasoning]
        return message | ({"tool_calls": calls} if calls else {})

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if not tokens:
            return None
        content = []
        for token in tokens:
            top = [self._token(token_id, logprob) for token_id, logprob in token.logprobs.top]
            content.append({**self._token(token.token_id, token.logprobs.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
