"""How models write tool calls: one row a format, and which of them a chat template was written for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One format. `opening` begins calls and `closing` ends them, if it has an end of its own."""

    opening: str
    closing: str | None = None
    starts_bare: bool = False  # an answer may begin with a call, without the mark
    has_bare_names: bool = False  # a call may be its name, then its arguments
    marks_are_special: bool = False  # special tokens, which are left out of texts otherwise


# Names as vLLM's --tool-call-parser has them.
TOOL_FORMATS: Final[Mapping[str, ToolFormat]] = MappingProxyType(
    {
        "hermes": ToolFormat(opening="<tool_call>", closing="</tool_call>"),
        "llama3_json": ToolFormat(opening="<|python_tag|>", starts_bare=True, marks_are_special=True),
        "mistral": ToolFormat(opening="[TOOL_CALLS]", has_bare_names=True, marks_are_special=True),
    }
)


def guess_tool_format(chat_template: str) -> str | None:
    """The format whose mark the template writes; None if it writes none."""
    for name, shape in TOOL_FORMATS.items():
        if shape.opening in chat_template:
            return name
    return None
