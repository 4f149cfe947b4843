"""Tools that a client offers, and the calls and results of earlier turns, as chat templates want them. Pure.

A template that knows tools is given them as they are, as transformers does. For one that does not, and there are many
small models of that kind, they are described in a system message in Hermes' format, and the calls and results of
earlier turns are written out in the same words: the format that most models have seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from frontend.api.strict import Strict
from frontend.errors import BadRequest

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128  # of one message
Message = Mapping[str, Any]

_PREAMBLE: Final = """You may call functions to help with the answer. They are described here as JSON:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


class Function(Strict):
    """What a tool does; `parameters` is the JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """One tool that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class _Named(Strict):
    name: str


class NamedTool(Strict):
    """`tool_choice` of one tool, which is then called in any case."""

    type: Literal["function"] = "function"
    function: _Named


class CalledFunction(Strict):
    """What an earlier turn called; `arguments` is JSON."""

    name: str
    arguments: str = "{}"


class CalledTool(Strict):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
Calls = Annotated[list[CalledTool], Field(max_length=MAX_CALLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as transformers hands them to a template."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def decoded_calls(message: Message, place: str) -> Message:
    """A message whose calls have their arguments as values, as templates expect. Raises BadRequest."""
    if "tool_calls" not in message:
        return message
    decoded = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            param = f"{place}.tool_calls[{number}].function.arguments"
            raise BadRequest(f"{param} should be a JSON object as text", param=param)
        decoded.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": decoded}


def described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation for a template that knows no tools: they, their calls and results are told in words."""
    told = list(map(_in_words, messages))
    if not tools:
        return told
    lines = "\n".join(json.dumps(tool) for tool in for_template(tools))
    preamble = _PREAMBLE.format(tools=lines)
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{preamble}"}, *told[1:]]
    return [{"role": "system", "content": preamble}, *told]


def _in_words(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    told = [f"<tool_call>\n{json.dumps(function)}\n</tool_call>" for function in functions]
    content = message.get("content")
    return {"role": message["role"], "content": "\n".join([*([content] if content else []), *told])}
