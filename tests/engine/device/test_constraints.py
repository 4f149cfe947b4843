"""What a constrained sequence may say: only what its grammar allows, whatever the logits, the batch and its past."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from engine.device.constraints import MAX_KNOWN, MAX_KNOWN_CHARS, MAX_LATE, ConstraintError, Constraints
from engine.device.kernels.head import PlainHead
from engine.device.sampler import Sampler
from engine.schedule import SampledToken, SamplingParams, ScheduledSequence
from engine.vocabulary import TokenizerParts
from engine.vocabulary.gguf_tokenizer import gguf_tokenizer
from tests.frontend.small_tokenizers import END, byte_level_metadata

PARTS = gguf_tokenizer(byte_level_metadata())
VOCAB = PARTS.tokenizer.get_vocab_size(with_added_tokens=True) + 3  # padded, as models are
EOS = frozenset({END})
DIGITS = LLMatcher.grammar_from_regex("[0-9]{2,4}")


def a_sampler() -> Sampler:
    constraints = Constraints(lambda: PARTS, VOCAB, EOS)
    return Sampler(PlainHead(lambda hidden: hidden.clone()), seed=0, eos_token_ids=EOS, constraints=constraints)


def sequence(number: int, generated: list[int], constraint: str | None, **options: Any) -> ScheduledSequence:
    sampling = SamplingParams(max_tokens=100, constraint=constraint, **{"temperature": 0.0, **options})
    tokens = [65, *generated]
    return ScheduledSequence(number, tokens, 1, len(tokens) - 1, 1, [0], sampling)


def generate(sampler: Sampler, constraint: str, logits: torch.Tensor, number: int = 1, **options: Any) -> list[int]:
    """Until an end token, or a fault."""
    tokens: list[int] = []
    for _ in range(100):
        (found,) = sampler.sample(logits.clone(), [sequence(number, tokens, constraint, **options)])
        assert found.fault is None, found.fault
        tokens.append(found.token_id)
        if found.token_id in EOS:
            return tokens
    return tokens


def said(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode()


def likes(*tokens: int) -> torch.Tensor:
    row = torch.zeros(1, VOCAB)
    for place, token in enumerate(tokens):
        row[0, token] = 10.0 - place
    return row


def test_the_most_probable_token_that_is_allowed_is_taken():
    assert said(generate(a_sampler(), DIGITS, likes(ord("x"), ord("7"), END))) == "7777"


def test_it_may_end_where_the_grammar_is_complete_and_no_sooner():
    assert said(generate(a_sampler(), DIGITS, likes(END, ord("4")))) == "44"


def test_others_of_the_batch_are_not_constrained():
    batch = [sequence(1, [], None), sequence(2, [], DIGITS), sequence(3, [], None, temperature=0.0)]
    found = a_sampler().sample(likes(ord("x"), ord("7")).repeat(3, 1), batch)
    assert [token.token_id for token in found] == [ord("x"), ord("7"), ord("x")]


@given(forgotten=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None)
def test_what_is_forgotten_of_a_sequence_is_made_again_from_its_tokens(forgotten: list[bool], seed: int):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    kept = generate(a_sampler(), DIGITS, logits, seed=seed, temperature=1.0)
    sampler = a_sampler()
    tokens: list[int] = []
    for is_forgotten in forgotten[: len(kept)]:
        if is_forgotten:
            sampler.release([1])
        (found,) = sampler.sample(logits.clone(), [sequence(1, tokens, DIGITS, seed=seed, temperature=1.0)])
        tokens.append(found.token_id)
    assert tokens == kept[: len(tokens)]


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "number"}]},
    {"type": "object", "properties": {"s": {"type": "string", "maxLength": 4}}, "additionalProperties": False},
]


@given(schema=st.sampled_from(SCHEMAS), seed=st.integers(0, 999))
@settings(deadline=None)
def test_at_any_temperature_a_finished_answer_is_json(schema: dict[str, Any], seed: int):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    tokens = generate(a_sampler(), grammar, logits, temperature=2.0, seed=seed)
    if tokens[-1] in EOS:
        value = json.loads(said(tokens))
        assert isinstance(value, {"object": dict, "array": list}.get(schema.get("type", ""), object))


def test_no_token_that_is_allowed_is_the_sequences_fault():
    excluded = tuple((digit, -100.0) for digit in range(ord("0"), ord("9") + 1))
    (biased,) = a_sampler().sample(likes(ord("x")), [sequence(1, [], DIGITS, logit_bias=excluded)])
    assert biased.token_id in range(ord("0"), ord("9") + 1), "a bias hides nothing"
    (early,) = a_sampler().sample(likes(ord("x")), [sequence(1, [49, 50, 51, 52], DIGITS, min_tokens=9)])
    assert early.fault is not None


@pytest.mark.parametrize("constraint", ["no grammar", '{"grammars": []}'])
def test_a_grammar_that_is_none_is_the_sequences_fault_alone(constraint: str):
    found: list[SampledToken] = a_sampler().sample(
        likes(ord("x")).repeat(2, 1), [sequence(1, [], constraint), sequence(2, [], None)]
    )
    assert found[0].fault is not None
    assert found[1].token_id == ord("x")


def test_a_grammar_that_takes_too_long_is_its_sequences_fault_and_no_others():
    slow = LLMatcher.grammar_from_lark(
        "start: "
        + " | ".join(f'"{number}" A{number}' for number in range(2000))
        + "\n"
        + "\n".join(f"A{number}: /[a-z]+{number}/" for number in range(2000))
    )
    constraints = Constraints(lambda: PARTS, VOCAB, EOS, most_s=1e-6)
    sampler = Sampler(PlainHead(lambda hidden: hidden.clone()), seed=0, eos_token_ids=EOS, constraints=constraints)
    batch = [sequence(1, [], slow), sequence(2, [], None, temperature=0.5, seed=1), sequence(3, [], slow)]
    first, second, third = sampler.sample(likes(ord("x")).repeat(3, 1), batch)
    assert second.fault is None
    assert "takes more than" in str(first.fault)
    assert third.fault == first.fault  # known by now: it is not waited for again


def test_one_late_thread_does_not_write_into_the_masks_of_others():
    constraints = Constraints(lambda: PARTS, VOCAB, EOS)
    is_over = threading.Event()
    before = constraints._mask
    constraints._most_s = 0.0
    with pytest.raises(ConstraintError, match="takes more than"):
        constraints._in_time("slow", is_over.wait)
    assert constraints._mask is not before
    is_over.set()


def test_while_too_many_threads_are_late_constrained_sequences_are_refused():
    constraints = Constraints(lambda: PARTS, VOCAB, EOS, most_s=0.0)
    is_over = threading.Event()
    for number in range(MAX_LATE):
        with pytest.raises(ConstraintError, match="takes more than"):
            constraints._in_time(f"slow {number}", is_over.wait)
    with pytest.raises(ConstraintError, match="other constraints"):
        constraints._in_time("another", lambda: None)
    is_over.set()
    constraints._most_s = 60.0
    for late in list(constraints._late):
        late.result()
    assert constraints._in_time("another", lambda: 7) == 7


def test_grammars_are_known_for_the_next_sequence_within_a_bound():
    constraints = Constraints(lambda: PARTS, VOCAB, EOS)
    for number in range(20):
        constraints.apply(
            torch.zeros(VOCAB), sequence(number, [], LLMatcher.grammar_from_regex("a" * 50_000 + str(number)))
        )
    assert len(constraints._known) > 1
    assert sum(map(len, constraints._known)) <= MAX_KNOWN_CHARS


def test_the_vocabulary_is_read_before_any_constraint_comes():
    is_read = threading.Event()

    def load() -> TokenizerParts:
        is_read.set()
        return PARTS

    Constraints(load, VOCAB, EOS)
    assert is_read.wait(60)


def test_a_vocabulary_that_cannot_be_read_is_the_fault_of_constrained_sequences_alone():
    def load() -> TokenizerParts:
        raise OSError("no such file")

    constraints = Constraints(load, VOCAB, EOS)
    sampler = Sampler(PlainHead(lambda hidden: hidden.clone()), seed=0, eos_token_ids=EOS, constraints=constraints)
    found = sampler.sample(likes(ord("x")).repeat(2, 1), [sequence(1, [], DIGITS), sequence(2, [], None)])
    assert "no such file" in (found[0].fault or "")
    assert found[1].token_id == ord("x")


def test_the_grammars_that_are_kept_are_bounded_however_short_they_are():
    constraints = Constraints(lambda: PARTS, VOCAB, EOS)
    for number in range(MAX_KNOWN + 10):
        grammar = LLMatcher.grammar_from_regex(f"a{{{number + 1}}}")
        constraints.apply(torch.zeros(VOCAB), sequence(number, [], grammar))
        constraints.release([number])
    assert len(constraints._known) == MAX_KNOWN
    assert not constraints._followed
