"""The whole Fisher matrix: a Hessian's expectation, and its diagonal the other function's."""

from __future__ import annotations

import pytest
import torch
from models import CASES, CLASSES, FEATURES, Net, features, head, linear, mlp
from numerics import assert_within, u
from torch import nn
from torch.func import functional_call, grad, hessian, vmap
from training import all_of, same

from ewc_fast import fisher_diagonal
from ewc_fast.fisher import Poisson, fisher_matrix, parameter_slices

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def flat(model):
    """Return the parameters as one vector, and the logits as a function of it and the inputs."""
    slices = parameter_slices(model)
    params = dict(model.named_parameters())
    theta = torch.cat([params[name].detach().flatten() for name in slices])

    def logits(theta, x):
        parts = {name: theta[s].view_as(params[name]) for name, s in slices.items()}
        return functional_call(model, parts, (x[None],))[0]

    return theta, logits


no_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # hessian's
MODELS = {
    "softmax_regression": lambda: nn.Linear(FEATURES, CLASSES).double(),
    "two_layers": lambda: nn.Sequential(linear(outputs=4), nn.Tanh(), nn.Linear(4, 3)).double(),
}


@no_warning
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_it_is_minus_the_expected_hessian_of_the_log_probability(make):
    """E[-Hessian log p] = E[g g^T], labels from the model: Aich 2021, equation 9."""
    model, x = make(), features(6).double()
    theta, logits = flat(model)
    expected = torch.zeros(len(theta), len(theta)).double()
    for n in range(6):
        p = logits(theta, x[n]).softmax(0)
        for y in range(CLASSES):
            minus_log_p = lambda t, n=n, y=y: -logits(t, x[n]).log_softmax(0)[y]  # noqa: E731
            expected += p[y] * hessian(minus_log_p)(theta) / 6
    found = fisher_matrix(model, [x])
    assert found.dtype == torch.float64
    # sums of 18 terms of a dozen operations each, which cancel for the curved model
    assert_within(found, expected, 256 * u(torch.float64) * expected.abs().max(), "matrix")


@no_warning
def test_of_a_softmax_regression_it_is_the_hessian_of_the_loss_at_any_labels():
    model, x, y = nn.Linear(FEATURES, CLASSES).double(), features(6).double(), torch.arange(6) % 3
    theta, logits = flat(model)

    def loss(theta):
        each = [-logits(theta, a).log_softmax(0)[b] for a, b in zip(x, y, strict=True)]
        return torch.stack(each).mean()

    expected = hessian(loss)(theta)
    found = fisher_matrix(model, [(x, y)])
    assert_within(found, expected, 256 * u(torch.float64) * expected.abs().max(), "matrix")


def test_empirical_is_the_mean_of_outer_products():
    model, x, y = mlp().double(), features(5).double(), torch.tensor([0, 1, 2, 0, 1])
    theta, logits = flat(model)
    log_p = lambda t, a, b: logits(t, a).log_softmax(0).gather(0, b[None])[0]  # noqa: E731
    g = vmap(grad(log_p), in_dims=(None, 0, 0))(theta, x, y)
    found = fisher_matrix(model, [(x[:3], y[:3]), (x[3:], y[3:])], estimator="empirical")
    expected = g.t() @ g / 5
    assert_within(found, expected, 256 * u(torch.float64) * expected.abs().max(), "matrix")


OPTIONS = {
    "exact": {},
    "empirical": {"estimator": "empirical"},
    "batched": {"estimator": "batched"},
    "fewer_samples": {"max_samples": 6},
    "another_likelihood": {"likelihood": Poisson()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", ["mlp_float64", "frozen_layers", "unused_parameter"])
def test_its_diagonal_is_the_fisher_diagonal(name, options):
    model = CASES[name].make().double()
    weights = torch.tensor([1.0, 0.0, 3.0, 0.5])
    data = [(features(4).double(), torch.randint(CLASSES, (4,)), weights) for _ in range(2)]
    diagonal = fisher_diagonal(model, data, **options)
    before = all_of(model)
    found = fisher_matrix(model, data, **options)
    assert same(all_of(model), before)
    slices = parameter_slices(model)
    assert list(slices) == list(diagonal)
    assert torch.equal(found, found.t())
    for name, s in slices.items():
        expected = diagonal[name].flatten()
        budget = 256 * u(torch.float64) * expected.abs().max()
        assert_within(found.diagonal()[s], expected, budget, name)


@pytest.mark.parametrize("estimator", ["sampled", "rademacher"])
def test_drawn_matrices_are_unbiased(estimator):
    model, data = nn.Linear(2, CLASSES).double(), [torch.randn(1, 2).double().repeat(500, 1)]
    exact = fisher_matrix(model, data, max_samples=1)
    generator = torch.Generator().manual_seed(2)
    options = {"estimator": estimator, "generator": generator, "draws": 2}
    runs = torch.stack([fisher_matrix(model, data, **options) for _ in range(10)])
    # Means of 10 means of 1000: Student's t with 9 degrees of freedom is beyond 12 once in a
    # million; there are 45 entries. Each is a sum of 1000 terms, one after the other.
    budget = 12 * runs.std(0) / 10**0.5 + 1000 * u(torch.float64) * exact.max()
    assert_within(runs.mean(0), exact, budget, estimator)


def test_the_call_of_the_model_can_be_replaced():
    model = Net(lambda m, x: {"z": m.head(x)}, head=head())
    x = torch.randn(3, 6)
    found = fisher_matrix(model, [x], forward=lambda m, x: m(x)["z"])
    assert torch.equal(found, fisher_matrix(model.head, [x]))


def test_outputs_that_depend_on_no_parameter_have_no_information():
    model = Net(lambda m, x: m.head(x), head=head().requires_grad_(False), spare=linear())
    assert not fisher_matrix(model, [torch.randn(3, 6)]).any()


def test_too_many_parameters_and_too_few_samples_are_errors():
    with pytest.raises(ValueError, match=r"at most 20,000 .*got 20,100 \(3 GB\); use fisher_diag"):
        fisher_matrix(nn.Linear(200, 100), [torch.randn(3, 200)])
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        fisher_matrix(mlp(), [])
    with pytest.raises(ValueError, match="max_samples: expected an integer >= 1"):
        fisher_matrix(mlp(), [features(3)], max_samples=0)
