"""The sampler against definitions too simple to be wrong."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.device.kernels.head import PlainHead
from engine.device.sampler import Sampler
from engine.schedule.batch import SampledToken, ScheduledSequence
from engine.wire.sampling import SamplingParams

EOS = 3
HEAD = PlainHead(lambda logits: logits.clone())  # of a model that says its logits
SAMPLER = Sampler(HEAD, seed=0, eos_token_ids=frozenset({EOS}))
RANDOM = SamplingParams(max_tokens=100)
GREEDY = replace(RANDOM, temperature=0.0)


def sequence(
    sampling: SamplingParams, *, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), sequence_id: int = 0
) -> ScheduledSequence:
    tokens = [*prompt, *output]
    return ScheduledSequence(
        sequence_id=sequence_id,
        token_ids=tokens,
        num_prompt_tokens=len(prompt),
        start=len(tokens) - 1,
        num_tokens=1,
        block_table=[0],
        sampling=sampling,
    )


def sample(logits: list[float], *sequences: ScheduledSequence, sampler: Sampler = SAMPLER) -> list[int]:
    """Every sequence has the same logits."""
    return [found.token_id for found in sampler.sample(torch.tensor([logits] * len(sequences)), sequences)]


def support(logits: list[float], sampling: SamplingParams, num_draws: int = 400) -> set[int]:
    """Whatever comes out at all."""
    rows = [sequence(replace(sampling, seed=seed)) for seed in range(num_draws)]
    return set(sample(logits, *rows))


def allowed(logits: list[float], sampling: SamplingParams) -> set[int]:
    """The definition: min_p of the most probable, then the best top_k, then the fewest of these with top_p's share."""
    scaled = [logit / sampling.temperature for logit in logits]
    weights = {token: math.exp(value - max(scaled)) for token, value in enumerate(scaled)}
    kept = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    ordered = sorted(kept, key=lambda token: -kept[token])[: sampling.top_k or len(kept)]
    total, mass, chosen = sum(kept[token] for token in ordered), 0.0, set()
    for token in ordered:
        if mass >= sampling.top_p * total:
            break
        chosen.add(token)
        mass += kept[token]
    return chosen


def test_temperature_0_takes_the_best():
    assert sample([0.0, 5.0, 1.0, 2.0], sequence(GREEDY)) == [1]


def test_greedy_and_random_sequences_share_a_batch():
    tokens = sample([0.0, 50.0, 1.0, 2.0], sequence(GREEDY), sequence(RANDOM), sequence(GREEDY))
    assert tokens == [1, 1, 1]


