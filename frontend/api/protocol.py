"""What clients send to /v1/completions and /v1/chat/completions, checked; every fault names the parameter. Pure.

Names and meanings are OpenAI's, and vLLM's where OpenAI has none. Types are strict, `null` means the default, fields
nobody defines are ignored. A field that is known is honoured, or it is one of `Hints`, or it is refused by its name
unless its value asks for nothing. A model's `generation_config.json` is not applied: the defaults below hold for every
model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError

from engine.wire import MAX_BIAS, MAX_LOGPROBS, MAX_SALT_CHARS, SamplingParams, Submit, default, limits
from frontend.api.constraints import Formed, of_named_tool, of_required_tools
from frontend.api.strict import MAX_FIELDS, Strict
from frontend.api.tools import Calls, NamedTool, ToolChoice, Tools
from frontend.errors import BadRequest

MAX_PROMPTS: Final = 2048
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_LIST: Final = 1024  # stop_token_ids, logit_bias, parts of a message
MAX_MESSAGES: Final = 16_384
# Commas in a body, those in texts included: no more values than this are ever made of one. Measured: nine of the worst
# bodies within 4 MiB are refused within 0.07 s, and another client waits 45 ms at the longest; without it, seconds.
MAX_COMMAS: Final = 200_000
DEFAULT_COMPLETION_TOKENS: Final = 16

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or many, as text or token ids, always as a list of them."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("should be a text, a list of texts, a list of token ids or a list of such lists")
    prompts: list[Prompt] = [value] if value and type(value[0]) is int else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"should hold at most {MAX_PROMPTS} prompts, not {len(prompts)}")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_ids and not isinstance(prompt, str):
            raise ValueError("should hold texts or lists of token ids only")
        if not prompt:
            raise ValueError("should not be empty")
    if not prompts:
        raise ValueError("should not be empty")
    return prompts


def _content(value: Any) -> str:
    """A message's text; parts are joined by line ends, as vLLM does."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("should be a text or a list of text parts")
    if len(value) > MAX_LIST:
        raise ValueError(f"should hold at most {MAX_LIST} parts, not {len(value)}")
    return "\n".join(map(_part, value))


def _part(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("should hold parts with a type")
    if part["type"] != "text":
        raise ValueError(f"a part of type {part['type'][:40]!r} is not supported, this model reads text only")
    if not isinstance(part.get("text"), str):
        raise ValueError("a text part should have a text")
    return str(part["text"])


def _whole(value: Any) -> Any:
    """8.0 is 8, as JSON of other languages says it."""
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _logit_bias(value: Any) -> dict[int, float]:
    """Keys are token ids, in JSON as text."""
    if not isinstance(value, dict) or len(value) > MAX_LIST:
        raise ValueError(f"should be an object of at most {MAX_LIST} token ids and their biases")
    found = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"should have token ids as keys, not {key[:40]!r}")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"should have biases from {-MAX_BIAS:g} to {MAX_BIAS:g}, not {bias!r}")
        found[int(key)] = float(bias)
    return found


def _as_declared(name: str, kind: type = SamplingParams, **other: Any) -> Any:
    """Default and bounds as the engine checks them; `other` where a client may say more than the engine is told."""
    return Field(**({"default": default(kind, name)} | limits(kind, name) | other))


AT_RANDOM: Final = -1  # a seed that asks for none, as many clients say it


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a deployment lets one request ask for. `vocab_size` is the model's, which may be padded beyond the
    tokenizer's; `max_prompt_tokens` is what an iteration takes where prompts are not computed in parts; `always_usage`:
    every stream ends with its usage, asked for or not."""

    max_model_len: int
    vocab_size: int
    max_sequences: int
    max_prompt_tokens: int | None = None
    allows_priority: bool = False
    always_usage: bool = False


class StreamOptions(Strict):
    """`include_usage`: one last chunk that says how many tokens there were. `continuous_usage_stats`: with it, every
    other chunk says how many there are."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Any = None  # a hint, like those below


