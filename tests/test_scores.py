"""Every likelihood with every estimator: vectors whose second moments are the information."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from brute import (
    ALLOWED,
    CASES,
    NO,
    OwnExponential,
    each_case,
    each_estimator,
    rounding,
    second_moments,
    vectors,
)
from numerics import assert_within, u

from ewc_fast.fisher import Batch, Categorical, CausalLM
from ewc_fast.fisher.scores import ESTIMATORS, MOST_EXACT_PASSES, Scores

PER_TOKEN = CASES["causal_lm_per_token"]


@each_case
def test_exact_is_the_expectation_over_all_labels(case):
    found = second_moments(vectors(case, "exact"))
    expected = torch.stack([case.information(n) for n in range(3)])
    assert_within(found, expected, rounding(expected), "information")


@each_case
def test_empirical_is_the_score_of_the_targets(case):
    found = vectors(case, "empirical")
    for n in range(3):
        score = case.score(n)
        whole = sum(v[n].flatten() for v in found)
        assert_within(whole, score, 64 * u(torch.float64) * (1 + score.abs()), "score")


REPEATS = 8000


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("estimator", ["sampled", "rademacher"])
@each_case
def test_drawn_vectors_are_unbiased_for_exact(case, estimator, draws):
    outputs, targets = (
        t.repeat(REPEATS, *[1] * (t.dim() - 1)) for t in (case.outputs, case.targets)
    )
    repeated = replace(case, outputs=outputs, targets=targets)
    if case is CASES["categorical_each_sample_its_classes"]:
        masks = ALLOWED.repeat(REPEATS, 1)
        repeated = replace(repeated, likelihood=Categorical(classes=lambda batch: masks))
    found = second_moments(vectors(repeated, estimator, seed=1, draws=draws))
    found = found.view(REPEATS, 3, *found.shape[1:])
    expected = torch.stack([case.information(n) for n in range(3)])
    error = found.std(0) / REPEATS**0.5
    # A mean of 8000 is normal but for heavy tails: beyond 6 standard errors once in 500 million;
    # there are some 4000 entries in all these tests. What is certain has rounding only.
    assert_within(found.mean(0), expected, 6 * error + rounding(expected), estimator)


def test_several_draws_vary_less():
    case = CASES["categorical"]
    many = Scores("categorical", "rademacher", 64, torch.Generator().manual_seed(0))
    (few,) = vectors(case, "rademacher")
    expected = torch.stack([case.information(n) for n in range(3)])
    one = (second_moments([few]) - expected).square().sum()
    averaged = (second_moments(many.vectors(case.outputs, case.batch())) - expected).square().sum()
    assert averaged < one / 4


def test_of_two_classes_random_signs_are_exact():
    case = CASES["categorical_of_two"]
    expected = torch.stack([case.information(n) for n in range(3)])
    found = second_moments(vectors(case, "rademacher"))
    assert_within(found, expected, rounding(expected), "information")


@each_case
def test_batched_is_the_gradient_of_the_mean(case):
    (found,) = vectors(case, "batched")
    tokens = sum((ids[1:] != NO).sum().item() for ids in case.targets) if case is PER_TOKEN else 3
    for n in range(3):
        score = case.score(n)
        budget = 64 * u(torch.float64) * (1 + score.abs())
        assert_within(found[n].flatten(), score / tokens, budget, "score")
    weighted = vectors(case, "batched", torch.tensor([1.0, 1.0, 0.0]))[0]
    assert not weighted[2].any()


def test_batched_batches_count_for_one_and_without_weight_for_none():
    case, scores = CASES["categorical"], Scores("categorical", "batched")
    assert scores.batched
    assert scores.samples(case.outputs, case.batch(torch.tensor([1, 2, 0]))) == 1
    nothing = case.batch(torch.zeros(3))
    assert scores.samples(case.outputs, nothing) == 0
    assert not next(iter(scores.vectors(case.outputs, nothing))).any()


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "batched"])
@each_case
def test_weights_scale_the_squares(case, estimator):
    w = torch.tensor([0.0, 2.0, 0.5])
    plain, weighted = vectors(case, estimator), vectors(case, estimator, w)
    assert len(plain) == len(weighted)
    expected = w.double().view(3, 1, 1) * second_moments(plain)
    assert_within(second_moments(weighted), expected, rounding(expected) + 1e-300, "weighted")


@each_estimator
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if (c.targets == NO).any()])
def test_what_is_ignored_contributes_nothing(name, estimator):
    case = CASES[name]
    targets = case.targets[:, 1:] if "causal" in name else case.targets
    ignored = targets == NO
    class_dimension = -1 if name.endswith("last") or "causal" in name else 1
    for vector in vectors(case, estimator):
        by_position = vector.movedim(class_dimension, -1)
        if "causal" in name:
            assert not by_position[:, -1].any()  # predicts nothing
            by_position = by_position[:, :-1]
        assert not by_position[ignored].any()


@each_estimator
@pytest.mark.parametrize("name", [n for n in CASES if "classes" in n and n[-4:] != "last"])
def test_classes_that_are_not_possible_have_no_gradient(name, estimator):
    case = CASES[name]
    for n in range(3):
        impossible = case.information(n).diagonal() == 0
        assert impossible.any()
        for vector in vectors(case, estimator):
            assert not vector[n][impossible].any()


def test_a_class_index_that_is_ignored_is_drawn_all_the_same():
    ids = torch.tensor([[1, 1, 0, 0]] * 4000)  # 0 is padding, and a token
    outputs = torch.zeros(4000, 4, 2).double()
    scores = Scores(CausalLM(ignore_index=0), "sampled", generator=torch.Generator().manual_seed(0))
    (vector,) = scores.vectors(outputs, Batch(None, ids, None, 4000))
    assert (vector[:, 0].abs() == 0.5).all()
    assert not vector[:, 1:].any()


def test_a_tokens_gradient_is_squared_by_itself():
    found = vectors(PER_TOKEN, "empirical")
    assert len(found) == 3  # of four positions the last predicts nothing
    for vector, position in zip(found, range(3), strict=True):
        elsewhere = [p for p in range(4) if p != position]
        assert not vector[:, elsewhere].any()
        assert vector[0, position].any()
    nobody = torch.tensor([[0, 1, NO, 0]] * 3)
    scores = Scores(PER_TOKEN.likelihood, "empirical")
    batch = Batch(None, nobody, None, 3)
    assert scores.count(PER_TOKEN.outputs, batch) == 2
    assert len(list(scores.vectors(PER_TOKEN.outputs, batch))) == 2


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher"])
def test_per_token_costs_no_more_where_labels_are_the_models(estimator):
    sequence, token = vectors(CASES["causal_lm"], estimator), vectors(PER_TOKEN, estimator)
    assert all(torch.equal(a, b) for a, b in zip(sequence, token, strict=True))


COUNTED = {
    "categorical": (None, 3.0),
    "categorical_ignoring_one": (None, 3.0),
    "causal_lm": (torch.tensor([1.0, 2.0, 0.5]), 3.5),
    "causal_lm_per_token": (None, 6.0),
    "gaussian": (torch.tensor([1, 2, 0]), 3.0),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher", "empirical"])
def test_what_the_sum_is_divided_by(name, estimator):
    weights, expected = COUNTED[name]
    case = CASES[name]
    assert Scores(case.likelihood, estimator).samples(case.outputs, case.batch(weights)) == expected


def test_tokens_are_weighted_with_their_sequence():
    scores = Scores(PER_TOKEN.likelihood, "empirical")  # of 3, 1 and 2 tokens
    weights = torch.tensor([1.0, 10.0, 0.5])
    assert scores.samples(PER_TOKEN.outputs, PER_TOKEN.batch(weights)) == 3 + 10 + 1


def test_without_targets_every_position_but_the_last_counts():
    batch = Batch(None, None, None, 3)
    assert Scores(CausalLM(per="token"), "sampled").samples(PER_TOKEN.outputs, batch) == 9
    likelihood = CausalLM(ignore_index=0)
    (vector,) = Scores(likelihood, "sampled").vectors(PER_TOKEN.outputs, batch)
    assert vector[:, :-1].any(2).all()
    assert not vector[:, -1].any()


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@each_case
def test_samples_are_separate(case, estimator):
    whole, scores = vectors(case, estimator), Scores(case.likelihood, estimator)
    first = case.batch().samples(0, 1)
    alone = list(scores.vectors(case.outputs[:1], first))
    expected = second_moments([v[:1] for v in whole])
    assert_within(second_moments(alone), expected, rounding(expected), "one sample")


def test_exact_refuses_more_passes_than_it_promises():
    exact, batch = Scores("categorical", "exact"), Batch(None, None, None, 1)
    z = torch.randn(1, MOST_EXACT_PASSES + 1)
    assert len(list(exact.vectors(z, batch))) == MOST_EXACT_PASSES
    with pytest.raises(ValueError, match=r"would take 1,001 backward passes.*'sampled' or 'rade"):
        exact.vectors(torch.randn(1, MOST_EXACT_PASSES + 2), batch)


def test_a_large_vocabulary_is_taken_in_pieces():
    z = torch.randn(3, 700_000)  # a row a piece
    scores = Scores("categorical", "rademacher", 1, torch.Generator().manual_seed(0))
    (vector,) = scores.vectors(z, Batch(None, None, None, 3))
    sums = vector.double().sum(1).abs()  # columns of the factor add up to 0
    assert (sums <= 1e-6 * vector.double().abs().sum(1)).all()
    assert (vector != 0).all()


def test_directions_of_ones_own_may_have_a_count():
    class Counted(OwnExponential):
        def count(self, outputs):
            return 2000

    batch = CASES["own"].batch()
    assert Scores(Counted(), "exact").count(CASES["own"].outputs, batch) == 2000
    with pytest.raises(ValueError, match="2,000 backward passes"):
        Scores(Counted(), "exact").vectors(CASES["own"].outputs, batch)