def test_rows_that_need_no_logits_have_none_computed():
    asked: list[int] = []

    class Watched(PlainHead):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            asked.append(len(hidden))
            return super().logits(hidden)

        def best(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.argmax(-1)

    sampler = Sampler(Watched(lambda logits: logits.clone()), seed=0, eos_token_ids=frozenset({EOS}))
    rows = [GREEDY, RANDOM, replace(GREEDY, logprobs=1), GREEDY, replace(GREEDY, logit_bias=((0, 100.0),))]
    sampled = sampler.sample(60 * torch.eye(5), [sequence(sampling) for sampling in rows])
    assert [found.token_id for found in sampled] == [0, 1, 2, 3, 0]
    assert [found.logprobs is None for found in sampled] == [True, True, False, True, True]
    assert asked == [3]
    sampler.sample(60 * torch.eye(5), [sequence(GREEDY)] * 5)
    assert asked == [3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_probable(temperature: float):
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    sampling = replace(RANDOM, temperature=temperature)
    num_draws = 20_000
    counts = Counter(sample(logits, *(sequence(replace(sampling, seed=seed)) for seed in range(num_draws))))
    weights = [math.exp(logit / temperature) for logit in logits]
    for token, weight in enumerate(weights):
        share = weight / sum(weights)
        deviation = math.sqrt(share * (1 - share) / num_draws)
        assert abs(counts[token] / num_draws - share) < 4 * deviation, token


distinct_logits = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(
    lambda values: [value / 8 for value in values]
)


@settings(max_examples=60)
@given(
    logits=distinct_logits,
    top_k=st.integers(0, 14),
    top_p=st.sampled_from((0.05, 0.33, 0.71, 0.93, 1.0)),
    min_p=st.sampled_from((0.0, 0.02, 0.3, 1.0)),
    temperature=st.sampled_from((0.3, 1.0, 2.0)),
)
def test_only_what_the_definition_allows_is_drawn(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float
):
    sampling = replace(RANDOM, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    permitted = allowed(logits, sampling)
    drawn = support(logits, sampling)
    assert drawn <= permitted
    best = max(logits)
    weights = {token: math.exp((logits[token] - best) / temperature) for token in permitted}
    likely = {token for token, weight in weights.items() if weight > 0.05 * sum(weights.values())}
    assert likely <= drawn


@pytest.mark.parametrize("spread", [0.001, 5.0])
def test_top_p_is_right_beyond_the_first_candidates(spread: float):
    """A vocabulary so flat that the nucleus is thousands of tokens, and one where it is few."""
    vocab_size, num_draws = 5000, 300
    logits = torch.linspace(spread, 0, vocab_size).tolist()
    sampling = replace(RANDOM, top_p=0.6)
    permitted = allowed(logits, sampling)
    drawn = support(logits, sampling, num_draws)
    assert drawn <= permitted
    assert max(drawn) > 0.95 * max(permitted)


def test_a_flat_row_beside_peaked_ones_gets_its_own_candidates():
    vocab_size = 5000
    flat, peaked = torch.linspace(0.001, 0, vocab_size), torch.zeros(vocab_size)
    peaked[42] = 30.0
    drawn = set()
    for seed in range(60):
        rows = [sequence(replace(RANDOM, top_p=0.6, seed=seed))] * 3
        first, token, last = (found.token_id for found in SAMPLER.sample(torch.stack((peaked, flat, peaked)), rows))
        assert first == last == 42
        drawn.add(token)
    assert 2000 < max(drawn) <= 0.6 * vocab_size


def test_each_row_of_a_batch_has_its_own_limits():
    logits = [3.0, 2.9, 2.8, 2.7]
    one, two = replace(RANDOM, top_k=1), replace(RANDOM, top_k=2)
    drawn: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for seed in range(200):
        batch = [sequence(replace(sampling, seed=seed)) for sampling in (one, RANDOM, two)]
        for row, token in enumerate(sample(logits, *batch)):
            drawn[row].add(token)
    assert drawn == {0: {0}, 1: {0, 1, 2, 3}, 2: {0, 1}}


@given(seed=st.integers(-(2**63), 2**63 - 1), place=st.integers(0, 6), sequence_id=st.integers(0, 2**40))
def test_a_seeded_sample_does_not_depend_on_the_batch(seed: int, place: int, sequence_id: int):
    logits = torch.linspace(0, 3, 50).tolist()
    sampling = replace(RANDOM, seed=seed, top_p=0.9)
    output = (4, 5, 6)
    alone = sample(logits, sequence(sampling, output=output))
    others = [sequence(RANDOM, sequence_id=number) for number in range(6)]
    others.insert(place, sequence(sampling, output=output, sequence_id=sequence_id))
    assert sample(logits, *others)[place] == alone[0]


def test_every_position_of_a_seeded_sequence_has_its_own_randomness():
    logits = [0.0] * 1000
    tokens = {sample(logits, sequence(replace(RANDOM, seed=7), output=(0,) * n))[0] for n in range(50)}
    assert len(tokens) > 40


def test_the_least_random_number_draws_no_excluded_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sampler, "_number", lambda self, sequence: 0.0)
    assert sample([-9.0, 1.0, 2.0], sequence(replace(RANDOM, top_k=2))) == [1]


@given(
    vocab_size=st.integers(1, 700),
    holes=st.integers(0, 2**64),
    number=st.integers(0, 2**48 - 1).map(lambda bits: bits * 2.0**-48),
)
@settings(deadline=None)
def test_a_number_falls_where_the_whole_cumulative_distribution_passes_it(vocab_size: int, holes: int, number: float):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(holes % 2**32))
    logits[[token for token in range(vocab_size - 1) if holes >> token % 64 & 1]] = -1e30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_number", lambda self, sequence: number)
        drawn = sample(logits.tolist(), sequence(RANDOM))[0]
    probabilities = logits.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    assert probabilities[drawn] > 0
    assert cumulative[drawn] - probabilities[drawn] - 1e-6 <= number <= cumulative[drawn] + 1e-6


def test_sequences_without_a_seed_follow_the_engines_and_differ_from_each_other():
    logits = [0.0] * 1000
    rows = [sequence(RANDOM, sequence_id=number) for number in range(50)]
    first, again = sample(logits, *rows), sample(logits, *rows)
    other = sample(logits, *rows, sampler=Sampler(HEAD, seed=1, eos_token_ids=frozenset()))
    assert first == again
    assert first != other
    assert len(set(first)) > 40


def test_repetition_penalty_weakens_what_prompt_and_output_hold():
    penalised = replace(GREEDY, repetition_penalty=2.0)
    assert sample([0.0, 3.0, 2.0, 1.0], sequence(penalised, prompt=(1,), output=())) == [2]
    assert sample([0.0, 3.0, 2.0, 1.4], sequence(penalised, prompt=(1,), output=(2, 2))) == [1]
    assert sample([-1.0, -0.9, -5.0, -5.0], sequence(penalised, prompt=(1,))) == [0]


def test_presence_and_frequency_penalties_count_the_output_only():
    presence, frequency = replace(GREEDY, presence_penalty=1.0), replace(GREEDY, frequency_penalty=0.5)
    logits = [0.0, 3.0, 2.2, 0.0]
    assert sample(logits, sequence(presence, prompt=(1, 1))) == [1]
    assert sample(logits, sequence(presence, output=(1,))) == [2]
    assert sample(logits, sequence(frequency, output=(1,))) == [1]
    assert sample(logits, sequence(frequency, output=(1, 1))) == [2]


def test_logit_bias_can_force_and_forbid():
    assert sample([0.0, 5.0, 1.0], sequence(replace(GREEDY, logit_bias=((0, 100.0),)))) == [0]
    assert sample([0.0, 5.0, 1.0], sequence(replace(GREEDY, logit_bias=((1, -100.0), (2, 0.5))))) == [2]


def test_no_end_before_min_tokens():
    logits = [0.0, 1.0, 4.0, 5.0]
    sampling = replace(GREEDY, min_tokens=2, stop_token_ids=(2,))
    assert sample(logits, sequence(sampling, output=(0,))) == [1]
    assert sample(logits, sequence(sampling, output=(0, 0))) == [EOS]
    assert sample(logits, sequence(replace(sampling, ignore_eos=True), output=(0,))) == [EOS]
    assert sample(logits, sequence(replace(sampling, ignore_eos=True, stop_token_ids=()), output=(0,))) == [EOS]


def test_logprobs_are_those_of_the_model_before_anything_was_changed():
    logits = [0.0, 3.0, 1.0, 2.0]
    total = math.log(sum(math.exp(logit) for logit in logits))
    biased = replace(GREEDY, logit_bias=((0, 100.0),), temperature=0.5, logprobs=2)
    (token, logprobs, _), (_, none, _), (_, own, _) = SAMPLER.sample(
        torch.tensor([logits] * 3), [sequence(biased), sequence(GREEDY), sequence(replace(GREEDY, logprobs=0))]
    )
    assert none is None
    assert logprobs is not None
    assert own is not None
    assert (token, logprobs.rank) == (0, 4)
    assert logprobs.logprob == pytest.approx(0.0 - total)
    assert [token for token, _ in logprobs.top] == [1, 3]
    assert [value for _, value in logprobs.top] == pytest.approx([3.0 - total, 2.0 - total])
    assert (own.rank, own.top) == (1, ())


# --- a fault in one sequence ends that sequence (P10) ---

extremes = st.sampled_from((0.0, -0.0, 5e-324, 1e-300, 1e-38, 1e-9, 0.0099, 0.01, 0.5, 1.0, 2.0))
accepted = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from((0, 100)),
    temperature=extremes,
    top_p=extremes.filter(lambda value: 0 < value <= 1),
    top_k=st.sampled_from((0, 1, 3, 10**9, 2**31 - 1)),
    min_p=extremes.filter(lambda value: value <= 1),
    repetition_penalty=st.sampled_from((0.01, 0.5, 1.0, 100.0)),
    presence_penalty=st.sampled_from((-2.0, 0.0, 2.0)),
    frequency_penalty=st.sampled_from((-2.0, 0.0, 2.0)),
    seed=st.sampled_from((None, 0, 2**63 - 1, -(2**63))),
    logit_bias=st.sampled_from(((), ((0, -100.0), (1, 100.0)), tuple((token, -100.0) for token in range(5)))),
    logprobs=st.sampled_from((None, 0, 5, 20)),
    stop_token_ids=st.sampled_from(((), (0,), (0, 1, 2, 3, 4))),
    ignore_eos=st.booleans(),
)
logit_rows = st.lists(
    st.sampled_from((0.0, -1.0, 7.5, 1e30, -1e30, 3e38, math.nan, math.inf, -math.inf)), min_size=5, max_size=5
)


