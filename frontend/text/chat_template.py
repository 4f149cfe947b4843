"""A conversation to the text the model was trained on, by the model's own Jinja template. Pure.

Templates come with the model and run in a sandbox, each rendering within a budget (`bounded_jinja`). They see what
transformers gives them: `messages`, `add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, the
`tojson` filter and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from frontend.text.bounded_jinja import BUDGET, BoundedEnvironment, Budget


class ChatTemplateError(ValueError):
    """The template cannot be compiled, or does not take this conversation; the text is for the client."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


MAX_SOURCE: Final = 2**20  # characters of a template; published ones have up to 20,000

# What an expression of a template can raise on a conversation it did not expect.
_RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """One compiled template. Raises ChatTemplateError when `source` is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = BoundedEnvironment(
            {"tojson": _tojson},
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationBlock],
        )
        environment.globals["raise_exception"] = _raise_exception
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        self.source = source
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except (*_RENDER_ERRORS, SyntaxError, RecursionError, MemoryError) as error:  # of Python's compiler, too
            raise ChatTemplateError(f"the chat template is broken: {error or type(error).__name__}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `arguments` are the template's own switches, and win over the special tokens."""
        names = self._special_tokens | dict(arguments or {})
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt, "strftime_now": now.strftime}
        names[BUDGET] = Budget.of([messages, arguments])
        try:
            return self._template.render(names)
        except (*_RENDER_ERRORS, RecursionError, MemoryError) as error:
            raise ChatTemplateError(f"the chat template does not take this conversation: {error}") from error
