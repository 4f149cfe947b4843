"""Tool calls among words, in each format: whole, in any pieces, and where they are none."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frontend.parsing.formats import TOOL_FORMATS, guess_tool_format
from frontend.parsing.parts import Arguments, Call, Part, Reasoning, Text, joined
from frontend.parsing.reasoning import ReasoningParser
from frontend.parsing.tool_calls import ToolCallParser

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "get_weather", "a.b-c"]), ARGUMENTS), min_size=1, max_size=3)
WORDS = st.sampled_from(["", "Let me see.", "A < b, [x] and {y}: <tool", 'say "hi"'])


def read(format_name: str, pieces: Sequence[str]) -> list[Part]:
    parser = ToolCallParser(TOOL_FORMATS[format_name])
    return joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())


def calls_in(parts: Sequence[Part]) -> list[tuple[str, object]]:
    """Each call's name and arguments, once its parts are put together as a client does."""
    names = {part.number: part.name for part in parts if isinstance(part, Call)}
    texts = dict.fromkeys(names, "")
    for part in parts:
        if isinstance(part, Arguments):
            texts[part.number] += part.text
    return [(names[index], json.loads(texts[index])) for index in sorted(names)]


def words_in(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def written(format_name: str, words: str, calls: Sequence[tuple[str, object]]) -> str:
    """What a model of this format says."""
    if format_name == "hermes":
        told = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
        return "\n".join([words, *(f"<tool_call>\n{one}\n</tool_call>" for one in told)])
    if format_name == "mistral":
        told_list = [{"name": name, "arguments": arguments} for name, arguments in calls]
        return f"{words}[TOOL_CALLS]{json.dumps(told_list)}"
    told = [json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls]
    return ("<|python_tag|>" if words else "") + "; ".join(told)


@given(format_name=st.sampled_from(sorted(TOOL_FORMATS)), words=WORDS, calls=CALLS, cuts=st.lists(st.integers(0, 400)))
def test_calls_are_found_whole_however_the_text_is_cut(
    format_name: str, words: str, calls: list[tuple[str, object]], cuts: list[int]
):
    text = written(format_name, words, calls)
    ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    parts = read(format_name, pieces)
    assert calls_in(parts) == [(name, arguments) for name, arguments in calls]
    assert words_in(parts) == ("" if format_name == "llama3_json" else words)
    assert parts == read(format_name, [text])


@given(
    format_name=st.sampled_from(sorted(TOOL_FORMATS)),
    text=st.text(st.sampled_from('ab{}[]",: \n\\<>/_|'), max_size=40)
    | st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name": "f"', "}", " x", "{"]),
        max_size=6,
    ).map("".join),
    size=st.integers(1, 5),
)
@example(format_name="hermes", text="<tool_call>{}", size=1)
def test_any_text_is_read_the_same_in_pieces_and_whole(format_name: str, text: str, size: int):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(format_name, pieces) == read(format_name, [text])


@pytest.mark.parametrize(
    ("format_name", "text"),
    [
        ("hermes", "just words with a < and a <tool"),
        ("hermes", '<tool_call>{"no": "name"}</tool_call> x'),
        ("hermes", "<tool_call>not JSON</tool_call>"),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>{"na'),
        ("llama3_json", '{"city": "Paris"}'),
        ("llama3_json", ' {"city": '),
        ("llama3_json", "{not JSON}"),
        ("llama3_json", 'words {"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS] nothing of the kind"),
        ("mistral", "[TOOL_CAL"),
    ],
)
def test_what_is_no_call_is_words_as_the_model_wrote_it(format_name: str, text: str):
    parts = read(format_name, list(text))
    assert not calls_in(parts)
    assert words_in(parts).replace(" ", "") == text.replace(" ", "")


def test_arguments_go_on_before_they_are_complete():
    parser = ToolCallParser(TOOL_FORMATS["hermes"])
    assert parser.feed('Wait. <tool_call>{"name": "f", "arguments": {"a": [1') == [
        Text("Wait."),
        Call(0, "f"),
        Arguments(0, '{"a": [1'),
    ]
    assert parser.feed(", 2]}") == [Arguments(0, ", 2]}")]
    assert parser.feed("}") == []
    assert parser.feed("\n</tool_call>\n") == []
    assert parser.finish() == []


def test_a_closing_mark_that_is_cut_short_is_nobodys():
    assert read("hermes", ['<tool_call>{"name": "f"}</tool_ca']) == [Call(0, "f"), Arguments(0, "{}")]


def test_a_call_that_is_cut_short_keeps_what_came_of_it():
    assert read("hermes", ['<tool_call>{"name": "f", "arguments": {"a"']) == [Call(0, "f"), Arguments(0, '{"a"')]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        (
            '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
            [("f", {}), ("g", {})],
        ),
    ],
    ids=["arguments first", "no arguments", "arguments as text", "a list"],
)
def test_calls_as_models_vary_them(text: str, calls: list[tuple[str, object]]):
    assert calls_in(read("hermes", list(text))) == calls


def test_mistrals_newer_models_write_the_name_before_the_arguments():
    text = 'Yes. [TOOL_CALLS]f[ARGS]{"a": "}"}[TOOL_CALLS]g{"b": {}}'
    for pieces in ([text], list(text)):
        parts = read("mistral", pieces)
        assert calls_in(parts) == [("f", {"a": "}"}), ("g", {"b": {}})]
        assert words_in(parts) == "Yes."


def test_the_format_is_known_by_the_mark_that_the_template_writes():
    assert guess_tool_format("{{ '<tool_call>\\n' }}") == "hermes"
    assert guess_tool_format("[TOOL_CALLS]") == "mistral"
    assert guess_tool_format("<|python_tag|>") == "llama3_json"
    assert guess_tool_format("{{ messages }}") is None


# --- reasoning ---


def thought(pieces: Sequence[str], *, is_inside: bool = False) -> list[Part]:
    parser = ReasoningParser(ToolCallParser(TOOL_FORMATS["hermes"]), is_inside=is_inside)
    return joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())


@pytest.mark.parametrize(
    ("text", "is_inside", "parts"),
    [
        ("<think>\nHm, 2.\n</think>\n\nTwo.", False, [Reasoning("Hm, 2."), Text("Two.")]),
        ("Hm.</think> Two.", True, [Reasoning("Hm."), Text("Two.")]),
        ("<think>\n\n</think>\n\nTwo.", False, [Text("Two.")]),
        ("No <think> here.", False, [Text("No <think> here.")]),
        ("<think>cut sh", False, [Reasoning("cut sh")]),
        ("<thi", False, [Text("<thi")]),
        (
            '<think>f!</think><tool_call>{"name": "f", "arguments": {}}</tool_call>',
            False,
            [Reasoning("f!"), Call(0, "f"), Arguments(0, "{}")],
        ),
    ],
)
def test_reasoning_is_told_from_the_answer_in_any_pieces(text: str, is_inside: bool, parts: list[Part]):
    assert thought([text], is_inside=is_inside) == parts
    assert thought(list(text), is_inside=is_inside) == parts


@given(text=st.lists(st.sampled_from(["<think>", "</think>", " ", "a", "\n", "<", "<tool_call>"])).map("".join))
def test_reasoning_is_the_same_in_pieces_and_whole(text: str):
    assert thought(list(text)) == thought([text])