@example(strange=replace(RANDOM, min_tokens=9, logprobs=1), logits=[0.0, 0.0, 0.0, math.nan, 0.0], others=[GREEDY])
@given(strange=accepted, logits=logit_rows, others=st.lists(accepted, min_size=1, max_size=3))
def test_whatever_one_sequence_asks_or_gets_it_is_sampled_or_faulted_and_the_others_never_notice(
    strange: SamplingParams, logits: list[float], others: list[SamplingParams]
):
    of_hidden = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5], logits])
    head = PlainHead(lambda hidden: of_hidden[hidden[:, 0].long()])
    sampler = Sampler(head, seed=0, eos_token_ids=frozenset({EOS}))
    neighbours = [sequence(sampling, sequence_id=row) for row, sampling in enumerate(others)]
    batch = [*neighbours, sequence(strange, sequence_id=9)]
    *beside, found = sampler.sample(torch.tensor([[0.0]] * len(others) + [[1.0]]), batch)
    assert beside == sampler.sample(torch.zeros(len(others), 1), neighbours)
    assert (0 <= found.token_id < 5) == (found.fault is None)
    if any(math.isnan(logit) for logit in logits) and strange.temperature > 0:
        assert found.fault is not None


def test_min_tokens_and_stop_tokens_that_leave_nothing_are_that_sequences_fault():
    everything = replace(RANDOM, min_tokens=50, stop_token_ids=(0, 1, 2, 3, 4))
    for sampling in (everything, replace(everything, temperature=0.0)):
        forbidden, other = SAMPLER.sample(torch.zeros(2, 5), [sequence(sampling), sequence(GREEDY)])
        assert forbidden.fault is not None
        assert other.fault is None


