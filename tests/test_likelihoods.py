"""Directions, scores and samples are those of the distributions they are named after."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import assert_within, smallest, u
from torch import distributions

from ewc_fast.fisher.likelihoods import NAMED

CATEGORICAL, BERNOULLI, GAUSSIAN = (NAMED[n] for n in ("categorical", "bernoulli", "gaussian"))


def information(directions):
    """Return sum_k v_k v_k^T for each sample, over the flattened outputs, in float64."""
    stacked = torch.stack([v.double().flatten(1) for v in directions])
    return torch.einsum("kni,knj->nij", stacked, stacked)


def softmax_information(z):
    """Return diag(p) - p p^T without cancellation: p_i (1 - p_i) is p_i times all others' sum."""
    p = z.double().softmax(1)
    others = (1 - torch.eye(z.shape[1])).double()
    return torch.diag_embed(p * (p @ others)) - p[:, :, None] * p[:, None, :] * others


def peak(classes, at, height):
    z = torch.zeros(1, classes).double()
    z[0, at] = height
    return z


LOGITS = {
    "two_classes": lambda: torch.randn(5, 2).double(),
    "three_classes": lambda: torch.randn(5, 3).double(),
    "a_thousand_classes": lambda: torch.randn(2, 1000).double(),
    "equal": lambda: torch.zeros(1, 7).double(),
    "equal_and_huge": lambda: torch.full((1, 7), 1e3).double(),
    "spread_over_many_orders": lambda: torch.linspace(-300, 300, 40).double()[None],
    "confident_in_the_first": lambda: peak(5, 0, 30.0),
    "confident_in_the_last": lambda: peak(5, 4, 30.0),
    "certain_of_the_first": lambda: peak(5, 0, 1e3),
    "certain_of_the_middle": lambda: peak(5, 2, 1e3),
    "certain_of_the_last": lambda: peak(5, 4, 1e3),
    "certain_of_one_of_two": lambda: peak(2, 1, 1e3),
    "excluding_one": lambda: peak(5, 2, -1e3),
    "certain_of_two_together": lambda: peak(5, 1, 1e3) + peak(5, 3, 1e3),
}


@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_categorical_directions_make_up_diag_p_minus_p_p(make, dtype):
    z = make().to(dtype)
    directions = list(CATEGORICAL.directions(z))
    assert len(directions) == CATEGORICAL.count(z) == z.shape[1] - 1
    assert all(v.shape == z.shape and v.dtype == dtype for v in directions)
    exact = softmax_information(z)
    scale = exact.diagonal(dim1=1, dim2=2).sqrt()
    # In float64 every v is right to C roundings of the tail sums and a dozen more; then it is
    # rounded to the dtype. Products of two, over the diagonals' geometric mean (Cauchy-Schwarz).
    relative = 2 * (2 * z.shape[1] + 12) * u(torch.float64) + 4 * u(dtype)
    budget = relative * scale[:, :, None] * scale[:, None, :] + smallest(dtype)
    assert_within(information(directions), exact, budget, "information")


def test_categorical_directions_treat_positions_apart():
    z = torch.randn(2, 3, 2, 2).double()
    found = information(CATEGORICAL.directions(z)).view(2, 3, 4, 3, 4)
    assert CATEGORICAL.count(z) == 2 * 4
    for a, b in itertools.product(range(4), repeat=2):
        here = softmax_information(z.flatten(2)[:, :, a])
        expected = here if a == b else torch.zeros_like(here)
        assert_within(found[:, :, a, :, b], expected, 64 * u(torch.float64), f"positions {a}, {b}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bernoulli_directions_make_up_p_times_1_minus_p(dtype):
    z = torch.tensor([0.0, 1.0, -3.0, 10.0, -17.0, 20.0, -50.0, 80.0, 1e3, -1e3], dtype=dtype)[None]
    exact = z.double().sigmoid() * (-z.double()).sigmoid()
    directions = list(BERNOULLI.directions(z))
    assert len(directions) == BERNOULLI.count(z) == 10
    found = information(directions)[0]
    # an exponential, a sum and a quotient for each sigmoid, a product, a root; squared
    assert_within(found.diagonal(), exact[0], 32 * u(dtype) * exact[0] + smallest(dtype), "p(1-p)")
    assert not (found - found.diagonal().diag()).any()


def test_bernoulli_directions_are_the_expectation_over_all_labels():
    z = torch.randn(1, 3).double()
    p = z.sigmoid()[0]
    expected = torch.zeros(3, 3).double()
    for bits in itertools.product([0.0, 1.0], repeat=3):
        y = torch.tensor(bits).double()
        score = y - p
        expected += (p**y * (1 - p) ** (1 - y)).prod() * torch.outer(score, score)
    assert_within(information(BERNOULLI.directions(z))[0], expected, 32 * u(torch.float64), "E")


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 2)], ids=str)
def test_gaussian_directions_make_up_the_unit_matrix(shape):
    z = torch.randn(shape)
    size = z[0].numel()
    directions = list(GAUSSIAN.directions(z))
    assert len(directions) == GAUSSIAN.count(z) == size
    assert all(v.shape == z.shape for v in directions)
    found = torch.stack([v.double().reshape(2, -1) for v in directions])
    assert torch.equal(found[:, 0], torch.eye(size).double())
    assert torch.equal(found[:, 1], torch.eye(size).double())


