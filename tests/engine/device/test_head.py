"""The head's best token, found by screening, against the exact product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.device.kernels import head
from engine.device.kernels.head import NO_TOKEN, Head, PlainHead, ScreeningHead, make_head

LOGITS = "a product"


def screening(weight: torch.Tensor) -> Head:
    return ScreeningHead(weight, lambda hidden: hidden @ weight.t())


def exact_best(weight: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """Of sums of products that are exact, as float32; the first of equals."""
    logits = (hidden.double() @ weight.double().t()).float()
    return [int((row == row.max()).nonzero()[0]) for row in logits]


def draw(shape: tuple[int, int, int], kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocab, hidden) and (rows, hidden)."""
    num_rows, num_inputs, vocab_size = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, num_inputs, generator=generator)
    hidden = torch.randn(num_rows, num_inputs, generator=generator)
    match kind:
        case "whole numbers":  # many ties
            weight, hidden = weight.round(), hidden.round()
        case "close":  # tokens that bfloat16 cannot tell apart
            weight = weight[:1] + 1e-4 * weight
        case "below zero":
            weight = -weight.abs()
            hidden = hidden.abs()
        case "long and short":
            weight *= 10 ** (6 * torch.rand(vocab_size, 1, generator=generator) - 3)
            hidden *= 10 ** (6 * torch.rand(num_rows, 1, generator=generator) - 3)
    return weight, hidden


KINDS = ("normal", "whole numbers", "close", "below zero", "long and short")
shapes = st.tuples(
    st.sampled_from((1, 2, 15, 16, 17, 40)), st.integers(1, 80), st.sampled_from((1, 2, 127, 128, 129, 300, 1000))
)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000))
@example(shape=(3, 64, 1000), kind="close", seed=0)
@example(shape=(3, 64, 1000), kind="whole numbers", seed=0)
def test_screening_finds_the_exact_best(shape: tuple[int, int, int], kind: str, seed: int):
    weight, hidden = draw(shape, kind, seed)
    assert screening(weight).best(hidden).tolist() == exact_best(weight, hidden)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000), tile=st.sampled_from((1, 100, 256)))
def test_it_does_not_matter_how_many_tokens_are_scored_at_a_time(
    shape: tuple[int, int, int], kind: str, seed: int, tile: int
):
    weight, hidden = draw(shape, kind, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_TILE", tile)
        assert screening(weight).best(hidden).tolist() == exact_best(weight, hidden)


def test_of_equal_tokens_the_first_is_the_best():
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    weight[[77, 300, 499]] = 3 * weight[400]
    assert screening(weight).best(weight[400:401]).tolist() == [77]
    assert screening(weight).best(torch.zeros(2, 32)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_has_no_best_token_and_the_others_have_theirs(value: float):
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    best = exact_best(weight, hidden)
    hidden[1] = value
    for head_ in (screening(weight), PlainHead(lambda hidden: hidden @ weight.t())):
        assert head_.best(hidden).tolist() == [best[0], NO_TOKEN, best[2]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_is_no_number_somewhere_has_no_best_token(value: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "HOST", {"avx512bf16": True})
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    assert type(make_head(weight, lambda hidden: hidden @ weight.t(), None)) is ScreeningHead
    weight[77] = value
    found = make_head(weight, lambda hidden: hidden @ weight.t(), None)
    assert type(found) is PlainHead
    assert found.best(torch.ones(2, 32)).tolist() == [NO_TOKEN] * 2


def test_a_quantized_head_and_one_of_half_precision_are_not_screened():
    weight = torch.randn(4, 4)

    def product(hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ weight.t()

    assert type(make_head(weight, product, "int8")) is PlainHead
    assert type(make_head(weight.bfloat16(), product, None)) is PlainHead
    hidden = torch.randn(3, 4)
    torch.testing.assert_close(make_head(weight, product, None).logits(hidden), hidden @ weight.t())
    assert make_head(weight, product, "int8").best(hidden).tolist() == (hidden @ weight.t()).argmax(-1).tolist()
