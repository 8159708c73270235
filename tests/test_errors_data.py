"""Bad data, options and models for a Fisher: each its own clear error, and nothing changed."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import make_dataclass

import pytest
import torch
from models import FEATURES, Net, features, mlp
from training import all_of, same

from ewc_fast import fisher_diagonal
from ewc_fast.fisher import Categorical


class WithoutSample:
    """A likelihood that forgets to tell samples apart."""

    def log_prob(self, outputs, targets):
        return outputs.mean()


Pair = namedtuple("Pair", "x y")
Example = make_dataclass("Example", ["image", "label"])
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
    "four_items": ([(X, Y, Y, Y)], {}, TypeError, r"batches\[0\]: expected \(inputs, .*length 4"),
    "a_named_tuple": (
        [Pair(X, Y)],
        {},
        TypeError,
        r"batches\[0\]: .*got Pair with the fields x, y, of which.*mapping with the key 'labels'",
    ),
    "a_dataclass": (
        [Example(X, Y)],
        {},
        TypeError,
        r"batches\[0\]: .*got Example with the fields image, label, of which nothing says",
    ),
    "three_inputs": (
        [(X, X, X)],
        {},
        ValueError,
        r"batches\[0\] weights: .*shape \(4,\), got shape \(4, 5\); several inputs.*\(\(x1, x2\)",
    ),
    "negative_weights": (
        [(X, Y), (X, Y, torch.tensor([1.0, 0.0, -2.0, 1.0]))],
        {},
        ValueError,
        r"batches\[1\] weights: expected finite numbers >= 0, got -2.0 for sample 2",
    ),
    "infinite_weights": (
        [{"x": X, "sample_weight": torch.tensor([1.0, torch.inf, 1.0, 1.0])}],
        {},
        ValueError,
        r"batches\[0\] weights: expected finite numbers >= 0, got inf for sample 1",
    ),
    "undefined_weights": (
        [(X, Y, torch.full((4,), torch.nan))],
        {},
        ValueError,
        r"batches\[0\] weights: expected finite numbers >= 0, got nan for sample 0",
    ),
    "complex_weights": (
        [(X, Y, torch.ones(4) * 1j)],
        {},
        TypeError,
        r"batches\[0\] weights: expected real numbers, got torch.complex64",
    ),
    "weights_of_another_kind": (
        [(X, Y, [1.0] * 4)],
        {},
        TypeError,
        r"batches\[0\] weights: expected a tensor, got list",
    ),
    "weights_for_other_samples": (
        [(X, Y, torch.ones(3))],
        {},
        ValueError,
        r"batches\[0\] weights: expected one for each sample, shape \(4,\), got shape \(3,\)",
    ),
    "no_weight_at_all": (
        [(X, Y, torch.zeros(4))],
        {},
        ValueError,
        "batches: expected at least one sample, got none that counts",
    ),
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
    "batched_without_targets": (
        [X],
        {"estimator": "batched"},
        ValueError,
        "estimator: 'batched' needs targets.*'exact' or 'sampled'",
    ),
    "unknown_estimator": ([(X, Y)], {"estimator": "true"}, ValueError, "estimator: expected one"),
    "unknown_likelihood": (
        [(X, Y)],
        {"likelihood": "laplace"},
        ValueError,
        "likelihood: expected one of 'categorical', 'causal_lm', 'bernoulli', .*, got 'laplace'",
    ),
    "exact_of_ones_own_likelihood": (
        [(X, Y)],
        {"likelihood": object()},
        TypeError,
        r"likelihood: .*'exact' needs.*directions\(outputs\), got object; use .*'sampled'",
    ),
    "rademacher_of_ones_own_likelihood": (
        [(X, Y)],
        {"likelihood": object(), "estimator": "rademacher"},
        TypeError,
        r"likelihood: .*'rademacher' needs.*directions\(outputs\), got object; use .*'sampled'",
    ),
    "sampling_without_sample": (
        [(X, Y)],
        {"likelihood": WithoutSample(), "estimator": "sampled"},
        TypeError,
        r"likelihood: .*'sampled' needs.* sample\(outputs, generator\), got WithoutSample$",
    ),
    "log_prob_of_the_whole_batch": (
        [(X, Y)],
        {"likelihood": WithoutSample(), "estimator": "empirical"},
        ValueError,
        r"WithoutSample.log_prob must return one number.*shape \(4,\), got shape \(\)",
    ),
    "a_class_for_a_likelihood": (
        [(X, Y)],
        {"likelihood": Categorical},
        TypeError,
        r"likelihood: .*got the class Categorical; write Categorical\(\)",
    ),
    "a_seed_for_a_generator": (
        [(X, Y)],
        {"estimator": "sampled", "generator": 3},
        TypeError,
        "generator: expected a torch.Generator, got int",
    ),
    "draws_without_sampling": (
        [(X, Y)],
        {"draws": 3},
        ValueError,
        "draws: only estimator='sampled' and 'rademacher' draw, got 3 with 'exact'",
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
