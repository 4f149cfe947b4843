"""The OpenAI HTTP API: /v1/completions, /v1/chat/completions, /v1/models. Routes only.

What a request may say is in `protocol`, what an answer looks like in `replies`, how tokens become text and are
accounted for in `answer`, how that reaches the client in `delivery`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final, ParamSpec, Protocol, TypeVar

from aiohttp import web

from frontend.api.answer import Answer, TokenSource
from frontend.api.conversations import WORDS_ONLY, Conversations, Reading
from frontend.api.delivery import stream, whole
from frontend.api.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
    Terms,
    check_token_ids,
    parse_request,
    too_long,
)
from frontend.api.replies import ChatReply, CompletionReply, ContinuousUsage, Reply
from frontend.api.tools import NamedTool
from frontend.context import TRACE_HEADERS, RequestContext
from frontend.counters import GroupCommit
from frontend.engines import Ask, Asked
from frontend.errors import ApiError, BadRequest, NotFound, UnsupportedMediaType
from frontend.routes import Handler, Route, request_id, route_of
from frontend.text import SequenceText, Stops, StopStrings, Tokenizer

# More is read, rendered and tokenised in a thread. Measured: 0.7 to 8 µs a character of text, 14 µs a message.
LONG_BODY: Final = 16_384  # bytes
LONG_TEXT: Final = 4_000  # characters
MAX_ASIDE: Final = 2  # requests at a time

T = TypeVar("T")
P = ParamSpec("P")
Answering = Coroutine[Any, Any, web.StreamResponse]


class Clients(Protocol):
    """The engines, seen from here; `frontend.engines.engine_client` has them."""

    def check(self, num_sequences: int) -> None:
        """Raises what `submit` would for so many sequences now."""

    def submit(self, asks: Sequence[Ask]) -> Sequence[TokenSource]:
        """All prompts of a request, or none. Raises EngineUnavailable, BadRequest, TooManyRequests."""


class OpenAIService:
    """One model behind the OpenAI API."""

    def __init__(
        self,
        *,
        clients: Clients,
        group: GroupCommit,
        tokenizer: Tokenizer,
        served_model_names: Sequence[str],
        terms: Terms,
        conversations: Conversations | None = None,
        created_unix: int | None = None,
    ) -> None:
        self._clients = clients
        self._group = group
        self._tokenizer = tokenizer
        self._names = tuple(served_model_names)
        self._terms = terms
        self._conversations = conversations or Conversations(tokenizer)
        self._working_aside = asyncio.Semaphore(MAX_ASIDE)
        self._created_unix = int(time.time()) if created_unix is None else created_unix

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        arrived_at = time.monotonic()
        body = await read_json(http)
        request = await self._aside(len(body) > LONG_BODY, parse_request, CompletionRequest, body)
        request.check_terms(self._terms)
        context = self._context(http, request, "cmpl", arrived_at)
        prompts = await self._token_ids(request.prompt, request)
        echoes = [self._prompt_text(prompt, request) for prompt in request.prompt] if request.echo else []
        reply = CompletionReply(
            **self._heading(context, request),
            token_bytes=self._tokenizer.token_bytes,
            n=request.n,
            echoes=echoes,
        )
        return await self._answer(http, request, prompts, reply, context, is_silent=request.asks_for_echo_alone)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        arrived_at = time.monotonic()
        body = await read_json(http)
        is_long = len(body) > LONG_BODY
        request = await self._aside(is_long, parse_request, ChatRequest, body)
        request.check_terms(self._terms)
        context = self._context(http, request, "chatcmpl", arrived_at)
        is_long = is_long or self._conversations.may_hold_control_tokens(body)
        conversation = await self._aside(is_long, self._conversations.render, request, datetime.now())
        prompts = await self._token_ids([conversation.token_ids or conversation.text], request)
        reply = ChatReply(
            **self._heading(context, request),
            token_bytes=self._tokenizer.token_bytes,
            tool_is_named=isinstance(request.tool_choice, NamedTool),
        )
        reading = self._conversations.reading(request, conversation)
        return await self._answer(http, request, prompts, reply, context, reading=reading)

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
            "root": name,
            "parent": None,
            "max_model_len": self._terms.max_model_len,
            "permission": [self._permission(name)],
        }

    def _permission(self, name: str) -> dict[str, Any]:
        """As vLLM says it; nothing reads more of it than that it is there."""
        return {
            "id": f"modelperm-{name}",
            "object": "model_permission",
            "created": self._created_unix,
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

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise NotFound(f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")
        return name

    def _model(self, request: GenerationRequest) -> str:
        return self._known(request.model) if request.model else self._names[0]

    def _context(self, http: web.Request, request: GenerationRequest, prefix: str, arrived_at: float) -> RequestContext:
        route = route_of(http)
        return RequestContext(
            operation="" if route is None else route.operation,
            model=self._model(request),
            response_id=f"{prefix}-{request_id(http)}",
            arrived_at=arrived_at,
            trace_headers={name: http.headers[name] for name in TRACE_HEADERS if name in http.headers},
        )

    async def _token_ids(self, prompts: Sequence[Prompt], request: GenerationRequest) -> list[list[int]]:
        """Each prompt's. What cannot be served is refused before anything is tokenised."""
        self._clients.check(request.num_sequences)
        max_model_len = self._terms.max_model_len
        for prompt in prompts:
            if isinstance(prompt, list):
                check_token_ids(prompt, self._terms.vocab_size, request.PROMPT_PARAM)
            elif not self._tokenizer.can_fit(prompt, max_model_len):
                raise too_long(f"your prompt has {len(prompt)} characters", max_model_len, request.PROMPT_PARAM)
        num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._aside(num_characters > LONG_TEXT, self._encode, prompts, request)

    async def _aside(self, is_long: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work that depends on what a client sent: long work in a thread, so that the other clients do not wait."""
        if not is_long:
            return work(*args, **kwargs)
        async with self._working_aside:
            return await asyncio.to_thread(work, *args, **kwargs)

    def _encode(self, prompts: Sequence[Prompt], request: GenerationRequest) -> list[list[int]]:
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = self._tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
            if not prompt:
                raise BadRequest("the prompt has no tokens", param=request.PROMPT_PARAM)
            found.append(prompt)
        return found

    def _prompt_text(self, prompt: Prompt, request: GenerationRequest) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)

    # --- what is answered ---

    def _has_usage(self, request: GenerationRequest) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self._terms.always_usage or request.stream_options.include_usage

    def _heading(self, context: RequestContext, request: GenerationRequest) -> dict[str, Any]:
        """What every object of the answer says of itself."""
        return {
            "id": context.response_id,
            "created": int(time.time()),
            "model": context.model,
            "has_usage": self._has_usage(request),
        }

    async def _answer(
        self,
        http: web.Request,
        request: GenerationRequest,
        prompts: list[list[int]],
        reply: Reply,
        context: RequestContext,
        *,
        is_silent: bool = False,
        reading: Reading = WORDS_ONLY,
    ) -> web.StreamResponse:
        constraint = await self._aside(True, request.constraint) if request.has_form else None
        asks = [Ask(prompt, self._asked(len(prompt), request, context, constraint)) for prompt in prompts]
        if self._has_usage(request) and request.stream_options.continuous_usage_stats:
            reply = ContinuousUsage(reply, [len(prompt) for prompt in prompts], request.n)
        generations: list[TokenSource] = []
        try:
            generations += self._clients.submit(asks)
            stops = Stops(request.stop, includes_stop=request.include_stop_str_in_output)
            answer = Answer(
                generations,
                lambda: self._sequence_text(request, stops, reading),
                new_parser=reading.new_parser,
                n=request.n,
                num_prompt_tokens=sum(map(len, prompts)),
                shows_stop_token=request.include_stop_str_in_output,
                is_silent=is_silent,
            )
            if request.stream:
                return await stream(http, answer, reply, self._group)
            return await whole(answer, reply, self._group)
        except ApiError:
            for generation in generations:
                generation.close()
            if generations:
                await self._group.committed()  # P4: the client is told only what is counted
            raise
        finally:
            for generation in generations:
                generation.close()

    def _asked(
        self, num_prompt_tokens: int, request: GenerationRequest, context: RequestContext, constraint: str | None
    ) -> Asked:
        return Asked(
            context=context,
            num_prompt_tokens=num_prompt_tokens,
            sampling=request.sampling(num_prompt_tokens, self._terms, constraint),
            n=request.n,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )

    def _sequence_text(self, request: GenerationRequest, stops: Stops, reading: Reading) -> SequenceText:
        skips_special_tokens = request.skip_special_tokens and not reading.needs_special_tokens
        return SequenceText(
            self._tokenizer.detokenizer(skip_special_tokens=skips_special_tokens),
            StopStrings(stops),
            min_tokens=request.min_tokens,
        )


async def read_json(http: web.Request) -> bytes:
    """The body. Only JSON is taken, and only as it is: a page of another origin may post texts without being asked,
    and what is compressed may be a thousand times as large. Raises UnsupportedMediaType."""
    if http.content_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type should be application/json, not {http.content_type[:80]!r}")
    if http.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not read: send it as it is, without Content-Encoding")
    return await http.read()


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
