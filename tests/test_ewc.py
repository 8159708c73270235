"""EWC: three ways to one gradient, many tasks in one penalty, everything readable."""

from __future__ import annotations

import pytest
import torch
from models import CLASSES, FEATURES, Net, frozen, head, linear, mlp
from numerics import assert_within, gradient_budget, u, value_budget
from torch import nn
from training import batch, consolidated, gradients, loss, penalty_by_definition, same, shift

from ewc_fast import EWC, EWCOptimizer, fisher_diagonal

TIED = "one_layer_used_twice"
MODELS = {
    "mlp": mlp,
    "mlp_float64": lambda: mlp().double(),
    "mlp_bfloat16": lambda: mlp().bfloat16(),
    TIED: lambda: Net(
        lambda m, x: m.head(m.body(m.body(m.up(x)).tanh())),
        up=linear(), body=linear(6), head=head(),
    ),
    "frozen_layer": lambda: frozen(mlp(), "2.weight"),
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_three_ways_give_the_same_gradient_and_value(make):
    model, ewc = consolidated(make)
    data, inner = batch(model), torch.optim.SGD(model.parameters(), lr=0.0)
    wrapper = EWCOptimizer(inner, ewc)

    loss(model, data).backward()
    task = gradients(model)
    value, pulls = penalty_by_definition(model, ewc)
    value += ewc.constant_penalty

    def by_wrapper():
        loss(model, data).backward()
        wrapper.step()
        return wrapper.last_penalty

    def by_autograd():
        penalty = ewc.penalty()
        (loss(model, data) + penalty).backward()
        return penalty

    def in_place():
        loss(model, data).backward()
        return ewc.add_penalty_grad_()

    for way in (by_wrapper, by_autograd, in_place):
        model.zero_grad()
        penalty = way()
        assert penalty.dim() == 0
        dtype = next(model.parameters()).dtype
        state = torch.float64 if dtype == torch.float64 else torch.float32
        assert abs(penalty.item() - value) <= value_budget(value, dtype) + u(state) * value
        found = gradients(model)
        assert found.keys() == task.keys()
        for name, grad in found.items():
            # autograd rounds the pull to the parameter's dtype before it adds it
            before, pull = task[name].double(), pulls[name]
            budget = gradient_budget(before, pull, dtype) + u(dtype) * pull.abs()
            assert_within(grad, before + pull, budget, f"{way.__name__}: {name}")


def test_the_penalty_reads_as_in_the_paper():
    model = nn.Linear(2, 1, bias=False)
    ewc = EWC(model, ewc_lambda=10.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    ewc.consolidate_from({"weight": torch.tensor([[3.0, 0.5]])})
    with torch.no_grad():
        model.weight.add_(torch.tensor([[2.0, -4.0]]))
    # 10/2 (3 * 2^2 + 0.5 * 4^2) = 100, all exact in binary
    assert ewc.penalty().item() == 100.0
    assert ewc.add_penalty_grad_().item() == 100.0
    assert model.weight.grad.tolist() == [[60.0, -20.0]]


@pytest.mark.parametrize("anchor", ["merged", "latest"])
def test_before_the_first_task_there_is_no_penalty(anchor):
    model = mlp()
    ewc = EWC(model, ewc_lambda=1e6, anchor=anchor)
    assert ewc.penalty().item() == 0.0
    assert ewc.add_penalty_grad_().item() == 0.0
    assert all(p.grad is None for p in model.parameters())
    (loss(model, batch(model)) + ewc.penalty()).backward()
    assert ewc.fisher == ewc.anchor == {}
    assert ewc.tasks == 0


def test_at_the_anchor_there_is_neither_penalty_nor_gradient():
    model = mlp()
    ewc = EWC(model, ewc_lambda=1e6)
    ewc.consolidate([batch(model)])
    assert ewc.add_penalty_grad_().item() == 0.0
    assert not any(p.grad.any() for p in model.parameters())


def test_consolidate_measures_the_fisher_with_its_options():
    model, options = mlp(), {"estimator": "empirical", "max_samples": 5}
    data = [batch(model)]
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate(data, **options)
    assert same(ewc.fisher, fisher_diagonal(model, data, **options))
    assert same(ewc.anchor, {n: p.detach() for n, p in model.named_parameters()})


def test_consolidate_from_takes_any_floating_dtype():
    model = mlp()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        ewc = EWC(model, ewc_lambda=1.0)
        fisher = {n: torch.rand(p.shape).to(dtype) for n, p in model.named_parameters()}
        ewc.consolidate_from(fisher)
        assert same(ewc.fisher, {n: f.float() for n, f in fisher.items()})


def test_consolidating_leaves_the_callers_fisher_alone():
    model = mlp()
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    before = {n: f.clone() for n, f in fisher.items()}
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate_from(fisher)
    ewc.consolidate_from(fisher)
    assert same(fisher, before)


def test_fisher_and_anchor_are_views_by_name():
    model, ewc = consolidated()
    names = [name for name, _ in model.named_parameters()]
    assert list(ewc.fisher) == list(ewc.anchor) == names
    for views in (ewc.fisher, ewc.anchor):
        assert not any(v.requires_grad for v in views.values())
    fisher, anchor = ewc.fisher["0.bias"], ewc.anchor["0.bias"]
    ewc.consolidate([batch(model)])
    assert torch.equal(fisher, ewc.fisher["0.bias"])
    assert torch.equal(anchor, ewc.anchor["0.bias"])
    fisher.zero_()
    assert not ewc.fisher["0.bias"].any()


def test_the_strength_can_change_at_any_time():
    model, ewc = consolidated()
    wrapper = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), ewc)
    at_30 = ewc.add_penalty_grad_().item()
    for strength in (0.0, 15.0, 60.0):
        ewc.ewc_lambda = strength
        model.zero_grad()
        wrapper.step()
        expected = at_30 * strength / 30
        assert abs(wrapper.last_penalty.item() - expected) <= 2 * value_budget(
            expected, torch.float32
        )
        assert any(p.grad.any() for p in model.parameters()) == (strength > 0)
        assert abs(ewc.penalty().item() - expected) <= 2 * value_budget(expected, torch.float32)


