"""A chat's messages and tools to the model's prompt, and how its answer is to be read. Pure.

How a model writes tool calls and reasoning is seen from its chat template, unless the operator says it. A template that
knows no tools gets them in words (`frontend.api.tools`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from frontend.api.protocol import ChatRequest
from frontend.api.tools import NamedTool, decoded_calls, described, for_template
from frontend.errors import BadRequest
from frontend.parsing import (
    TOOL_FORMATS,
    CallList,
    NamedCall,
    Parser,
    Plain,
    ReasoningParser,
    ToolCallParser,
    guess_tool_format,
)
from frontend.text import ChatTemplateError, Hidden, Tokenizer

IN_WORDS: Final = "hermes"  # the format in which tools are described to a template that knows none
THINK: Final = "<think>"


class Rendered(NamedTuple):
    """A conversation as the template writes it. `token_ids` where the text alone does not tell them, because it holds
    what only looks like control tokens."""

    text: str
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer's text is read: by nobody, if `new_parser` is None."""

    new_parser: Callable[[], Parser] | None = None
    needs_special_tokens: bool = False


WORDS_ONLY: Final = Reading()


class Conversations:
    """For one model. `tool_format` is one of TOOL_FORMATS, `reasons` whether it thinks before it answers; None: as the
    template shows. `trusts_control_tokens`: what looks like one in a message is one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tool_format: str | None = None,
        reasons: bool | None = None,
        trusts_control_tokens: bool = False,
    ) -> None:
        template = tokenizer.chat_template
        self._tokenizer = tokenizer
        self._template = template
        self._trusts_control_tokens = trusts_control_tokens
        source = "" if template is None else template.source
        takes_tools = template is not None and template.takes_tools
        self._takes_tools = takes_tools
        guessed = guess_tool_format(source) if takes_tools else None
        self._format = TOOL_FORMATS[tool_format or guessed or IN_WORDS]
        self._reasons = THINK in source if reasons is None else reasons

    def may_hold_control_tokens(self, body: bytes) -> bool:
        """Whether a request's body seems to hold some, so that rendering it takes longer."""
        return self._tokenizer.control_tokens.is_in(body.decode("utf-8", "replace"))

    def render(self, request: ChatRequest, now: datetime) -> Rendered:
        """The prompt; raises BadRequest."""
        template = self._template
        if template is None:
            raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
        tools = request.tools if request.tool_choice != "none" else []
        messages: list[Mapping[str, Any]] = [
            decoded_calls(message.model_dump(exclude_none=True), f"messages[{number}]")
            for number, message in enumerate(request.messages)
        ]
        arguments = dict(request.chat_template_kwargs)
        if not self._takes_tools:
            messages = described(messages, tools)
        elif tools:
            arguments["tools"] = for_template(tools)
        hidden = Hidden()
        if not self._trusts_control_tokens:
            nonce = secrets.token_hex(8)
            written, hidden = self._tokenizer.control_tokens.hide([messages, arguments], nonce)
            messages, arguments = written
        try:
            text = template.render(
                messages, now=now, add_generation_prompt=request.add_generation_prompt, arguments=arguments
            )
        except ChatTemplateError as error:
            raise BadRequest(hidden.restore(str(error)), param="messages") from error
        return Rendered(text, self._tokenizer.encode_rendered(text, hidden) if hidden.by_word else None)

    def reading(self, request: ChatRequest, conversation: Rendered) -> Reading:
        """How the answer to this conversation is read."""
        if not request.may_call and not self._reasons:
            return WORDS_ONLY

        choice = request.tool_choice
        if isinstance(choice, NamedTool):
            return Reading(lambda: NamedCall(choice.function.name))
        if choice == "required":
            return Reading(CallList)

        def new_parser() -> Parser:
            then = ToolCallParser(self._format) if request.may_call else Plain()
            if not self._reasons:
                return then
            return ReasoningParser(then, is_inside=conversation.text.rstrip().endswith(THINK))

        return Reading(new_parser, needs_special_tokens=request.may_call and self._format.marks_are_special)
