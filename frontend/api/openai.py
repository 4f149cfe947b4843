"""The OpenAI HTTP API: /v1/completions, /v1/chat/completions, /v1/models. Routes only.

What a request may say is in `protocol`, what an answer looks like in `replies`, how tokens become text and are
accounted for in `answer`, how that reaches the client in `delivery`. A streamed answer's headers go out with its first
words, so that whatever fails before them has an honest status; what fails later is an event in the stream.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

from aiohttp import HttpVersion11, web

from engine.wire import SamplingParams
from frontend.api.answer import Answer, Generation, Piece
from frontend.api.delivery import Delivery, Sink
from frontend.api.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
    check_token_ids,
    parse_request,
)
from frontend.api.replies import DONE, ChatReply, CompletionReply, Reply, event, usage
from frontend.errors import ApiError, BadRequest, NotFound, error_body
from frontend.origin import ORIGIN, origin_of
from frontend.text import ChatTemplateError, SequenceText, StopStrings, Tokenizer
from frontend.tracing import describe

LONG_TEXT: Final = 20_000  # characters; longer ones are tokenised in a thread. Measured: 0.7 µs a character
STREAM_HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Clients(Protocol):
    """The engines, seen from here; `frontend.engines.engine_client` has them."""

    async def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, n: int, priority: int, arrived_at: float
    ) -> Generation:
        """Raises EngineUnavailable, TooManyRequests."""


class OpenAIService:
    """One model behind the OpenAI API. `vocab_size` is the model's, which may be padded beyond the tokenizer's."""

    def __init__(
        self,
        *,
        clients: Clients,
        tokenizer: Tokenizer,
        served_model_names: Sequence[str],
        max_model_len: int,
        vocab_size: int,
        created_unix: int | None = None,
    ) -> None:
        self._clients = clients
        self._tokenizer = tokenizer
        self._names = tuple(served_model_names)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._created_unix = int(time.time()) if created_unix is None else created_unix

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        arrived_at = time.monotonic()
        request = parse_request(CompletionRequest, await http.read())
        model = self._model(request)
        prompts = [await self._prompt_ids(prompt, request) for prompt in request.prompt]
        echoes = [self._prompt_text(prompt, request) for prompt in request.prompt] if request.echo else []
        reply = CompletionReply(
            **self._heading("cmpl", http, model, request),
            token_bytes=self._tokenizer.token_bytes,
            n=request.n,
            echoes=echoes,
        )
        return await self._answer(http, request, prompts, reply, arrived_at)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        arrived_at = time.monotonic()
        request = parse_request(ChatRequest, await http.read())
        model = self._model(request)
        prompt = await self._prompt_ids(self._conversation(request), request)
        reply = ChatReply(**self._heading("chatcmpl", http, model, request), token_bytes=self._tokenizer.token_bytes)
        return await self._answer(http, request, [prompt], reply, arrived_at)

    async def models(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        return web.json_response({"object": "list", "data": [self._card(name) for name in self._names]})

    async def model(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/models/{name}."""
        return web.json_response(self._card(self._known(http.match_info["name"])))

    # --- what is asked ---

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created_unix,
            "owned_by": "wholebatch",
            "max_model_len": self._max_model_len,
        }

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise NotFound(f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")
        return name

    def _model(self, request: GenerationRequest) -> str:
        return self._names[0] if request.model is None else self._known(request.model)

    def _heading(self, prefix: str, http: web.Request, model: str, request: GenerationRequest) -> dict[str, Any]:
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        describe(model, response_id)
        ORIGIN.set(origin_of(http.headers.get("traceparent", ""), response_id))
        return {
            "id": response_id,
            "created": int(time.time()),
            "model": model,
            "has_usage": request.stream_options.include_usage,
        }

    def _conversation(self, request: ChatRequest) -> str:
        template = self._tokenizer.chat_template
        if template is None:
            raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
        try:
            return template.render(
                [message.model_dump(exclude_none=True) for message in request.messages],
                now=datetime.now(),
                add_generation_prompt=request.add_generation_prompt,
                arguments=request.chat_template_kwargs,
            )
        except ChatTemplateError as error:
            raise BadRequest(str(error), param="messages") from error

    async def _prompt_ids(self, prompt: Prompt, request: GenerationRequest) -> list[int]:
        if isinstance(prompt, list):
            check_token_ids(prompt, self._vocab_size, request.PROMPT_PARAM)
            return prompt
        if not self._tokenizer.can_fit(prompt, self._max_model_len):
            raise BadRequest(
                f"the prompt of {len(prompt)} characters is longer than the model's context "
                f"of {self._max_model_len} tokens",
                param=request.PROMPT_PARAM,
                code="context_length_exceeded",
            )
        if len(prompt) <= LONG_TEXT:
            token_ids = self._tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
        else:
            token_ids = await asyncio.to_thread(
                self._tokenizer.encode, prompt, add_special_tokens=request.add_special_tokens
            )
        if not token_ids:
            raise BadRequest("the prompt has no tokens", param=request.PROMPT_PARAM)
        return token_ids

    def _prompt_text(self, prompt: Prompt, request: GenerationRequest) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)

    # --- what is answered ---

    async def _answer(
        self,
        http: web.Request,
        request: GenerationRequest,
        prompts: list[list[int]],
        reply: Reply,
        arrived_at: float,
    ) -> web.StreamResponse:
        samplings = [
            request.sampling(
                num_prompt_tokens=len(prompt), max_model_len=self._max_model_len, vocab_size=self._vocab_size
            )
            for prompt in prompts
        ]
        generations: list[Generation] = []
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                generation = await self._clients.submit(
                    prompt, sampling, n=request.n, priority=request.priority, arrived_at=arrived_at
                )
                generations.append(generation)
            answer = Answer(
                generations,
                lambda: self._sequence_text(request),
                n=request.n,
                shows_stop_token=request.include_stop_str_in_output,
            )
            num_prompt_tokens = sum(map(len, prompts))
            if request.stream:
                return await _stream(http, answer, reply, request, num_prompt_tokens)
            return await _whole(answer, reply, num_prompt_tokens)
        except ApiError:
            for generation in generations:
                generation.close()
            if generations:
                await generations[0].committed()  # P4: the client is told only what is counted
            raise
        finally:
            for generation in generations:
                generation.close()

    def _sequence_text(self, request: GenerationRequest) -> SequenceText:
        return SequenceText(
            self._tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens),
            StopStrings(request.stop, includes_stop=request.include_stop_str_in_output),
            min_tokens=request.min_tokens,
        )