def test_the_strength_takes_what_a_schedule_yields():
    _, ewc = consolidated()
    for value in (3, 2.5, torch.tensor(4.0)):
        ewc.ewc_lambda = value
        assert ewc.ewc_lambda == float(value)


def test_repr_says_what_there_is():
    ewc = EWC(nn.Linear(100, 20), ewc_lambda=400.0, gamma=0.9, anchor="latest")
    assert repr(ewc) == (
        "EWC(parameters=2 (2,020 values), tasks=0, ewc_lambda=400, gamma=0.9, anchor='latest')"
    )


def test_frozen_parameters_are_constants_until_they_are_unfrozen():
    model, ewc = consolidated()
    whole = ewc.penalty().item()
    frozen_part = model[0].requires_grad_(False)
    for param in frozen_part.parameters():
        param.grad = torch.zeros_like(param)  # left from before it was frozen
    partly = ewc.penalty()
    assert ewc.constant_penalty < partly.item() < whole
    assert ewc.add_penalty_grad_().item() == pytest.approx(partly.item(), rel=2 * u(torch.float32))
    assert not any(p.grad.any() for p in frozen_part.parameters())
    assert all(p.grad.any() for p in model[2].parameters())
    model[2].requires_grad_(False)
    assert ewc.penalty().item() < partly.item()
    frozen_part.requires_grad_(True)
    model[2].requires_grad_(True)
    assert ewc.penalty().item() == whole


def test_a_wholly_frozen_model_has_only_the_constant():
    model, ewc = consolidated()
    model.requires_grad_(False)
    assert ewc.penalty().item() == pytest.approx(ewc.constant_penalty, rel=u(torch.float32))
    assert ewc.add_penalty_grad_().item() == ewc.constant_penalty
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_need_no_fisher_and_keep_what_they_have():
    model, ewc = consolidated()
    before = {n: f.clone() for n, f in ewc.fisher.items()}
    model[0].requires_grad_(False)
    ewc.consolidate([batch(model)])
    assert torch.equal(ewc.fisher["0.weight"], before["0.weight"])
    assert (ewc.fisher["2.weight"] > before["2.weight"]).any()


def test_parameters_without_gradient_get_one():
    model, ewc = consolidated()
    _, pulls = penalty_by_definition(model, ewc)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    ewc.add_penalty_grad_()
    for name, param in model.named_parameters():
        budget = gradient_budget(torch.zeros_like(param), pulls[name], torch.float32)
        assert_within(param.grad, pulls[name], budget, name)


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(linear(6), nn.Tanh(), linear(6))
    model[2].weight = model[0].weight
    ewc = EWC(model, ewc_lambda=2.0)
    assert list(ewc.parameters) == ["0.weight", "0.bias", "2.bias"]
    ewc.consolidate_from({n: torch.ones_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        model[0].weight.add_(1.0)
    value, _ = penalty_by_definition(model, ewc)
    assert abs(ewc.penalty().item() - value) <= value_budget(value, torch.float32)


def test_the_penalty_can_be_differentiated_twice():
    model, ewc = consolidated(lambda: nn.Linear(FEATURES, CLASSES).double())
    weight = model.weight
    (pull,) = torch.autograd.grad(ewc.penalty(), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(pull.sum(), weight)
    exact = ewc.ewc_lambda * ewc.fisher["weight"]
    assert_within(curvature, exact, 4 * u(torch.float64) * exact, "curvature")


def test_the_loss_may_scale_the_penalty():
    model, ewc = consolidated()
    _, pulls = penalty_by_definition(model, ewc)
    (0.5 * ewc.penalty()).backward()
    for name, param in model.named_parameters():
        half = 0.5 * pulls[name]
        assert_within(
            param.grad, half, gradient_budget(torch.zeros_like(half), half, torch.float32), name
        )


def test_the_numbers_of_threads_do_not_change_a_bit():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Linear(600, 600)
        ewc = EWC(model, ewc_lambda=3.0)
        for _ in range(2):
            ewc.consolidate_from({n: torch.rand_like(p) for n, p in model.named_parameters()})
            shift(model)
        results.append([ewc.add_penalty_grad_(), gradients(model), ewc.fisher, ewc.anchor])
    assert same(*results)


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_every_implementation_can_be_asked_for_by_name(impl):
    torch.manual_seed(1)
    model, ewc = consolidated(impl=impl)
    value, pulls = penalty_by_definition(model, ewc)
    value += ewc.constant_penalty
    assert abs(ewc.add_penalty_grad_().item() - value) <= value_budget(value, torch.float32)
    for name, param in model.named_parameters():
        budget = gradient_budget(torch.zeros_like(param), pulls[name], torch.float32)
        assert_within(param.grad, pulls[name], budget, name)
