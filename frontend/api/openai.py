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
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

from aiohttp import HttpVersion11, web

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
from frontend.context import TRACE_HEADERS, RequestContext
from frontend.counters import GroupCommit
from frontend.engines import Asked
from frontend.errors import ApiError, BadRequest, NotFound, error_body
from frontend.routes import Handler, Route, route_of
from frontend.text import ChatTemplateError, SequenceText, StopStrings, Tokenizer

LONG_TEXT: Final = 20_000  # characters; longer ones are tokenised in a thread. Measured: 0.7 µs a character
STREAM_HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}

Answering = Coroutine[Any, Any, web.StreamResponse]


class Clients(Protocol):
    """The engines, seen from here; `frontend.engines.engine_client` has them."""

    def submit(self, prompt_token_ids: list[int], asked: Asked) -> Generation:
        """Raises EngineUnavailable, TooManyRequests."""


class OpenAIService:
    """One model behind the OpenAI API. `vocab_size` is the model's, which may be padded beyond the tokenizer's."""

    def __init__(
        self,
        *,
        clients: Clients,
        group: GroupCommit,
        tokenizer: Tokenizer,
        served_model_names: Sequence[str],
        max_model_len: int,
        vocab_size: int,
        created_unix: int | None = None,
    ) -> None:
        self._clients = clients
        self._group = group
        self._tokenizer = tokenizer
        self._names = tuple(served_model_names)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._created_unix = int(time.time()) if created_unix is None else created_unix

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        arrived_at = time.monotonic()
        request = parse_request(CompletionRequest, await http.read())
        context = self._context(http, request, "cmpl", arrived_at)
        prompts = [await self._prompt_ids(prompt, request) for prompt in request.prompt]
        echoes = [self._prompt_text(prompt, request) for prompt in request.prompt] if request.echo else []
        reply = CompletionReply(
            **_heading(context, request),
            token_bytes=self._tokenizer.token_bytes,
            n=request.n,
            echoes=echoes,
        )
        return await self._answer(http, request, prompts, reply, context)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        arrived_at = time.monotonic()
        request = parse_request(ChatRequest, await http.read())
        context = self._context(http, request, "chatcmpl", arrived_at)
        prompt = await self._prompt_ids(self._conversation(request), request)
        reply = ChatReply(**_heading(context, request), token_bytes=self._tokenizer.token_bytes)
        return await self._answer(http, request, [prompt], reply, context)

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

    def _context(self, http: web.Request, request: GenerationRequest, prefix: str, arrived_at: float) -> RequestContext:
        route = route_of(http)
        return RequestContext(
            operation="" if route is None else route.operation,
            model=self._model(request),
            response_id=f"{prefix}-{uuid.uuid4().hex}",
            arrived_at=arrived_at,
            trace_headers={name: http.headers[name] for name in TRACE_HEADERS if name in http.headers},
        )

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
        context: RequestContext,
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
                asked = Asked(
                    context=context,
                    num_prompt_tokens=len(prompt),
                    sampling=sampling,
                    n=request.n,
                    priority=request.priority,
                )
                generations.append(self._clients.submit(prompt, asked))
            answer = Answer(
                generations,
                lambda: self._sequence_text(request),
                n=request.n,
                shows_stop_token=request.include_stop_str_in_output,
            )
            num_prompt_tokens = sum(map(len, prompts))
            if request.stream:
                return await self._stream(http, answer, reply, request, num_prompt_tokens)
            return await self._whole(answer, reply, num_prompt_tokens)
        except ApiError:
            for generation in generations:
                generation.close()
            if generations:
                await self._group.committed()  # P4: the client is told only what is counted
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

    async def _whole(self, answer: Answer, reply: Reply, num_prompt_tokens: int) -> web.Response:
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

        return web.json_response(text=await Delivery(answer, self._group, say).next())

    async def _stream(
        self, http: web.Request, answer: Answer, reply: Reply, request: GenerationRequest, num_prompt_tokens: int
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
        delivery = Delivery(answer, self._group, say)
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
            await self._group.committed()
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


def _heading(context: RequestContext, request: GenerationRequest) -> dict[str, Any]:
    """What every object of the answer says of itself."""
    return {
        "id": context.response_id,
        "created": int(time.time()),
        "model": context.model,
        "has_usage": request.stream_options.include_usage,
    }


def routes(service: Callable[[], OpenAIService]) -> list[Route]:
    """`service` is asked at each request, and raises EngineUnavailable while no engine has said what it serves."""

    def handler(handle: Callable[[OpenAIService, web.Request], Answering]) -> Handler:
        async def answer(http: web.Request) -> web.StreamResponse:
            return await handle(service(), http)

        return answer

    def of_model(path: str, operation: str, handle: Callable[[OpenAIService, web.Request], Answering]) -> Route:
        return Route(
            method="POST",
            path=path,
            handler=handler(handle),
            label=path,
            operation=operation,
            needs_key=True,
            reports_load=True,
        )

    def of_models(path: str, handle: Callable[[OpenAIService, web.Request], Answering]) -> Route:
        return Route(path=path, handler=handler(handle), label="/v1/models", needs_key=True)

    return [
        of_model("/v1/completions", "text_completion", OpenAIService.completions),
        of_model("/v1/chat/completions", "chat", OpenAIService.chat_completions),
        of_models("/v1/models", OpenAIService.models),
        of_models("/v1/models/{name:.+}", OpenAIService.model),
    ]