async def _whole(answer: Answer, reply: Reply, num_prompt_tokens: int) -> web.Response:
    """One JSON answer, when all is there."""
    choices: dict[int, Piece] = {}

    def say(pieces: list[Piece]) -> str:
        for piece in pieces:
            if piece.choice in choices:
                choices[piece.choice].extend(piece)
            else:
                choices[piece.choice] = piece
        if not answer.is_finished:
            return ""
        in_order = [choices[number] for number in sorted(choices)]
        answer.deliver(in_order)
        counts = usage(num_prompt_tokens, answer.num_completion_tokens, answer.num_cached_tokens)
        return json.dumps(reply.whole(in_order, counts))

    return web.json_response(text=await Delivery(answer, say).next())


async def _stream(
    http: web.Request, answer: Answer, reply: Reply, request: GenerationRequest, num_prompt_tokens: int
) -> web.StreamResponse:
    """Server-sent events, one write a turn."""

    def say(pieces: list[Piece]) -> str:
        answer.deliver(pieces)
        events = "".join(map(reply.events, pieces))
        if not answer.is_delivered:
            return events
        if request.stream_options.include_usage:
            counts = usage(num_prompt_tokens, answer.num_completion_tokens, answer.num_cached_tokens)
            events += reply.usage_event(counts)
        return events + DONE

    response = web.StreamResponse(headers=STREAM_HEADERS)
    delivery = Delivery(answer, say)
    sink: Sink | None = None
    try:
        while True:
            words = await delivery.next(sink)
            writer = await response.prepare(http)
            if answer.is_delivered:
                break
            await response.write(words.encode())
            if writer is not None:
                await writer.drain()
            sink = _chunks(http)
    except ApiError as error:
        if not response.prepared:
            raise
        answer.close()
        await answer.committed()
        words = event(error_body(error))
    await response.write_eof(words.encode())
    return response


def _chunks(http: web.Request) -> Sink | None:
    """Past aiohttp's writer, which only a coroutine can use. None where this HTTP version has no chunks."""
    transport, protocol = http.transport, http.protocol
    if transport is None or http.version < HttpVersion11:
        return None

    def write(words: str) -> bool:
        if transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(f"{len(words):x}\r\n{words}\r\n".encode())
        return not protocol.writing_paused

    return write


def add_routes(app: web.Application, service: Callable[[], OpenAIService]) -> None:
    """`service` is asked at each request, and raises EngineUnavailable while no engine has said what it serves."""

    async def completions(http: web.Request) -> web.StreamResponse:
        return await service().completions(http)

    async def chat_completions(http: web.Request) -> web.StreamResponse:
        return await service().chat_completions(http)

    async def models(http: web.Request) -> web.StreamResponse:
        return await service().models(http)

    async def model(http: web.Request) -> web.StreamResponse:
        return await service().model(http)

    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{name:.+}", model)