def test_a_bug_that_one_sequence_meets_is_its_fault_alone():
    broken = replace(RANDOM, min_tokens=50, stop_token_ids=(70_000,))  # the scheduler refuses these; if it did not:
    found, *others = SAMPLER.sample(torch.eye(5)[:3], [sequence(broken), sequence(GREEDY), sequence(RANDOM)])
    assert found.fault is not None
    assert "IndexError" in found.fault
    assert [other.fault for other in others] == [None, None]
    assert others[0].token_id == 1


def test_what_breaks_the_batch_and_no_sequence_of_it_is_told_and_everybody_has_a_token(
    monkeypatch: pytest.MonkeyPatch,
):
    caught: list[Exception] = []
    whole = Sampler._sample_logits

    def only_alone(self: Sampler, logits: torch.Tensor, sequences: list[ScheduledSequence]) -> list[SampledToken]:
        if len(sequences) > 1:
            raise RuntimeError("not so many at once")
        return whole(self, logits, sequences)

    rows = [sequence(replace(RANDOM, seed=row)) for row in range(3)]
    expected = SAMPLER.sample(torch.eye(5)[:3], rows, caught.append)
    monkeypatch.setattr(Sampler, "_sample_logits", only_alone)
    assert SAMPLER.sample(torch.eye(5)[:3], rows, caught.append) == expected
    assert [str(error) for error in caught] == ["not so many at once"]
    broken = replace(RANDOM, min_tokens=50, stop_token_ids=(70_000,))
    SAMPLER.sample(torch.eye(5)[:2], [sequence(broken), rows[0]], caught.append)
    assert len(caught) == 1, "the sequence that broke it ends, which is told of it"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_greedy_takes_no_token_from_logits_that_are_no_numbers(value: float):
    """The hidden states are: it is the head that is broken."""
    head = PlainHead(lambda hidden: hidden.masked_fill(hidden == 7.0, value))
    sampler = Sampler(head, seed=0, eos_token_ids=frozenset({EOS}))
    found, other = sampler.sample(torch.tensor([[0.0, 7.0, 1.0], [0.0, 6.0, 1.0]]), [sequence(GREEDY)] * 2)
    assert found.fault is not None
    assert (other.token_id, other.fault) == (1, None)