def score(name, z, y):
    return NAMED[name].score(z, y)


def test_the_categorical_score_is_the_label_minus_p():
    z, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.eye(4).double()[y] - z.softmax(1)
    assert_within(score("categorical", z, y), expected, 16 * u(torch.float64), "score")


def test_ignored_labels_have_no_score():
    z, y = torch.randn(2, 4, 3).double(), torch.tensor([[0, -100, 2], [-100, -100, -100]])
    found = score("categorical", z, y)
    assert not found[1].any()
    assert not found[0, :, 1].any()
    assert found[0, :, 0].all()


def test_the_bernoulli_score_is_the_label_minus_p():
    z, y = torch.randn(6, 4).double(), torch.randint(2, (6, 4))
    assert_within(score("bernoulli", z, y), y - z.sigmoid(), 16 * u(torch.float64), "score")


def test_the_gaussian_score_is_the_distance():
    z, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    assert torch.equal(score("gaussian", z, y), y - z)


def test_squared_scores_of_all_labels_average_to_the_exact_information():
    z = torch.randn(3, 5).double()
    p, expected = z.softmax(1), information(CATEGORICAL.directions(z))
    found = torch.zeros_like(expected)
    for label in range(5):
        s = score("categorical", z, torch.full((3,), label))
        found += p[:, label, None, None] * s[:, :, None] * s[:, None, :]
    assert_within(found, expected, 64 * u(torch.float64), "information")


REFERENCES = {
    "categorical": (lambda z: distributions.Categorical(logits=z.movedim(1, -1)), 0.0),
    "bernoulli": (lambda z: distributions.Bernoulli(logits=z), 0.0),
    "gaussian": (lambda z: distributions.Normal(z, 1.0), 0.9189385332046727),  # log(2 pi) / 2
}


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)], ids=["one_position", "positions"])
@pytest.mark.parametrize("name", REFERENCES)
def test_log_probabilities_are_summed_over_all_but_the_samples(name, shape):
    z, (make, constant) = torch.randn(shape).double(), REFERENCES[name]
    distribution = make(z)
    y = distribution.sample()
    terms = (distribution.log_prob(y) + constant).reshape(4, -1)
    found = NAMED[name].log_prob(z, y)
    assert found.shape == (4,)
    assert_within(found, terms.sum(1), 64 * u(torch.float64) * terms.abs().sum(1), "log p")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFERENCES)
def test_samples_have_the_models_mean(name, dtype):
    z, n = torch.tensor([[2.0, 0.0, -1.0]]).to(dtype), 20_000
    y = NAMED[name].sample(z.expand(n, 3), torch.Generator().manual_seed(1))
    counted = torch.eye(3)[y] if name == "categorical" else y.float()
    assert counted.shape == (n, 3)
    mean = {"categorical": z.softmax(1), "bernoulli": z.sigmoid(), "gaussian": z}[name][0].float()
    spread = counted.std(0) / n**0.5
    # a normal mean is beyond 6 standard errors once in 500 million; probabilities have the dtype's
    # own rounding, a softmax three of them
    assert ((counted.mean(0) - mean).abs() <= 6 * spread + 4 * u(dtype) * mean.abs()).all()


def test_samples_at_each_position():
    y = CATEGORICAL.sample(torch.randn(5, 3, 2, 4), None)
    assert y.shape == (5, 2, 4)
    certain = torch.full((5, 3, 2), -1e3).scatter(1, torch.ones(5, 1, 2).long(), 1e3)
    assert (CATEGORICAL.sample(certain, None) == 1).all()
