"""What an answer's text means: words for the reader, reasoning, or a call of one of the client's tools. Pure.

Street: work. Between the detokenizer and the API: it decides once, as the text comes, and every API says it in its own
events. It knows no HTTP and no tokens.
"""

from __future__ import annotations

from frontend.parsing.forced_calls import CallList, NamedCall
from frontend.parsing.formats import TOOL_FORMATS, guess_tool_format
from frontend.parsing.parts import Arguments, Call, Parser, Part, Plain, Reasoning, Text, joined
from frontend.parsing.reasoning import ReasoningParser
from frontend.parsing.tool_calls import ToolCallParser

__all__ = [
    "TOOL_FORMATS",
    "Arguments",
    "Call",
    "CallList",
    "NamedCall",
    "Parser",
    "Part",
    "Plain",
    "Reasoning",
    "ReasoningParser",
    "Text",
    "ToolCallParser",
    "guess_tool_format",
    "joined",
]
