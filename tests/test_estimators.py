"""Estimators, weights and likelihoods from end to end: models, data, Fisher diagonals."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
import torch
from brute import CASES as LIKELIHOODS
from brute import NO
from models import CLASSES, FEATURES, POSITIONS, Net, each_model, features, head, linear, mlp
from numerics import assert_within, u
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import same

from ewc_fast import EWC, fisher_diagonal
from ewc_fast.fisher import Categorical, CausalLM

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def some_data(*sizes):
    return [(features(n), torch.randint(CLASSES, (n,))) for n in sizes or (8, 5, 1)]


def close(found, expected, roundings=256):
    assert list(found) == list(expected)
    for name, values in expected.items():
        budget = roundings * u(values.dtype) * values.abs().max()
        assert_within(found[name], values, budget, name)


@each_model()
def test_batched_squares_the_gradient_of_a_batchs_mean(case):
    model, data = case.make(), case.data(4, 3)
    found = fisher_diagonal(model, data, estimator="batched")
    expected = {name: torch.zeros_like(values) for name, values in found.items()}
    model.eval()
    for inputs, targets in data:
        result = oracle._outputs(model, inputs)
        params = [model.get_parameter(name) for name in found]
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(result, targets), params, materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
        for name, grad in zip(found, grads, strict=True):
            expected[name] += grad.to(expected[name]).square() / 2
    roundings = 2**10 if "bfloat16" in str(params[0].dtype) else 64
    for name, values in expected.items():
        budget = roundings * u(params[0].dtype) * values.max() if values.numel() else 0
        assert_within(found[name], values, budget, name)


def test_batched_times_its_batch_size_squared_is_the_square_of_the_sum():
    model, data = mlp().double(), [(features(5).double(), torch.randint(CLASSES, (5,)))]
    found = fisher_diagonal(model, data, estimator="batched")
    nn.functional.cross_entropy(model(data[0][0]), data[0][1], reduction="sum").backward()
    close({name: 25 * values for name, values in found.items()},
          {name: p.grad.square() for name, p in model.named_parameters()})  # fmt: skip


@each_model("weight_norm", "transformer_layer", "lstm")
def test_random_signs_are_unbiased(case):
    model, ((inputs, _),) = case.make().double(), case.data(4)
    inputs = oracle._change(inputs, lambda t: oracle._cast(t, torch.float64))
    exact = fisher_diagonal(model, [(inputs,)])
    options = {"estimator": "rademacher", "generator": torch.Generator().manual_seed(3)}
    runs = [fisher_diagonal(model, [(inputs,)] * 4, draws=4, **options) for _ in range(8)]
    for name, expected in exact.items():
        if expected.numel() == 0:
            continue
        drawn = torch.stack([run[name].sum() for run in runs])  # each of 64 vectors
        error = drawn.std() / len(runs) ** 0.5
        # Student's t with 7 degrees of freedom is beyond 20 once in 5 million
        rounding = 256 * u(torch.float64) * expected.sum()
        assert (drawn.mean() - expected.sum()).abs() <= 20 * error + rounding, name


def repeated(tensor, times):
    return torch.cat([tensor[n : n + 1].expand(k, *tensor.shape[1:]) for n, k in enumerate(times)])


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", [n for n in LIKELIHOODS if "each_sample" not in n])
def test_whole_weights_are_repeated_samples(name, estimator):
    case, times = LIKELIHOODS[name], [2, 0, 3]
    size = case.outputs[0].numel()
    model = Net(lambda m, x: m.head(m.body(x).tanh()).view(-1, *case.outputs.shape[1:]),
                body=linear(), head=linear(6, size)).double()  # fmt: skip
    x, weights = features(3).double(), torch.tensor(times)
    options = {"likelihood": case.likelihood, "estimator": estimator}
    found = fisher_diagonal(model, [(x, case.targets, weights)], **options)
    again = [(repeated(x, times), repeated(case.targets, times))]
    close(found, fisher_diagonal(model, again, **options))


def test_weights_may_come_in_a_mapping_and_are_not_passed_on():
    net = mlp()
    model = Net(lambda m, x: m.net(x), net=net)
    (x, y), w = some_data(4)[0], torch.rand(4)
    found = fisher_diagonal(model, [{"x": x, "labels": y, "sample_weight": w}])
    expected = fisher_diagonal(net, [(x, y, w)])
    assert same([*found.values()], [*expected.values()])
    assert same(expected, fisher_diagonal(net, [(x, None, w)]))
    assert not same(expected, fisher_diagonal(net, [(x, y)]))


def test_weights_are_cut_with_the_batch():
    model, (x, y), w = mlp(), some_data(4)[0], torch.rand(4)
    found = fisher_diagonal(model, [(x, y, w)], max_samples=3)
    assert same(found, fisher_diagonal(model, [(x[:3], y[:3], w[:3])]))


def test_weights_have_no_scale():
    model, (x, y), w = mlp().double(), some_data(4)[0], torch.rand(4).double()
    x = x.double()
    close(fisher_diagonal(model, [(x, y, 7 * w)]), fisher_diagonal(model, [(x, y, w)]))


TOKENS, WIDTH = 5, 6


def language_model():
    return Net(
        lambda m, input_ids: SimpleNamespace(logits=m.head(m.lstm(m.embed(input_ids))[0])),
        embed=nn.Embedding(TOKENS, WIDTH),
        lstm=nn.LSTM(WIDTH, WIDTH, batch_first=True),
        head=nn.Linear(WIDTH, TOKENS),
    ).double()


def language_data():
    ids = torch.randint(TOKENS, (3, POSITIONS))
    labels = ids.clone()
    labels[1, 2:], labels[2, :2] = NO, NO
    return ids, labels


def test_sequences_of_a_language_model_are_squared_whole_and_tokens_apart():
    model, (ids, labels) = language_model(), language_data()
    params = dict(model.named_parameters())
    by_sequence = {name: torch.zeros_like(p) for name, p in params.items()}
    by_token, tokens = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    for n in range(3):
        whole = [torch.zeros_like(p) for p in params.values()]
        for t in range(1, POSITIONS):
            if labels[n, t] != NO:
                log_p = model(ids[n : n + 1]).logits[0, t - 1].log_softmax(0)[labels[n, t]]
                grads = torch.autograd.grad(log_p, list(params.values()))
                tokens += 1
                for name, grad, sum_ in zip(params, grads, whole, strict=True):
                    by_token[name] += grad.square()
                    sum_ += grad
        for name, sum_ in zip(params, whole, strict=True):
            by_sequence[name] += sum_.square() / 3
    data = [
        {"input_ids": ids[:2], "labels": labels[:2]},
        {"input_ids": ids[2:], "labels": labels[2:]},
    ]
    options = {"estimator": "empirical"}
    close(fisher_diagonal(model, data, likelihood="causal_lm", **options), by_sequence)
    found = fisher_diagonal(model, data, likelihood=CausalLM(per="token"), **options)
    close(found, {name: sum_ / tokens for name, sum_ in by_token.items()})


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher"])
def test_tokens_and_sequences_differ_by_their_number_where_labels_are_the_models(estimator):
    model, (ids, labels) = language_model(), language_data()
    data = [{"input_ids": ids, "labels": labels}]
    tokens, sequences = (labels[:, 1:] != NO).sum().item(), 3
    by_sequence, by_token = (
        fisher_diagonal(model, data, likelihood=CausalLM(per=per), estimator=estimator)
        for per in ("sequence", "token")
    )
    scaled = {name: values * tokens / sequences for name, values in by_token.items()}
    close(scaled, by_sequence)


def test_heads_of_other_tasks_stay_free():
    model, (x, _) = nn.Linear(FEATURES, 6), some_data(4)[0]
    second = Categorical(classes=[2, 3])
    found = fisher_diagonal(model, [(x, torch.tensor([2, 3, 3, 2]))], likelihood=second)
    for values in found.values():
        assert (values[2:4] > 0).all()
        assert not values[[0, 1, 4, 5]].any()
    alone = nn.Linear(FEATURES, 2)
    with torch.no_grad():
        alone.weight.copy_(model.weight[2:4])
        alone.bias.copy_(model.bias[2:4])
    close({name: values[2:4] for name, values in found.items()}, fisher_diagonal(alone, [x]))


def test_an_ewc_takes_the_same_options():
    model = nn.Linear(FEATURES, 6)
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate([features(4)], likelihood=Categorical(classes=[2, 3]), estimator="rademacher")
    assert not ewc.fisher["bias"][[0, 1, 4, 5]].any()
    assert ewc.fisher["bias"][2:4].all()


def test_outputs_in_half_precision_of_a_model_in_float32():
    model = Net(lambda m, x: m.head(x).bfloat16(), head=head())
    x, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    for estimator in ("exact", "empirical"):
        found = fisher_diagonal(model, [(x, y)], estimator=estimator)
        full = fisher_diagonal(model.head, [(x, y)], estimator=estimator)
        for name, values in zip(found, full.values(), strict=True):
            # logits, vectors, and gradients of a layer are rounded, of scores below 1
            assert_within(found[name], values, 32 * u(torch.bfloat16) * values.max(), name)


BARS = {
    "a_list": (lambda data: data, {}, "3/3"),
    "a_loader": (
        lambda data: DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), 5),
        {},
        "3/3",
    ),
    "a_generator": (lambda data: iter(data), {}, "3batch"),
    "so_many_samples": (lambda data: iter(data), {"max_samples": 10}, "10/10"),
}


@pytest.mark.parametrize(("make", "options", "shown"), BARS.values(), ids=BARS.keys())
def test_progress_shows_how_far_it_is(capsys, make, options, shown):
    fisher_diagonal(mlp(), make(some_data()), progress=True, **options)
    assert shown in capsys.readouterr().err
