"""Which forms an answer may be asked to have, and what is refused, with the part's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from frontend.api.protocol import ChatRequest, CompletionRequest, Terms
from frontend.errors import BadRequest

BYTES = LLTokenizer("byte")  # a token for each byte
TO_A = {"$ref": "#/$defs/a"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
NO_ARGUMENTS = {"type": "function", "function": {"name": "g"}}
NAMED = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": '{"type": "string"}'}},
    {"structured_outputs": {"json_object": True}},
    {"structured_outputs": {"regex": "a+b"}},
    {"structured_outputs": {"choice": ["yes", 'no "maybe"']}},
    {"structured_outputs": {"grammar": 'start: "a" | "b" start'}},
    {"guided_json": SCHEMA},
    {"guided_regex": "[0-9]{3}"},
    {"guided_choice": ["a"]},
    {"guided_grammar": 'start: "a"'},
]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_one_grammar_in_both_apis(form: dict[str, Any]):
    for request in (chat(**form), completion(**form)):
        assert request.has_form
        assert request.constraint()


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"tool_choice": "auto"}]
)
def test_what_asks_for_no_form_has_none(fields: dict[str, Any]):
    assert chat(**fields).constraint() is None


def test_calls_are_forced_by_their_tools_arguments():
    assert chat(tools=[TOOL], tool_choice=NAMED).constraint() == chat(structured_outputs={"json": SCHEMA}).constraint()
    several = chat(tools=[TOOL, NO_ARGUMENTS], tool_choice="required").constraint()
    one = chat(tools=[TOOL, NO_ARGUMENTS], tool_choice="required", parallel_tool_calls=False).constraint()
    assert several is not None
    assert one is not None
    assert "maxItems" in one
    assert "maxItems" not in several


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "objec"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "no grammar"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": False}, "guided.json"),
        ({"tool_choice": "required"}, "tool_choice"),
        *(
            (
                {
                    "tools": [{"function": {"name": "f", "parameters": {"$defs": wrong} | TO_A}}],
                    "tool_choice": "required",
                },
                "tools",
            )
            for wrong in ([1], None, "x")
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ],
)
def test_a_form_that_is_not_supported_is_refused_by_its_part(fields: dict[str, Any], param: str):
    with pytest.raises(BadRequest) as caught:
        chat(**fields).constraint()
    assert caught.value.param == param
    assert len(str(caught.value)) < 500


def tool(name: str, **schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"} | schema}}


def test_what_a_tool_refers_to_is_its_own():
    """Two tools define X, each in its way, and a tree of the third is a tree and no list of calls."""
    to_x = {"x": {"$ref": "#/$defs/X"}}
    tools = [tool(name, properties=to_x, required=["x"], **{"$defs": {"X": {"const": name}}}) for name in ("a", "b")]
    tree = tool("t", properties={"below": {"$ref": "#"}}, additionalProperties=False)
    grammar = chat(tools=[*tools, tree], tool_choice="required").constraint()
    assert grammar is not None
    for name, arguments, is_taken in [
        ("a", {"x": "a"}, True),
        ("b", {"x": "b"}, True),
        ("b", {"x": "a"}, False),
        ("t", {"below": {"below": {}}}, True),
        ("t", {"below": [{"name": "t", "arguments": {}}]}, False),
    ]:
        assert accepts(grammar, json.dumps([{"name": name, "arguments": arguments}])) == is_taken


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


@pytest.mark.parametrize("part", [{"$ref": "urn:tool:1"}, {"$id": "urn:tool:1", "$ref": "#"}])
def test_a_tool_refers_to_no_other(part: dict[str, Any]):
    with pytest.raises(BadRequest, match="own parts"):
        chat(tools=[tool("a", properties={"x": part}), tool("b")], tool_choice="required").constraint()


def test_a_form_needs_the_answers_end():
    terms = Terms(max_model_len=64, vocab_size=300, max_sequences=256)
    request = chat(guided_regex="a", ignore_eos=True)
    with pytest.raises(BadRequest, match="ignore_eos"):
        request.sampling(1, terms, request.constraint())


def chained(num_definitions: int, num_levels: int) -> dict[str, Any]:
    """A schema in which each definition refers to the next, from within so many levels."""
    definitions: dict[str, Any] = {str(num_definitions): {"type": "string"}}
    for number in range(num_definitions):
        part: dict[str, Any] = {"$ref": f"#/$defs/{number + 1}"}
        for _ in range(num_levels):
            part = {"items": part}
        definitions[str(number)] = part
    return {"$ref": "#/$defs/0", "$defs": definitions}


TOO_DEEP: list[dict[str, Any]] = [
    {"guided_json": chained(4000, 0)},
    {"guided_json": chained(100, 100)},
    {"guided_json": {"$defs": {str(n): {} for n in range(101)}, "items": {"$id": "urn:x"} | chained(100, 100)}},
    {"guided_grammar": "start: r0\n" + "".join(f"r{n}:r{n + 1}\n" for n in range(4000)) + 'r4000: "a"'},
    {"guided_grammar": "start: A0\n" + "".join(f"A{n}:A{n + 1}\n" for n in range(4000)) + 'A4000: "a"'},
]


@pytest.mark.parametrize("form", TOO_DEEP)
def test_what_would_overflow_the_stack_is_refused_before_it_is_followed(form: dict[str, Any]):
    """Without the bound these end the process, and the tests with it."""
    with pytest.raises(BadRequest, match="more than 768"):
        chat(**form).constraint()


def test_schemas_may_refer_to_themselves_and_to_much():
    tree = {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#"}}}}
    many = {f"d{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{(n + 1) % 100}"}}} for n in range(100)}
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
    for schema in (tree, {"$ref": "#/$defs/d0", "$defs": many}, wide, chained(10, 20)):
        assert chat(guided_json=schema).constraint()
