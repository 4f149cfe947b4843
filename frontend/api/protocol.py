"""What clients send to /v1/completions and /v1/chat/completions, checked; every fault names the parameter. Pure.

Names and meanings are OpenAI's, and vLLM's where OpenAI has none. Types are strict, `null` means the default, fields
nobody defines are ignored, and parameters that are known but not supported are refused, unless their value asks for
nothing. A model's `generation_config.json` is not applied: the defaults below hold for every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from engine.wire import MAX_BIAS, MAX_LOGPROBS, SamplingParams, Submit, default, limits
from frontend.errors import BadRequest

MAX_N: Final = 128
MAX_SEQUENCES: Final = 2048  # prompts times n, in one HTTP request
MAX_STOPS: Final = 16
MAX_LIST: Final = 1024  # stop_token_ids, logit_bias
DEFAULT_COMPLETION_TOKENS: Final = 16

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or many, as text or token ids, always as a list of them."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("should be a text, a list of texts, a list of token ids or a list of such lists")
    prompts: list[Prompt] = [value] if value and type(value[0]) is int else value
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
    return "\n".join(map(_part, value))


def _part(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("should hold parts with a type")
    if part["type"] != "text":
        raise ValueError(f"a part of type {part['type'][:40]!r} is not supported, this model reads text only")
    if not isinstance(part.get("text"), str):
        raise ValueError("a text part should have a text")
    return str(part["text"])


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


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


AT_RANDOM: Final = -1  # a seed that asks for none, as many clients say it


class StreamOptions(_Model):
    """`include_usage`: one last chunk that says how many tokens there were."""

    include_usage: bool = False


class GenerationRequest(_Model):
    """What both APIs share."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = Field(
        [], max_length=MAX_STOPS
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = _as_declared("max_tokens", default=None)
    temperature: float = _as_declared("temperature")
    top_p: float = _as_declared("top_p")
    presence_penalty: float = _as_declared("presence_penalty")
    frequency_penalty: float = _as_declared("frequency_penalty")
    seed: int | None = _as_declared("seed")
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias)] = {}
    # vLLM's
    top_k: int = _as_declared("top_k", ge=-1)
    min_p: float = _as_declared("min_p")
    repetition_penalty: float = _as_declared("repetition_penalty")
    min_tokens: int = _as_declared("min_tokens")
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field([], max_length=MAX_LIST)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = _as_declared("priority", Submit)
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

    def check_supported(self) -> None:
        """Raise BadRequest for a parameter that is known, asks for something, and is not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in self.UNSUPPORTED and value not in self.UNSUPPORTED[name]:
                raise BadRequest(f"{name} is not supported", param=name, code="unsupported_parameter")

    def default_max_tokens(self, room: int) -> int:
        """For a client that does not say; `room` is what the context leaves."""
        return room

    def sampling(self, *, num_prompt_tokens: int, max_model_len: int, vocab_size: int) -> SamplingParams:
        """One sequence's parameters; with n > 1 whoever submits gives sequence i the seed `seed + i`."""
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise BadRequest(
                f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer: "
                f"the model's context is {max_model_len} tokens",
                param=self.PROMPT_PARAM,
                code="context_length_exceeded",
            )
        max_tokens = self.wanted_max_tokens
        if max_tokens is None:
            max_tokens = self.default_max_tokens(room)
        if max_tokens > room:
            raise BadRequest(
                f"max_tokens is too large: {max_tokens}. The model's context is {max_model_len} tokens "
                f"and the prompt has {num_prompt_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if self.min_tokens > max_tokens:
            raise BadRequest(f"min_tokens is {self.min_tokens}, more than max_tokens: {max_tokens}", param="min_tokens")
        check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        check_token_ids(self.logit_bias, vocab_size, "logit_bias")
        return self._sampling(max_tokens)

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
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "use_beam_search",
        "bad_words",
        "allowed_token_ids",
        "prompt_logprobs",
        "truncate_prompt_tokens",
        "prompt_embeds",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "kv_transfer_params",
    ),
    _OFF,
) | {"response_format": (*_OFF, {"type": "text"})}


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = _as_declared("logprobs")
    best_of: int | None = Field(None, ge=1)

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED | {"suffix": _OFF}

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def default_max_tokens(self, room: int) -> int:
        return min(DEFAULT_COMPLETION_TOKENS, room)

    def check_supported(self) -> None:
        super().check_supported()
        if self.echo and self.logprobs is not None:
            raise BadRequest("echo with logprobs is not supported", param="echo", code="unsupported_parameter")
        if self.best_of is not None and self.best_of != self.n:
            raise BadRequest(f"best_of other than n is not supported: {self.best_of}", param="best_of")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise BadRequest(f"{len(self.prompt)} prompts times n are more than {MAX_SEQUENCES}", param="prompt")


class Message(_Model):
    """One turn of a conversation; fields beside these two (`name`) go to the template as they are."""

    role: str = Field(min_length=1)
    content: Annotated[str, PlainValidator(_content)] = ""


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = _as_declared("max_tokens", default=None)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # the template writes them
    chat_template_kwargs: dict[str, Any] = {}

    PROMPT_PARAM: ClassVar[str] = "messages"
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED | {
        "tools": _OFF,
        "tool_choice": (*_OFF, "none", "auto"),
        "functions": _OFF,
        "function_call": (*_OFF, "none", "auto"),
        "modalities": (*_OFF, ["text"]),
        "audio": _OFF,
        "prediction": _OFF,
        "web_search_options": (None,),
        "reasoning_effort": (*_OFF, "none"),
        "chat_template": _OFF,
        "documents": _OFF,
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

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        for number, message in enumerate(self.messages):
            for name in ("tool_calls", "function_call", "audio"):
                if (message.model_extra or {}).get(name) not in _OFF:
                    raise BadRequest(f"{name} is not supported", param=f"messages[{number}].{name}")


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """The body as a request of this kind; raises BadRequest."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error) from None
    request.check_supported()
    return request


def check_token_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raise BadRequest for an id outside the vocabulary."""
    for token in token_ids:
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
