"""Scores of low-precision and of saturated outputs keep the digits that the outputs have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from brute import CASES, each_case, second_moments, vectors
from numerics import assert_within, u

from ewc_fast.fisher import Batch
from ewc_fast.fisher.scores import ESTIMATORS, Scores

low_precision = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "float32"]
)


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "sampled"])
@each_case
@low_precision
def test_low_precision_outputs_cost_one_rounding(case, dtype, estimator):
    low = replace(case, outputs=case.outputs.to(dtype))
    same = replace(case, outputs=low.outputs.double())
    for found, exact in zip(vectors(low, estimator), vectors(same, estimator), strict=True):
        # computed in float32, some 32 roundings with sums and cancellations, then rounded
        budget = u(dtype) * exact.abs() + 32 * u(torch.float32) * exact.abs().max()
        assert_within(found, exact, budget + torch.finfo(dtype).tiny, "vector")


@each_case
@low_precision
def test_labels_are_drawn_for_low_precision_outputs(case, dtype):
    (found,) = vectors(replace(case, outputs=case.outputs.to(dtype)), "sampled")
    assert found.isfinite().all()
    assert found.any()


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_saturated_softmax_keeps_its_digits(estimator, at, gap):
    z = torch.zeros(1, 5)
    z[0, at] = gap
    batch = Batch(None, torch.tensor([at]), None, 1)
    scores = Scores("categorical", estimator)
    found = list(scores.vectors(z, batch))
    tail = 4 * torch.tensor(-gap).double().exp()  # 1 - p to first order, relative error 1e-9
    if estimator == "empirical":
        assert abs(found[0][0, at] / tail - 1) < 1e-5
        return
    assert abs(second_moments(found)[0, at, at] / tail - 1) < 1e-5


@pytest.mark.parametrize("at", [0, 2, 4])
def test_random_signs_keep_the_digits_of_a_saturated_softmax(at):
    z = torch.zeros(4000, 5)
    z[:, at] = 40.0
    scores = Scores("categorical", "rademacher", 1, torch.Generator().manual_seed(0))
    found = second_moments(scores.vectors(z, Batch(None, None, None, 4000)))
    p = z[:1].double().softmax(1)
    expected = (p - p.square())[0]
    expected[at] = 4 * torch.tensor(-40.0).double().exp()
    drawn = found.diagonal(dim1=1, dim2=2)
    # bounded terms: a mean of 4000 is beyond 6 standard errors once in 500 million
    budget = 6 * drawn.std(0) / 4000**0.5 + 1e-5 * expected
    assert_within(drawn.mean(0), expected, budget, "variances")


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "sampled"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "own" and "gaussian" not in n])
def test_outputs_that_are_not_numbers_stay_visible(name, estimator):
    case = CASES[name]
    broken = replace(case, outputs=torch.full_like(case.outputs, torch.nan))
    assert any(vector[0].isnan().any() for vector in vectors(broken, estimator))


def test_saturated_sigmoids_keep_their_digits():
    z = torch.tensor([[30.0, -30.0, 80.0, -80.0]])
    sure = z.new_tensor([[1.0, 0.0, 1.0, 0.0]])
    (right,) = Scores("bernoulli", "empirical").vectors(z, Batch(None, sure, None, 1))
    expected = (-z.abs().double()).exp() * z.sign()
    assert_within(right, expected, 1e-5 * expected.abs(), "score")
    (wrong,) = Scores("bernoulli", "empirical").vectors(z, Batch(None, 1 - sure, None, 1))
    assert_within(wrong, -z.sign().double(), 1e-6, "score")
