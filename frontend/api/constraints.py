"""What a client asks an answer to look like, as one grammar in llguidance's words, checked before it is sent. Pure.

    response_format                     OpenAI's: json_object, json_schema
    structured_outputs, guided_*        vLLM's: json, regex, choice, grammar (Lark, as llguidance reads it)
    tool_choice                         required, or a named tool: calls as JSON, each with its tool's arguments

P10: llguidance follows references by recursion, and a stack that overflows ends the process. So how deep it can get is
bounded before: by all levels of everything that is referred to, since a cycle may lead through all of it.

JSON is written with ", " and ": " between its parts and no other white space: a model that may write as much of it as
it likes sometimes does so for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import unquote

from llguidance import LLMatcher
from pydantic import Field

from engine.wire import MAX_CONSTRAINT_CHARS
from frontend.api.strict import Strict
from frontend.api.tools import Tool
from frontend.errors import BadRequest

MAX_CHOICES: Final = 1024
MAX_DEPTH: Final = 768  # Measured: a stack of 8 MB overflows at 1,700 and more, in the schemas that take most of it
_LEVELS_OF_LARK: Final = ":([{"  # one of them for each level that the reader of a grammar can be in
_WRITTEN: Final[Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Schema = dict[str, Any] | str | bool


class JSONSchemaFormat(Strict):
    """What `response_format.json_schema` holds; `strict` asks for what is done anyway."""

    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`; one of them."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, max_length=MAX_CHOICES)
    grammar: str | None = None


class Formed(Strict):
    """The fields of a request that say which form its answer is to have."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=MAX_CHOICES)
    guided_grammar: str | None = None

    @property
    def has_form(self) -> bool:
        """Whether the answer may be asked to have a form, so that a grammar is to be made."""
        return not self.model_fields_set.isdisjoint(Formed.model_fields)

    def constraints(self) -> list[str]:
        """Every form that the answer is asked to have, as a grammar. Raises BadRequest."""
        older = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        found = [
            _of_response_format(self.response_format) if self.response_format else None,
            _of_structured_outputs(self.structured_outputs, "structured_outputs") if self.structured_outputs else None,
            _of_structured_outputs(StructuredOutputs.model_validate(older), "guided"),
        ]
        return [grammar for grammar in found if grammar is not None]

    def constraint(self) -> str | None:
        """The form that the answer is asked to have. Raises BadRequest."""
        found = self.constraints()
        if len(found) > 1:
            raise BadRequest("the answer is asked to have several forms at once", param="response_format")
        return found[0] if found else None


def _of_response_format(wanted: ResponseFormat) -> str | None:
    """None for text. Raises BadRequest."""
    match wanted.type:
        case "text":
            return None
        case "json_object":
            return _of_object(True, "response_format")
        case "json_schema":
            place = "response_format.json_schema"
            if wanted.json_schema is None or wanted.json_schema.json_schema is None:
                raise BadRequest(f"{place}.schema is missing", param=place)
            return _of_schema(wanted.json_schema.json_schema, f"{place}.schema")


def _of_structured_outputs(wanted: StructuredOutputs, place: str) -> str | None:
    """None where nothing is asked for. Raises BadRequest, also where more than one thing is."""
    asked = {name: value for name, value in wanted if name in _FORMS and value is not None}
    if wanted.json_object is False:
        del asked["json_object"]
    if len(asked) > 1:
        raise BadRequest(f"{place} asks for {len(asked)} things, an answer has one form", param=place)
    for name, value in asked.items():
        return _FORMS[name](value, f"{place}.{name.rstrip('_')}")
    return None


