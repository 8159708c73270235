"""fisher_diagonal is the definition, for every model, estimator, likelihood and batch size."""

from __future__ import annotations

import builtins
import itertools
from collections import namedtuple
from types import SimpleNamespace

import oracle
import pytest
import torch
from labels import Remembering, relabelled
from models import CLASSES, FEATURES, Net, each_model, features, linear, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import same

from ewc_fast import fisher_diagonal

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def some_batches(*sizes):
    return [(features(n), torch.randint(CLASSES, (n,))) for n in sizes or (8, 5, 1)]


@each_model()
def test_exact_is_the_expectation_over_the_models_own_labels(case):
    model, data = case.make(), case.data(8, 5, 1)
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)


@each_model()
def test_empirical_takes_the_datas_labels(case):
    model, data = case.make(), case.data(4, 3)
    found = fisher_diagonal(model, data, estimator="empirical")
    oracle.assert_fisher(found, model, data, estimator="empirical")


@each_model()
def test_sampled_takes_labels_drawn_from_the_model(case):
    model, data, likelihood = case.make(), case.data(4, 3), Remembering("categorical")
    found = fisher_diagonal(model, data, likelihood=likelihood, estimator="sampled")
    oracle.assert_fisher(found, model, relabelled(data, likelihood.drawn), estimator="empirical")


OTHER_OUTPUTS = {
    "bernoulli": ("bernoulli", (CLASSES,), lambda *s: torch.randint(2, s).float()),
    "bernoulli_one_label": ("bernoulli", (), lambda *s: torch.randint(2, s).float()),
    "bernoulli_map_of_labels": ("bernoulli", (CLASSES, 2), lambda *s: torch.randint(2, s).float()),
    "gaussian": ("gaussian", (CLASSES,), torch.randn),
    "gaussian_without_output_dimension": ("gaussian", (), torch.randn),
    "gaussian_map": ("gaussian", (2, CLASSES), torch.randn),
    "categorical_at_each_position": (
        "categorical",
        (CLASSES, 2),
        lambda n, _, *positions: torch.randint(CLASSES, (n, *positions)),
    ),
}