def test_neighbours_of_a_bug_get_the_tokens_of_the_whole_batch_to_the_last_bit():
    head = PlainHead(
        lambda hidden: hidden.clone() if len(hidden) == 3 else hidden.flip(-1)
    )  # rounds by batch size, say
    sampler = Sampler(head, seed=0, eos_token_ids=frozenset({EOS}))
    rows = [sequence(replace(RANDOM, seed=row, logprobs=3)) for row in range(3)]
    broken = sequence(replace(RANDOM, min_tokens=50, stop_token_ids=(70_000,)))
    hidden = torch.arange(15.0).view(3, 5).sin()
    _, *without = sampler.sample(hidden, rows)
    found, *others = sampler.sample(hidden, [broken, *rows[1:]])
    assert found.fault is not None
    assert others == without


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_a_head_that_fails_is_the_whole_batchs_fault(sampling: SamplingParams):
    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    sampler = Sampler(PlainHead(fail), seed=0, eos_token_ids=frozenset())
    with pytest.raises(RuntimeError, match="the device is gone"):
        sampler.sample(torch.zeros(2, 5), [sequence(sampling)] * 2)


def test_large_hidden_states_in_float16_are_no_fault():
    head = PlainHead(lambda hidden: hidden[:, :5].float())
    sampler = Sampler(head, seed=0, eos_token_ids=frozenset())
    hidden = torch.full((2, 4096), 20.0, dtype=torch.float16)  # whose sum float16 cannot hold
    sound, broken = sampler.sample(hidden.clone().index_fill_(1, torch.tensor([4]), 30.0), [sequence(GREEDY)] * 2)
    assert (sound.token_id, sound.fault, broken.fault) == (4, None, None)
    hidden[1, 7] = math.inf
    sound, broken = sampler.sample(hidden, [sequence(GREEDY)] * 2)
    assert sound.fault is None
    assert broken.fault is not None


def test_temperatures_below_the_least_count_as_the_least():
    logits = [0.0, 0.02, 0.01, -0.01, 0.0]
    for seed in range(50):
        low, least = (replace(RANDOM, temperature=temperature, seed=seed) for temperature in (1e-38, 0.01))
        assert sample(logits, sequence(low)) == sample(logits, sequence(least))