class Hints(Strict):
    """Fields that no answer depends on: accepted whatever they say, and read by nobody."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    session_id: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    include_reasoning: Any = None
    verbosity: Any = None
    parallel_tool_calls: Any = None
    media_io_kwargs: Any = None
    return_mm_kwargs: Any = None


class GenerationRequest(Hints, Formed):
    """What both APIs share."""

    model: str | None = None
    n: Whole = _as_declared("n", Submit)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], BeforeValidator(_listed)] = (
        Field([], max_length=MAX_STOPS)
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Whole | None = _as_declared("max_tokens", default=None)
    temperature: float = _as_declared("temperature")
    top_p: float = _as_declared("top_p")
    presence_penalty: float = _as_declared("presence_penalty")
    frequency_penalty: float = _as_declared("frequency_penalty")
    seed: Whole | None = _as_declared("seed")
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias)] = Field({})
    # vLLM's
    top_k: Whole = _as_declared("top_k", ge=-1)
    min_p: float = _as_declared("min_p")
    repetition_penalty: float = _as_declared("repetition_penalty")
    min_tokens: Whole = _as_declared("min_tokens")
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field([], max_length=MAX_LIST)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: Whole = _as_declared("priority", Submit)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_CHARS)
    add_special_tokens: bool = True

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # name: values that ask for nothing
    PROMPT_PARAM: ClassVar[str] = "prompt"

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives a token, None for no log probabilities."""
        raise NotImplementedError

    @property
    def wanted_max_tokens(self) -> int | None:
        """What the client asks for, if it does."""
        return self.max_tokens

    @property
    def num_sequences(self) -> int:
        """Prompts times n."""
        return self.n

    def check_supported(self) -> None:
        """Raise BadRequest for a parameter that is known, asks for something, and is not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in self.UNSUPPORTED and value not in self.UNSUPPORTED[name]:
                raise BadRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.stream_options.model_fields_set and not self.stream:
            raise BadRequest("stream_options is for streams: it needs stream to be true", param="stream_options")

    def check_terms(self, terms: Terms) -> None:
        """Raise BadRequest for what this deployment does not offer."""
        if self.priority and not terms.allows_priority:
            message = f"priority is {self.priority}; other than 0 it needs --scheduling-policy priority on the server"
            raise BadRequest(message, param="priority")
        if self.num_sequences > terms.max_sequences:
            message = f"prompts times n are {self.num_sequences} sequences, more than the {terms.max_sequences}"
            param = "n" if self.n > 1 else self.PROMPT_PARAM
            raise BadRequest(f"{message} that one request may ask for", param=param)

    def default_max_tokens(self, room: int) -> int:
        """For a client that does not say; `room` is what the context leaves."""
        return room

    def sampling(self, num_prompt_tokens: int, terms: Terms, constraint: str | None = None) -> SamplingParams:
        """The parameters of a prompt's sequences; raises BadRequest where they do not fit the prompt or the model."""
        max_model_len = terms.max_model_len
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise too_long(f"your prompt has {num_prompt_tokens} tokens", max_model_len, self.PROMPT_PARAM)
        if terms.max_prompt_tokens is not None and num_prompt_tokens > terms.max_prompt_tokens:
            message = f"your prompt has {num_prompt_tokens} tokens; without chunked prefill, {terms.max_prompt_tokens}"
            raise BadRequest(f"{message} are computed at once", param=self.PROMPT_PARAM)
        max_tokens = self.wanted_max_tokens
        if max_tokens is None:
            max_tokens = self.default_max_tokens(room)
        if max_tokens > max_model_len:
            raise BadRequest(
                f"This model's maximum context length is {max_model_len} tokens. However, you asked for {max_tokens} "
                f"tokens (max_tokens)",
                param="max_tokens",
                code="context_length_exceeded",
            )
        max_tokens = min(max_tokens, room)  # as vLLM does: a conversation that grows need not ask for less and less
        if self.min_tokens > max_tokens:
            raise BadRequest(f"min_tokens is {self.min_tokens}, more than max_tokens: {max_tokens}", param="min_tokens")
        check_token_ids(self.stop_token_ids, terms.vocab_size, "stop_token_ids")
        check_token_ids(self.logit_bias, terms.vocab_size, "logit_bias")
        if constraint is not None and self.ignore_eos:
            message = "an answer of a given form ends where it is complete: not with ignore_eos"
            raise BadRequest(message, param="ignore_eos")
        return replace(self._sampling(max_tokens), constraint=constraint)

    def _sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed == AT_RANDOM else self.seed,
            logit_bias=tuple(self.logit_bias.items()),
            logprobs=self.wanted_logprobs,
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids)),
            ignore_eos=self.ignore_eos,
        )


