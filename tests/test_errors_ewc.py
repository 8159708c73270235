"""Bad input to EWC, its wrapper and its Fisher: each its own clear error, and nothing changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import CLASSES, FEATURES, Net, features, linear, mlp
from torch import nn, optim
from training import all_of, batch, consolidated, loss, same

from ewc_fast import EWC, EWCOptimizer, fisher_diagonal


@pytest.fixture
def scene():
    """A model in mid-training, its EWC and wrapper; afterwards all must be as it was."""
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.Adam(model.parameters(), lr=0.01), ewc)
    loss(model, batch(model)).backward()
    optimizer.step()
    before = all_of(model), copy.deepcopy(optimizer.state_dict()), repr(ewc)
    yield model, ewc, optimizer
    assert same((all_of(model), optimizer.state_dict(), repr(ewc)), before)


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
    with pytest.raises(TypeError, match="fisher: expected a mapping of parameter names.*got list"):
        scene[1].consolidate_from([torch.ones(1)])


def test_consolidate_needs_a_model(scene):
    ewc = EWC(scene[0].named_parameters(), ewc_lambda=1.0)
    with pytest.raises(ValueError, match=r"consolidate needs the model.*consolidate_from"):
        ewc.consolidate([batch(scene[0])])


X, Y = torch.ones(4, FEATURES), torch.tensor([0, 1, 2, 0])
DATA = {
    "no_batches": ([], {}, ValueError, "batches: expected at least one sample, got none"),
    "empty_batches": ([(X[:0], Y[:0])] * 2, {}, ValueError, "batches: expected at least one"),
    "no_batch_dimension": (
        [(torch.tensor(1.0), Y)],
        {},
        ValueError,
        r"batches\[0\] inputs: expected a batch dimension.*unsqueeze\(0\)",
    ),
    "targets_without_batch_dimension": (
        [(X, Y), (X, torch.tensor(1))],
        {},
        ValueError,
        r"batches\[1\] targets: expected a batch dimension",
    ),
    "as_many_targets_as_samples": (
        [(X, Y), (X, Y[:3])],
        {},
        ValueError,
        r"batches\[1\]: expected the samples in dimension 0.*inputs: 4, .*targets: 3",
    ),
    "three_items": ([(X, Y, Y)], {}, TypeError, r"batches\[0\]: expected \(inputs, .*length 3"),
    "a_string": (["x"], {}, TypeError, r"batches\[0\]: expected \(inputs, .*got str"),
    "targets_of_another_kind": (
        [(X, [0, 1, 2, 0])],
        {},
        TypeError,
        r"batches\[0\]: expected targets to be a tensor, got list",
    ),
    "no_tensor_among_the_inputs": (
        [{"labels": Y}],
        {},
        TypeError,
        r"batches\[0\]: expected at least one input tensor, got none",
    ),
    "empirical_without_targets": (
        [X],
        {"estimator": "empirical"},
        ValueError,
        "estimator: 'empirical' needs targets",
    ),
    "unknown_estimator": ([(X, Y)], {"estimator": "true"}, ValueError, "estimator: expected one"),
    "unknown_likelihood": (
        [(X, Y)],
        {"likelihood": "poisson"},
        ValueError,
        "likelihood: expected one of 'categorical', 'bernoulli', 'gaussian', got 'poisson'",
    ),
    "exact_of_ones_own_likelihood": (
        [(X, Y)],
        {"likelihood": object()},
        ValueError,
        r"'exact' needs a likelihood with directions\(outputs\), got object.*'sampled'",
    ),
    "draws_without_sampling": (
        [(X, Y)],
        {"draws": 3},
        ValueError,
        "draws: only estimator='sampled' draws labels, got 'exact'",
    ),
    "no_draws": ([(X, Y)], {"draws": 0}, ValueError, "draws: expected an integer >= 1, got 0"),
    "half_a_sample": ([(X, Y)], {"max_samples": 0.5}, TypeError, "max_samples: expected an int"),
    "no_samples": ([(X, Y)], {"max_samples": 0}, ValueError, "max_samples: expected an integer >="),
}


@pytest.mark.parametrize(("batches", "options", "error", "message"), DATA.values(), ids=DATA.keys())
def test_bad_data(scene, batches, options, error, message):
    with pytest.raises(error, match=message):
        scene[1].consolidate(batches, **options)


OUTPUTS = {
    "samples_in_another_dimension": (lambda z: z.t(), "exact", ValueError, "expected 4 samples"),
    "a_mean_over_samples": (lambda z: z.mean(), "exact", TypeError, "samples in dimension 0"),
    "a_dictionary": (lambda z: {"z": z}, "exact", TypeError, "got dict; pass forward="),
    "one_class": (lambda z: z[:, :1], "exact", ValueError, r"two or more classes.*\(4, 1\)"),
    "no_class_dimension": (lambda z: z[:, 0], "sampled", ValueError, r"two or more.*\(4,\)"),
}


@pytest.mark.parametrize(
    ("change", "estimator", "error", "message"), OUTPUTS.values(), ids=OUTPUTS.keys()
)
def test_bad_outputs(change, estimator, error, message):
    model = Net(lambda m, x: change(m.net(x)), net=mlp())
    before = all_of(model)
    with pytest.raises(error, match=message):
        fisher_diagonal(model, [(X, Y)], estimator=estimator)
    assert same(all_of(model), before)


def test_bad_models_for_a_fisher():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        fisher_diagonal(torch.relu_ and features, [(X, Y)])
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        fisher_diagonal(mlp().requires_grad_(False), [(X, Y)])


def without(*path):
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return spoil


def of_another_model(state):
    other = EWC(nn.Linear(FEATURES, CLASSES), ewc_lambda=1.0)
    other.consolidate_from({"weight": torch.ones(CLASSES, FEATURES), "bias": torch.ones(CLASSES)})
    state.update(other.state_dict())


def of_a_wider_model(state):
    for field in ("fisher", "anchor", "residual"):
        state[field]["2.weight"] = torch.ones(6, 9)


STATES = {
    "newer_format": (
        lambda s: s.update(format=99),
        "state: format 99 is newer than 1.*upgrade ewc_fast",
    ),
    "format_of_another_kind": (lambda s: s.update(format="2.0"), "state: format '2.0'"),
    "something_else": (lambda s: s.clear(), r"state: expected what EWC.state_dict\(\) returned"),
    "another_model": (of_another_model, "state: of another model.*'bias', 'weight'.*strict=False"),
    "a_wider_model": (
        of_a_wider_model,
        r"state\['fisher'\]\['2.weight'\]: expected shape \(6, 7\).*got \(6, 9\); is it of another",
    ),
    "without_anchor": (without("anchor"), "state: truncated, it lacks 'anchor'"),
    "without_settings": (without("gamma"), "state: truncated, it lacks 'gamma'"),
    "without_one_anchor": (
        without("anchor", "2.bias"),
        "state: truncated, fisher and anchor differ in '2.bias'",
    ),
    "without_one_residual": (
        without("residual", "2.bias"),
        "state: truncated, fisher and residual differ in '2.bias'",
    ),
    "without_one_fisher": (
        without("fisher", "2.bias"),
        "state: truncated, fisher and anchor differ in '2.bias'",
    ),
    "negative_strength": (lambda s: s.update(ewc_lambda=-1.0), r"state\['ewc_lambda'\]: expected"),
    "bad_decay": (lambda s: s.update(gamma=0.0), "gamma: expected a number in"),
    "unknown_rule": (lambda s: s.update(rule="x"), r"state\['rule'\]: expected one of 'merged'"),
    "no_constant": (lambda s: s.update(constant=None), r"state\['constant'\]: expected a number"),
    "nan_constant": (lambda s: s.update(constant=math.nan), r"state\['constant'\]: expected a num"),
    "no_count_of_tasks": (lambda s: s.update(tasks="?"), r"state\['tasks'\]: expected a number"),
    "no_tensor": (
        lambda s: s["fisher"].update({"2.bias": 1.0}),
        r"state\['fisher'\]\['2.bias'\]: expected a torch.Tensor, got float",
    ),
}


@pytest.mark.parametrize("through", ["ewc", "optimizer"])
@pytest.mark.parametrize(("spoil", "message"), STATES.values(), ids=STATES.keys())
def test_bad_states(scene, spoil, message, through):
    _, ewc, optimizer = scene
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"].fill_(7.0)
    spoil(state["ewc"])
    with pytest.raises((TypeError, ValueError), match=message):
        if through == "ewc":
            ewc.load_state_dict(state["ewc"])
        else:
            optimizer.load_state_dict(state)


def test_a_bad_state_of_the_inner_optimizer_leaves_the_ewc_as_it_was(scene):
    state = copy.deepcopy(scene[2].state_dict())
    state["ewc"]["ewc_lambda"] = 5.0
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        scene[2].load_state_dict(state)
