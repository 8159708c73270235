"""What is recorded and what is not, at what cost, and that nothing wrong gets through."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import (
    CLASSES,
    FEATURES,
    HEAD,
    Net,
    each_model,
    features,
    head,
    linear,
    mlp,
    routes_to_an_expert,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import same

from ewc_fast import fisher_diagonal
from ewc_fast.fisher.estimator import _Pass
from ewc_fast.fisher.recorder import LinearUse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_at_a_time(monkeypatch):
    """The names of parameters that took one sample at a time, for each batch in turn."""
    batches = []

    def add(self, batch):
        batches.append(set())
        return real_add(self, batch)

    def add_sample(self, sums, sample, vectors):
        if any(values is self._sums.get(name) for name, values in sums.items()):
            batches[-1].update(sums)
        return real_add_sample(self, sums, sample, vectors)

    real_add, real_add_sample = _Pass.add, _Pass._add_sample
    monkeypatch.setattr(_Pass, "add", add)
    monkeypatch.setattr(_Pass, "_add_sample", add_sample)
    return batches


class Produced(TorchDispatchMode):
    """Notes the shapes of all tensors that operations allocate."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given
            ):
                self.shapes.append(tuple(tensor.shape))
        return result


def batch(n, targets=True):
    x = features(n)
    return (x, torch.randint(CLASSES, (n,))) if targets else x


# PyTorch versions differ in whether they compile under a function mode
@each_model("compiled_layer")
def test_what_meets_only_rules_is_recorded_and_nothing_else(case, one_at_a_time):
    model = case.make()
    found = fisher_diagonal(model, case.data(8))
    assert set(found) - one_at_a_time[0] == case.recorded


def test_linear_networks_form_no_per_sample_gradient_and_no_weight_gradient():
    n, model = 64, nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, CLASSES))
    data = [(torch.randn(n, 50), torch.randint(CLASSES, (n,))) for _ in range(3)]

    def seen():
        with Produced() as produced:
            yield data[0]
            produced.shapes.clear()  # the first batch is verified on single samples
            yield from data[1:]
        shapes.extend(produced.shapes)

    shapes = []
    fisher_diagonal(model, seen())
    assert (n, 40) in shapes  # it did watch
    assert max(torch.Size(shape).numel() for shape in shapes) <= n * 50
    assert (40, 50) not in shapes
    assert (CLASSES, 40) not in shapes


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_the_model_runs_once_a_batch_and_on_two_samples_of_the_first(estimator):
    model, sizes = mlp(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    fisher_diagonal(model, [batch(8), batch(5), batch(3)], estimator=estimator)
    assert sizes == [8, 1, 1, 5, 3]


def test_exact_needs_one_product_a_layer_for_all_classes(monkeypatch):
    calls, real = [], LinearUse.add_to
    monkeypatch.setattr(LinearUse, "add_to", lambda *args: (calls.append(1), real(*args)))
    fisher_diagonal(mlp(), [batch(8), batch(8)])
    verification, batches, layers = 1, 2, 3
    assert len(calls) == (verification + batches) * layers


def twice_too_much(real, self, sums):
    real(self, sums)
    for name in {self.weight, self.bias} & set(sums):
        sums[name].mul_(2)


def batch_gradient_squared(real, self, sums):
    squares = self.take()
    if squares is not None:
        sums[self.weight].add_((squares.sqrt().t() @ self._inputs).square())
        sums[self.bias].add_(squares.sqrt().sum(0).square())


def nothing(real, self, sums):
    self.take()


@pytest.mark.parametrize("wrong", [twice_too_much, batch_gradient_squared, nothing])
def test_a_wrong_rule_is_found_out_and_the_result_is_right(wrong, monkeypatch, one_at_a_time):
    real = LinearUse.add_to
    monkeypatch.setattr(LinearUse, "add_to", lambda self, sums: wrong(real, self, sums))
    model, data = mlp(), [batch(6), batch(6)]
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert one_at_a_time == [set(found), set(found)]


def test_a_rule_that_is_wrong_for_one_parameter_costs_that_one_only(monkeypatch, one_at_a_time):
    real = LinearUse.add_to

    def wrong(self, sums):
        real(self, sums)
        if "2.bias" in sums and self.bias == "2.bias":
            sums["2.bias"].mul_(1.01)

    monkeypatch.setattr(LinearUse, "add_to", wrong)
    model, data = mlp(), [batch(6), batch(6)]
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)
    assert one_at_a_time == [{"2.bias"}, {"2.bias"}]


