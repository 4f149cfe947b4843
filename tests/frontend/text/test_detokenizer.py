"""Token ids to text as they come: whole characters, stop strings, and the tokens that belong to the answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frontend.text.detokenizer import Detokenizer, SequenceText, Stops, StopStrings
from frontend.text.tokenizer import load_tokenizer
from tests.frontend.small_tokenizers import END, START, byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer(add_space_prefix=False)
CHARACTER_BYTES = st.sampled_from([*"aé中😀\ufffd".encode(), 0xFF, 0xC3, 0xF0, 0x80, END, START, 258])


def pieces(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.append(token) for token in token_ids), detokenizer.flush()]


@given(token_ids=st.lists(st.integers(0, 259) | CHARACTER_BYTES, max_size=40), skip=st.booleans())
@example(token_ids=list("😀".encode())[:3], skip=True)
@example(token_ids=[0xE2, END, 0x82, 0xAC], skip=True)
def test_the_pieces_joined_are_the_whole_text(token_ids: list[int], skip: bool):
    said = pieces(BYTE_LEVEL.detokenizer(skip_special_tokens=skip), token_ids)
    assert "".join(said) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert "".join(said) == BYTE_LEVEL._tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(token_ids=st.lists(st.integers(0, 267), max_size=40))
def test_the_pieces_joined_are_the_whole_text_with_byte_fallback(token_ids: list[int]):
    said = pieces(SENTENCEPIECE.detokenizer(), token_ids)
    assert "".join(said) == SENTENCEPIECE.decode(token_ids)


@given(text=st.text(max_size=30))
def test_no_piece_holds_half_a_character(text: str):
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
        said = [detokenizer.append(byte + (3 if tokenizer is SENTENCEPIECE else 0)) for byte in text.encode()]
        assert "".join(said) == text  # so no U+FFFD that the text has not
        assert detokenizer.flush() == ""


def test_a_character_over_several_tokens_comes_with_its_last_one():
    assert pieces(BYTE_LEVEL.detokenizer(), list("a😀b".encode())) == ["a", "", "", "", "😀", "b", ""]


def test_a_character_cut_short_at_the_end_is_one_replacement():
    assert pieces(BYTE_LEVEL.detokenizer(), [ord("a"), 0xF0, 0x9F, 0x98]) == ["a", "", "", "", "\ufffd"]


def test_the_pieces_joined_are_the_whole_text_of_the_default_model(default_model: Path):
    tokenizer = load_tokenizer(str(default_model))

    @given(token_ids=st.lists(st.integers(0, 49151), max_size=30))
    def check(token_ids: list[int]) -> None:
        said = pieces(tokenizer.detokenizer(), token_ids)
        assert "".join(said) == tokenizer._tokenizer.decode(token_ids)

    check()


def test_a_token_costs_the_same_at_the_end_of_a_long_text():
    """Even where no text comes out at all: 40,000 tokens of one never-ending broken character."""

    def seconds(num_tokens: int) -> float:
        sequence = SequenceText(BYTE_LEVEL.detokenizer(), StopStrings(Stops(["\ufffd" * 20 + "x"])))
        started = time.process_time()
        for _ in range(num_tokens):
            sequence.append(0xFF)
        return time.process_time() - started

    seconds(1000)
    assert seconds(40_000) < 40 * seconds(4_000)  # 10 times if linear, 100 times if quadratic


# --- stop strings ---


def run(stops: list[str], parts: list[str], **options: bool) -> tuple[list[str], bool]:
    found = StopStrings(Stops(stops, **options))
    shown = []
    for part in parts:
        text, stopped = found.append(part)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, found.flush()], False


def test_an_end_that_may_begin_a_stop_string_waits():
    assert run(["stop"], ["a s", "t", "o", "re", "."]) == (["a ", "", "", "store", ".", ""], False)


def test_a_stop_string_is_found_across_pieces_and_not_shown():
    assert run(["stop"], ["now st", "op here"]) == (["now ", ""], True)


def test_a_stop_string_is_shown_where_asked_for_but_nothing_after_it():
    assert run(["stop"], ["now st", "op here"], includes_stop=True) == (["now ", "stop"], True)


def test_what_was_held_back_comes_at_the_end():
    assert run(["END"], ["the E", "N"]) == (["the ", "", "EN"], False)


def test_of_two_stop_strings_the_one_that_begins_first_counts():
    assert run(["world", "lo w"], ["hello world"]) == (["hel"], True)


def test_a_stop_string_that_overlaps_itself_is_found():
    assert run(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], True)


texts = st.text(st.sampled_from("ab|"), max_size=12)


@given(
    parts=st.lists(texts, max_size=8),
    stops=st.lists(st.text(st.sampled_from("ab|"), min_size=1, max_size=4), max_size=3),
    includes=st.booleans(),
)
def test_what_is_shown_is_the_text_up_to_its_first_stop_string(parts: list[str], stops: list[str], includes: bool):
    shown, stopped = run(stops, parts, includes_stop=includes)
    assert stopped == any(stop in "".join(parts) for stop in stops)
    if not stopped:
        assert "".join(shown) == "".join(parts)
        return
    so_far = "".join(parts[: len(shown)])
    earliest = min((so_far.find(stop), stop) for stop in stops if stop in so_far)
    assert "".join(shown) == so_far[: earliest[0] + (len(earliest[1]) if includes else 0)]
    assert not any(stop in "".join(parts[: len(shown) - 1]) for stop in stops)  # and no later than it could be


@given(parts=st.lists(texts, max_size=8), stop=st.text(st.sampled_from("ab|"), min_size=1, max_size=4))
def test_no_part_of_a_stop_string_is_ever_shown_too_early(parts: list[str], stop: str):
    shown, stopped = run([stop], parts)
    if stopped:
        assert stop not in "".join(shown) + stop[:-1]


def test_an_empty_stop_string_is_a_fault_of_the_caller():
    with pytest.raises(AssertionError):
        StopStrings(Stops([""]))


# --- a sequence ---


def sequence(stops: list[str], *, min_tokens: int = 0) -> SequenceText:
    return SequenceText(BYTE_LEVEL.detokenizer(), StopStrings(Stops(stops)), min_tokens=min_tokens)


def test_the_answers_tokens_end_with_the_one_that_completes_the_stop_string():
    text = sequence(["lo"])
    shown = ""
    for token in b"hello":
        shown += text.append(token)
    assert (shown, text.num_tokens, text.has_stopped, text.finish()) == ("hel", 5, True, "")


def test_a_stop_string_inside_the_minimum_does_not_stop():
    text = sequence(["a"], min_tokens=3)
    shown = "".join(text.append(token) for token in b"aab")
    assert (shown, text.has_stopped) == ("aab", False)
    assert (text.append(ord("a")), text.has_stopped) == ("", True)


def test_a_broken_character_at_the_end_may_complete_a_stop_string():
    text = sequence(["x\ufffd"])
    assert text.append(ord("x")) == ""
    assert text.append(0xC3) == ""
    assert (text.finish(), text.has_stopped) == ("", True)