# Values that ask for nothing, so that clients which always send a parameter are served.
_OFF: Final[tuple[Any, ...]] = (None, False, 0, "", [], {})
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = dict.fromkeys(
    (
        "logits_processors",
        "use_beam_search",
        "bad_words",
        "allowed_token_ids",
        "truncate_prompt_tokens",
        "prompt_embeds",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_token_offsets",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "watermarking",
        "repetition_detection",
        "routed_experts_prompt_start",
        "truncation_side",
        "moderation",
    ),
    _OFF,
) | {
    "logprob_token_ids": (None,),
    "prompt_logprobs": (None,),  # 0 asks for those of the prompt's own tokens
    "length_penalty": (None, 1),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
    "thinking_token_budget": (None, -1),
    "request_id": (None,),
}


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    max_tokens: Whole | None = _as_declared("max_tokens", default=None, ge=0)
    echo: bool = False
    logprobs: Whole | None = _as_declared("logprobs")
    best_of: Whole | None = Field(None, ge=1)

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED | {"suffix": _OFF}

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_sequences(self) -> int:
        return len(self.prompt) * self.n

    @property
    def asks_for_echo_alone(self) -> bool:
        """Whether the prompt is all that is to be answered."""
        return self.max_tokens == 0

    def default_max_tokens(self, room: int) -> int:
        return min(DEFAULT_COMPLETION_TOKENS, room)

    def _sampling(self, max_tokens: int) -> SamplingParams:
        if self.asks_for_echo_alone:  # as in vLLM an engine computes the prompt, and the least that it makes is a token
            return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        return super()._sampling(max_tokens)

    def check_supported(self) -> None:
        super().check_supported()
        if self.echo and self.logprobs is not None:
            raise BadRequest("echo with logprobs is not supported", param="echo", code="unsupported_parameter")
        if self.asks_for_echo_alone and not self.echo:
            raise BadRequest("max_tokens is 0, which is for echo: true alone", param="max_tokens")
        if self.best_of is not None and self.best_of != self.n:
            raise BadRequest(f"best_of other than n is not supported: {self.best_of}", param="best_of")


class Message(Strict):
    """One turn of a conversation; fields beside these (`name`, `tool_call_id`) go to the template as they are."""

    role: str = Field(min_length=1)
    content: Annotated[str, PlainValidator(_content)] = ""
    tool_calls: Calls | None = None


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Whole | None = _as_declared("max_tokens", default=None)
    logprobs: bool = False
    top_logprobs: Whole = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # the template writes them
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=MAX_FIELDS)
    tools: Tools = Field([])
    tool_choice: ToolChoice = "auto"

    PROMPT_PARAM: ClassVar[str] = "messages"
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED | {
        "functions": _OFF,
        "function_call": (*_OFF, "none", "auto"),
        "modalities": (*_OFF, ["text"]),
        "audio": _OFF,
        "prediction": _OFF,
        "web_search_options": (None,),
        "chat_template": _OFF,
        "documents": _OFF,
        "return_prompt_text": _OFF,
        "continue_final_message": _OFF,
        "echo": _OFF,
        "mm_processor_kwargs": _OFF,
    }

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def constraints(self) -> list[str]:
        found = super().constraints()
        if isinstance(self.tool_choice, NamedTool):
            found.append(of_named_tool(self.tools, self.tool_choice.function.name))
        elif self.tool_choice == "required":
            found.append(of_required_tools(self.tools, are_parallel=self.parallel_tool_calls is not False))
        return found

    @property
    def has_form(self) -> bool:
        return super().has_form or self.tool_choice not in ("none", "auto")

    @property
    def may_call(self) -> bool:
        """Whether the answer may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        for number, turn in enumerate(self.messages):
            for name in ("function_call", "audio"):
                if (turn.model_extra or {}).get(name) not in _OFF:
                    raise BadRequest(f"{name} is not supported", param=f"messages[{number}].{name}")


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """The body as a request of this kind; raises BadRequest."""
    if body.count(b",") > MAX_COMMAS:
        raise BadRequest(f"the body has more than {MAX_COMMAS} commas")
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error) from None
    request.check_supported()
    return request


def too_long(found: str, max_model_len: int, param: str) -> BadRequest:
    """A prompt that leaves no room for an answer; in OpenAI's words, which routers and clients look for."""
    return BadRequest(
        f"This model's maximum context length is {max_model_len} tokens. However, {found}: please shorten it",
        param=param,
        code="context_length_exceeded",
    )


def check_token_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    """Raise BadRequest for an id outside the vocabulary."""
    for token in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token < vocab_size:
            raise BadRequest(f"{param} holds {token}, the vocabulary has {vocab_size} tokens", param=param)


def _bad_request(error: ValidationError) -> BadRequest:
    """The first fault, in OpenAI's words: `messages[0].role: Field required`."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not first["loc"]:
        return BadRequest("the body is no JSON object")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    shown = first["type"] not in ("missing", "value_error")
    got = f", not {repr(first['input'])[:80]}" if shown else ""
    return BadRequest(f"{param}: {message}{got}", param=param)
