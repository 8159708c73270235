"""Bad input to EWC, its wrapper and its Fisher: each its own clear error, and nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from models import linear, mlp
from torch import nn, optim
from training import batch

from ewc_fast import EWC, EWCOptimizer

STRENGTHS = [-1.0, -1e-30, math.nan, math.inf, 1e39]
each_bad_strength = pytest.mark.parametrize("value", STRENGTHS, ids=str)
each_bad_gamma = pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, math.nan, math.inf], ids=str)


@each_bad_strength
def test_a_strength_must_be_finite_and_not_negative(scene, value):
    message = "ewc_lambda: expected a number >= 0 and finite in float32, got"
    with pytest.raises(ValueError, match=message):
        scene[1].ewc_lambda = value
    with pytest.raises(ValueError, match=message):
        EWC(scene[0], ewc_lambda=value)


@each_bad_gamma
def test_a_decay_must_be_in_its_interval(scene, value):
    message = r"gamma: expected a number in \(0, 1\] \(1 forgets nothing\), got"
    with pytest.raises(ValueError, match=message):
        scene[1].gamma = value
    with pytest.raises(ValueError, match=message):
        EWC(scene[0], ewc_lambda=1.0, gamma=value)


def test_strength_and_decay_must_be_numbers(scene):
    with pytest.raises(TypeError, match="ewc_lambda: expected a number, got NoneType"):
        scene[1].ewc_lambda = None
    with pytest.raises(TypeError, match="gamma: expected a number, got list"):
        scene[1].gamma = [1.0]


CONSTRUCTIONS = {
    "unknown_anchor": (
        lambda m: EWC(m, ewc_lambda=1.0, anchor="first"),
        ValueError,
        "anchor: expected one of 'merged', 'latest', got 'first'",
    ),
    "unknown_implementation": (
        lambda m: EWC(m, ewc_lambda=1.0, impl="gpu"),
        ValueError,
        "impl: expected one of 'auto', .*got 'gpu'",
    ),
    "integer_parameter": (
        lambda m: EWC([("n", nn.Parameter(torch.arange(3), requires_grad=False))], ewc_lambda=1.0),
        TypeError,
        r"parameter 'n': expected a floating dtype, got int64.*is_floating_point\(\)",
    ),
    "sparse_parameter": (
        lambda m: EWC([("n", torch.eye(3).to_sparse())], ewc_lambda=1.0),
        TypeError,
        "parameter 'n': expected a dense tensor, got layout torch.sparse_coo",
    ),
    "parameters_without_names": (
        lambda m: EWC(m.parameters(), ewc_lambda=1.0),
        TypeError,
        r"model: expected a module or \(name, parameter\) pairs.*model.named_parameters\(\)",
    ),
    "name_given_twice": (
        lambda m: EWC([*m.named_parameters()] * 2, ewc_lambda=1.0),
        ValueError,
        "parameter '0.weight': given twice; give each name once",
    ),
    "model_without_parameters": (
        lambda m: EWC(nn.Tanh(), ewc_lambda=1.0),
        ValueError,
        "model: expected at least one parameter, got none",
    ),
}


@pytest.mark.parametrize(
    ("make", "error", "message"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS.keys()
)
def test_bad_constructions(scene, make, error, message):
    with pytest.raises(error, match=message):
        make(scene[0])


def test_one_parameter_under_two_names_is_refused_before_it_counts_twice(scene):
    model = nn.Sequential(linear(6), linear(6))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1.weight': the same tensor as '0.weight'.*once"):
        EWC(model.named_parameters(remove_duplicate=False), ewc_lambda=1.0)


WRAPPERS = {
    "no_optimizer": (
        lambda m, e: EWCOptimizer(m, e),
        TypeError,
        "optimizer: expected a torch.optim.Optimizer, got Sequential",
    ),
    "no_ewc": (
        lambda m, e: EWCOptimizer(optim.SGD(m.parameters()), m),
        TypeError,
        "ewc: expected an ewc_fast.EWC, got Sequential",
    ),
    "unknown_mode": (
        lambda m, e: EWCOptimizer(optim.SGD(m.parameters()), e, mode="implicit"),
        ValueError,
        "mode: expected one of 'gradient', 'proximal', got 'implicit'",
    ),
    "another_models_optimizer": (
        lambda m, e: EWCOptimizer(optim.SGD(mlp().parameters()), e),
        ValueError,
        "optimizer: holds none of the parameters that ewc tracks; build both from the same model",
    ),
    "maximizing_optimizer": (
        lambda m, e: EWCOptimizer(optim.SGD(m.parameters(), maximize=True), e),
        ValueError,
        "optimizer: maximize=True would.*push away.*mode='proximal'",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), WRAPPERS.values(), ids=WRAPPERS.keys())
def test_bad_wrappers(scene, make, error, message):
    with pytest.raises(error, match=message):
        make(*scene[:2])


def good_fisher(model):
    return {n: torch.rand_like(p) for n, p in model.named_parameters()}


def entry(value):
    def spoil(fisher):
        fisher["2.weight"][3, 1] = value

    return spoil


FISHERS = {
    "negative": (entry(-1e-9), ValueError, r"fisher\['2.weight'\].*entries >= 0.*from -1e-09"),
    "nan": (entry(math.nan), ValueError, r"fisher\['2.weight'\]: expected finite.*nan"),
    "infinite": (entry(math.inf), ValueError, r"fisher\['2.weight'\]: expected finite.*to inf"),
    "missing_name": (
        lambda f: f.pop("4.bias"),
        ValueError,
        "fisher: missing for '4.bias'; pass zeros",
    ),
    "unknown_name": (
        lambda f: f.update(extra=torch.ones(1)),
        ValueError,
        "fisher: no parameter is named 'extra'",
    ),
    "another_shape": (
        lambda f: f.update({"2.bias": torch.ones(7)}),
        ValueError,
        r"fisher\['2.bias'\]: expected shape \(6,\) of the parameter, got \(7,\)",
    ),
    "shape_that_would_broadcast": (
        lambda f: f.update({"2.weight": torch.ones(6, 1)}),
        ValueError,
        r"fisher\['2.weight'\]: expected shape \(6, 7\) of the parameter, got \(6, 1\)",
    ),
    "integers": (
        lambda f: f.update({"2.bias": torch.ones(6).long()}),
        TypeError,
        r"fisher\['2.bias'\]: expected a floating dtype, got int64",
    ),
    "no_tensor": (
        lambda f: f.update({"2.bias": [1.0] * 6}),
        TypeError,
        r"fisher\['2.bias'\]: expected a torch.Tensor, got list",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), FISHERS.values(), ids=FISHERS.keys())
def test_bad_fishers(scene, spoil, error, message):
    fisher = {name: torch.ones_like(values) for name, values in good_fisher(scene[0]).items()}
    spoil(fisher)
    with pytest.raises(error, match=message):
        scene[1].consolidate_from(fisher)


def test_a_fisher_must_be_a_mapping(scene):
    with pytest.raises(TypeError, match=r"fisher: expected a mapping of parameter names.*got list"):
        scene[1].consolidate_from([torch.ones(1)])


def test_consolidate_needs_a_model(scene):
    ewc = EWC(scene[0].named_parameters(), ewc_lambda=1.0)
    with pytest.raises(ValueError, match=r"consolidate needs the model.*consolidate_from"):
        ewc.consolidate([batch(scene[0])])