def routed(*positions):
    """Return inputs in which sample i sends ``positions[i]`` of its two positions."""
    x = torch.randn(len(positions), 2, FEATURES)
    x[:, :, 0] = x[:, :, 0].abs()
    for sample, count in enumerate(positions):
        x[sample, count:, 0] *= -1
    return x, torch.randint(CLASSES, (len(positions),))


ROUTES = {
    "first_sample_sends_two": [(2, 0, 1, 1)],
    "middle_samples_send_none_and_two": [(1, 0, 2, 1)],
    "a_batch_without_coincidence_first": [(1, 1, 2, 1), (1, 0, 2, 1), (2, 0, 1, 1)],
    "a_batch_of_one_first": [(1,), (1, 2, 0, 1)],
    "batches_of_one": [(1,), (1,), (2,), (0,)],
}


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES.keys())
def test_as_many_rows_as_samples_do_not_make_rows_samples(routes, one_at_a_time):
    model, data = (
        Net(routes_to_an_expert, expert=linear(), head=head()),
        [routed(*route) for route in routes],
    )
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)
    experts = {"expert.weight", "expert.bias"}
    for names, (x, _) in zip(one_at_a_time, data, strict=True):
        assert names == experts if len(x) > 1 else experts <= names


SECOND_USES = {
    "in_another_layer": lambda m, x: m.body(m.body(x).tanh()),
    "in_an_operation_without_rule": lambda m, x: m.body(x).tanh() + x @ m.body.weight,
}


@pytest.mark.parametrize("use_twice", SECOND_USES.values(), ids=SECOND_USES.keys())
def test_second_uses_are_seen_even_where_verification_cannot_see_them(use_twice):
    model = Net(lambda m, x: m.head(use_twice(m, x)), body=linear(6, bias=False), head=head())
    x, y = torch.randn(6, 6), torch.randint(CLASSES, (6,))
    x[0] = x[-1] = 0  # their gradients are 0, however the weight is used
    oracle.assert_fisher(fisher_diagonal(model, [(x, y)]), model, [(x, y)])


def test_a_parameter_without_rule_in_one_batch_is_not_recorded_later(one_at_a_time):
    def forward(m, x):
        return m.head(m.body(x) if len(x) == 4 else m.body(x[:, None])[:, 0])

    model, data = Net(forward, body=linear(), head=head()), [batch(5), batch(4)]
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)
    assert one_at_a_time == [{"body.weight", "body.bias"}] * 2


def test_what_is_done_in_place_to_a_layers_output_does_not_matter():
    model = nn.Sequential(linear(), nn.ReLU(inplace=True), nn.Dropout(inplace=True), head())
    data = [batch(6)]
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)


def test_autocast_inside_the_model_is_left_alone(one_at_a_time):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = m.body(x)
        return m.head(hidden.to(x).tanh())

    model, data = Net(forward, body=linear(), head=head()), [batch(6)]
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)
    assert set(one_at_a_time[0]) == {"body.weight", "body.bias"}


def test_the_forward_pass_is_bit_for_bit_the_usual_one():
    model, (x, y) = mlp().eval(), batch(6)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    fisher_diagonal(model, [(x, y)])
    assert torch.equal(seen[0], model(x))


def test_nothing_is_watched_afterwards(one_at_a_time):
    model, data = mlp(), [batch(6)]
    fisher_diagonal(model, data)
    model(data[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_results_repeat_bit_for_bit():
    model, data = mlp(), [batch(64), batch(7)]
    assert same(fisher_diagonal(model, data), fisher_diagonal(model, data))


def test_a_weight_that_is_a_plain_tensor_and_a_frozen_one_are_no_obstacle(one_at_a_time):
    model = Net(
        lambda m, x: m.head(nn.functional.linear(x, m.table).tanh()), body=linear(), head=head()
    )
    model.register_buffer("table", torch.randn(6, FEATURES))
    data = [batch(6)]
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)
    assert HEAD.isdisjoint(one_at_a_time[0])