@pytest.mark.parametrize("estimator", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize(
    ("name", "shape", "targets"), OTHER_OUTPUTS.values(), ids=OTHER_OUTPUTS.keys()
)
def test_every_likelihood_and_shape_of_outputs(name, shape, targets, estimator):
    size = torch.Size(shape).numel()
    body, head = linear(), linear(6, size)
    model = Net(lambda m, x: m.head(m.body(x).tanh()).view(-1, *shape), body=body, head=head)
    data = [(features(n), targets(n, *shape)) for n in (4, 3)]
    likelihood = Remembering(name) if estimator == "sampled" else name
    found = fisher_diagonal(model, data, likelihood=likelihood, estimator=estimator)
    if estimator == "sampled":
        data, estimator = relabelled(data, likelihood.drawn), "empirical"
    oracle.assert_fisher(found, model, data, name, estimator)


@each_model("as_many_rows_as_samples_but_others", "time_first_as_many_as_samples")
def test_the_batch_size_does_not_matter(case):
    model, ((inputs, targets),) = case.make(), case.data(7)
    pick = oracle._change
    for size in (1, 2, 3, 7):
        cut = [
            (pick(inputs, lambda t, i=i, size=size: t[i : i + size]), targets[i : i + size])
            for i in range(0, 7, size)
        ]
        oracle.assert_fisher(fisher_diagonal(model, cut), model, [(inputs, targets)])


def test_the_fisher_is_a_mean_over_samples():
    model, data = mlp().double(), [(features(6).double(), torch.zeros(6).long())]
    once, twice = fisher_diagonal(model, data), fisher_diagonal(model, data * 2)
    for name in once:  # sums of 6 and 12 terms, of one sign
        torch.testing.assert_close(once[name], twice[name], rtol=32 * 2**-53, atol=0)


def test_the_square_is_of_each_samples_gradient_not_of_the_batchs():
    model, (x, y) = linear(outputs=CLASSES), some_batches(6)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    found = fisher_diagonal(model, [(x, y)], estimator="empirical")
    assert (found["weight"].sum() > 2 * model.weight.grad.square().sum()).item()


def test_equal_calls_draw_equal_labels_and_generators_are_used():
    model, data = mlp(), some_batches()

    def sampled(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return fisher_diagonal(model, data, estimator="sampled", generator=generator)

    assert same(sampled(), sampled())
    assert same(sampled(3), sampled(3))
    assert not same(sampled(3), sampled(4))
    assert same(sampled(3), fisher_diagonal(
        model, data, estimator="sampled", generator=torch.Generator().manual_seed(3)
    ))  # fmt: skip


def test_several_draws_are_averaged():
    model, data, likelihood = mlp(), some_batches(4), Remembering("categorical")
    found = fisher_diagonal(model, data, likelihood=likelihood, estimator="sampled", draws=3)
    assert len(likelihood.drawn) == 3
    # every sample three times, with each of its labels once
    oracle.assert_fisher(
        found, model, relabelled(data * 3, likelihood.drawn), estimator="empirical"
    )


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_sampled_is_unbiased_for_exact(name):
    model, data = nn.Linear(2, CLASSES), [torch.randn(3, 2).repeat(200, 1)]
    exact = fisher_diagonal(model, data, likelihood=name)
    generator = torch.Generator().manual_seed(5)
    options = {"likelihood": name, "estimator": "sampled", "draws": 2, "generator": generator}
    runs = [fisher_diagonal(model, data, **options) for _ in range(50)]
    for key, expected in exact.items():
        drawn = torch.stack([run[key] for run in runs])  # each the mean of 1200 draws
        standard_error = drawn.std(0) / len(runs) ** 0.5
        # Student's t with 49 degrees of freedom is beyond 6 once in 4 million; here are 27 entries
        assert ((drawn.mean(0) - expected).abs() <= 6 * standard_error).all()


def test_max_samples_cuts_the_last_batch_and_reads_no_further():
    model, data = mlp(), some_batches(4, 4, 4)
    read = itertools.count()
    found = fisher_diagonal(model, (data[next(read)] for _ in range(3)), max_samples=6)
    assert next(read) == 2
    (x, y), (u, v) = data[:2]
    assert same(found, fisher_diagonal(model, [(x, y), (u[:2], v[:2])]))


Pair = namedtuple("Pair", "x y")
X = torch.linspace(-1, 1, 4 * FEATURES).view(4, FEATURES)
Y = torch.tensor([0, 1, 2, 1])
FORMS = {
    "pair": [(X, Y)],
    "list": [[X, Y]],
    "inputs_alone": [X],
    "inputs_in_a_tuple": [(X,)],
    "mapping": [{"x": X, "labels": Y}],
    "mapping_without_labels": [{"x": X}],
    "nested_tuple_of_inputs": [((X,), Y)],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "generator": None,
    "empty_batch_between": [(X[:2], Y[:2]), (X[:0], Y[:0]), (X[2:], Y[2:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_batches(form):
    model = Net(lambda m, x: m.net(x), net=mlp())
    batches = ((X[i : i + 1], Y[i : i + 1]) for i in range(4)) if form == "generator" else None
    found = fisher_diagonal(model, batches or FORMS[form])
    oracle.assert_fisher(found, model, [(X, Y)])


def test_inputs_may_be_a_named_tuple():
    model = Net(lambda m, x, y: m.net(x * y), net=mlp())
    oracle.assert_fisher(
        fisher_diagonal(model, [(Pair(X, X), Y)]), model, [((X, X), Y)]
    )  # fmt: skip


def test_the_call_of_the_model_can_be_replaced():
    model = Net(lambda m, x: SimpleNamespace(wrapped=[m.net(x)]), net=mlp())
    found = fisher_diagonal(model, [(X, Y)], forward=lambda m, x: m(x).wrapped[0])
    assert same([*found.values()], [*fisher_diagonal(model.net, [(X, Y)]).values()])


def test_the_likelihood_can_be_the_users_own():
    class Poisson:
        def log_prob(self, outputs, targets):
            return torch.distributions.Poisson(outputs.exp()).log_prob(targets).sum(1)

        def sample(self, outputs, generator):
            return torch.poisson(outputs.exp(), generator)

    model = nn.Linear(2, 1, bias=False)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [1.0]])
    found = fisher_diagonal(model, [(x, y)], likelihood=Poisson(), estimator="empirical")
    expected = ((y - (model(x)).exp()) * x).square().mean(0)  # d log p / d z = y - e^z
    torch.testing.assert_close(found["weight"][0], expected, rtol=16 * 2**-24, atol=0)


def test_it_works_where_gradients_are_switched_off():
    model, data = mlp(), some_batches()
    with torch.no_grad():
        found = fisher_diagonal(model, data)
    assert same(found, fisher_diagonal(model, data))


def test_a_model_whose_outputs_depend_on_no_parameter_has_zero_fisher():
    model = Net(lambda m, x: (m.spare(x), m.head(x))[1], spare=linear(),
                head=linear(outputs=CLASSES).requires_grad_(False))  # fmt: skip
    found = fisher_diagonal(model, some_batches())
    assert list(found) == ["spare.weight", "spare.bias"]
    assert not any(values.any() for values in found.values())


def test_a_hook_on_a_parameter_sees_its_gradients():
    model, data = mlp(), some_batches(4)
    plain = fisher_diagonal(model, data)
    model[0].weight.register_hook(lambda grad: grad * 2)
    hooked = fisher_diagonal(model, data)
    torch.testing.assert_close(hooked["0.weight"], 4 * plain["0.weight"], rtol=64 * 2**-24, atol=0)


def test_progress_needs_tqdm_and_says_so(monkeypatch, capsys):
    model, data = mlp(), some_batches()
    assert same(fisher_diagonal(model, data, progress=True), fisher_diagonal(model, data))
    assert "Fisher" in capsys.readouterr().err
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        fisher_diagonal(model, data, progress=True)