def of_named_tool(tools: Sequence[Tool], name: str) -> str:
    """The arguments of this tool, and nothing else. Raises BadRequest."""
    for number, tool in enumerate(tools):
        if tool.function.name == name:
            return _of_schema(_parameters(tool), f"tools[{number}].function.parameters")
    raise BadRequest(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")


def of_required_tools(tools: Sequence[Tool], *, are_parallel: bool) -> str:
    """A list of calls, of one or more tools. Raises BadRequest."""
    if not tools:
        raise BadRequest("tool_choice is required, and there are no tools", param="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _apart(tool, number)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    return _grammar_of(schema if are_parallel else schema | {"maxItems": 1}, "tools")


def _apart(tool: Tool, number: int) -> dict[str, Any]:
    """The tool's parameters with a name of their own, so that `#` in them goes on to mean them. Raises BadRequest."""
    place = f"tools[{number}].function.parameters"
    parameters = {key: value for key, value in _parameters(tool).items() if key not in ("$id", "id")}
    if not _checked_depth(parameters, place):
        raise BadRequest(f"{place} should refer to nothing but its own parts, by places in it", param=place)
    return parameters | {"$id": f"urn:tool:{number}"}


def _parameters(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _of_schema(schema: Any, place: str) -> str:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        _checked_depth(schema, place)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{place} is no JSON schema: {error}", param=place) from error
    return _grammar_of(schema, place)


def _grammar_of(schema: Any, place: str) -> str:
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_WRITTEN)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{place} is no JSON schema: {error}", param=place) from error
    return _checked(grammar, place)


def _checked_depth(schema: Any, place: str) -> bool:
    """Whether the schema refers to places in itself only. Raises BadRequest where it is too deep."""
    levels, is_local = _depth_of_schema(schema)
    if levels > MAX_DEPTH:
        raise BadRequest(f"{place}, with what it refers to, has more than {MAX_DEPTH} levels", param=place)
    return is_local


def _depth_of_schema(schema: Any) -> tuple[int, bool]:
    """The levels of the schema and of all that a `$ref` may lead to, more than llguidance can be in at once; and
    whether each leads to a place of the schema itself, which names of its parts (`$id`) would change."""
    depths: dict[int, int] = {}  # of each part, by its id
    references: set[str] = set()
    named: set[str] = set()

    def depth(part: Any) -> int:
        below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict):
            references.update(value for value in (part.get("$ref"),) if isinstance(value, str))
            named.update(value for value in (part.get("$id"), part.get("id")) if isinstance(value, str))
        found = depths[id(part)] = 1 + max(map(depth, below), default=0)
        return found

    whole = depth(schema)
    is_local = not named and all(reference.startswith("#") for reference in references)
    targets = [_referred(schema, reference) if is_local else schema for reference in references]
    return whole + sum(depths[id(target)] for target in targets), is_local


def _referred(schema: Any, reference: str) -> Any:
    """What a reference within the schema leads to: the whole of it where that cannot be told."""
    part = schema
    for name in unquote(reference).removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        try:
            part = part[int(name)] if isinstance(part, list) else part[name]
        except (LookupError, TypeError, ValueError):
            return schema
    return part


def _of_choice(choices: Sequence[str], place: str) -> str:
    if not choices or not all(choices):
        raise BadRequest(f"{place} should be a list of texts, none of them empty", param=place)
    told = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _checked(LLMatcher.grammar_from_lark(f"start: {told}"), place)


def _of_regex(regex: str, place: str) -> str:
    return _checked(LLMatcher.grammar_from_regex(regex), place)


def _of_grammar(lark: str, place: str) -> str:
    if sum(map(lark.count, _LEVELS_OF_LARK)) > MAX_DEPTH:
        raise BadRequest(f"{place} has more than {MAX_DEPTH} definitions and brackets", param=place)
    return _checked(LLMatcher.grammar_from_lark(lark), place)


def _of_object(_: bool, place: str) -> str:
    return _of_schema({"type": "object"}, place)


def _checked(grammar: str, place: str) -> str:
    """Raises BadRequest with llguidance's own words, which name the part."""
    if len(grammar) > MAX_CONSTRAINT_CHARS:
        raise BadRequest(f"{place} is longer than {MAX_CONSTRAINT_CHARS} characters", param=place)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        raise BadRequest(f"{place} is not supported: {' '.join(messages[0].split())[:300]}", param=place)
    return grammar


_FORMS: Final[Mapping[str, Callable[[Any, str], str]]] = MappingProxyType(
    {
        "json_": _of_schema,
        "json_object": _of_object,
        "regex": _of_regex,
        "choice": _of_choice,
        "grammar": _of_grammar,
    }
)
