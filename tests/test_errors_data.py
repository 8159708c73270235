"""Bad data, options and models for a Fisher: each its own clear error, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from models import FEATURES, Net, features, mlp
from training import all_of, same

from ewc_fast import fisher_diagonal

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
    "samples_in_another_dimension": (lambda z: z.t(), "exact", ValueError, "expected . samples"),
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
        fisher_diagonal(features, [(X, Y)])
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        fisher_diagonal(mlp().requires_grad_(False), [(X, Y)])
