"""The wrapper applies the penalty to the right parameters, and is an Optimizer to all others."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Net, frozen, head, linear, mlp
from torch import nn, optim
from training import batch, consolidated, loss, same, shift

from ewc_fast import EWC, EWCOptimizer


def stepped(model, ewc, **options):
    """Take one step without a task's gradient; return how far each parameter moved."""
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.01), ewc, **options)
    optimizer.zero_grad()
    optimizer.step()
    return {n: (p - before[n]).detach() for n, p in model.named_parameters()}


each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])


@each_mode
def test_parameters_without_gradient_are_pulled(mode):
    model, ewc = consolidated()
    moved = stepped(model, ewc, mode=mode)
    assert all(step.any() for step in moved.values())


@each_mode
def test_frozen_parameters_stay_where_they_are(mode):
    model, ewc = consolidated()
    frozen(model, "0.weight", "2.bias")
    moved = stepped(model, ewc, mode=mode)
    assert {name for name, step in moved.items() if not step.any()} == {"0.weight", "2.bias"}
    frozen(model, "4.bias")  # while it runs
    moved = stepped(model, ewc, mode=mode)
    assert not moved["4.bias"].any()


@each_mode
def test_a_group_that_the_inner_optimizer_gained_is_pulled(mode):
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.SGD(model[0].parameters(), lr=0.01), ewc, mode=mode)
    before = copy.deepcopy(model[2].weight)
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    optimizer.optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


@each_mode
def test_parameters_outside_the_ewc_are_stepped_as_always(mode):
    model = mlp()
    plain, data = copy.deepcopy(model), [batch(model)]
    inside = [(n, p) for n, p in model.named_parameters() if n.startswith("0.")]
    ewc = EWC(inside, ewc_lambda=100.0)
    ewc.consolidate_from({n: torch.ones_like(p) for n, p in inside})
    with torch.no_grad():
        model[0].weight.add_(0.1)
        plain[0].weight.add_(0.1)
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.01), ewc, mode=mode)
    for net, one in ((model, optimizer), (plain, optim.SGD(plain.parameters(), lr=0.01))):
        loss(net, data[0]).backward()
        one.step()
    same_as_plain = {n: torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters()}
    assert not same_as_plain["0.weight"]
    assert all(same_as_plain[f"{i}.{kind}"] for i in (2, 4) for kind in ("weight", "bias"))


@each_mode
def test_a_shared_parameter_is_pulled_once(mode):
    def make(tied):
        body = linear(6)
        return Net(
            lambda m, x: m.head(m.second(m.first(x).tanh())),
            first=body, second=body if tied else nn.Identity(), head=head(),
        )  # fmt: skip

    torch.manual_seed(1)
    results = []
    for tied in (True, False):
        torch.manual_seed(2)
        model = make(tied)
        ewc = EWC(model, ewc_lambda=10.0)
        ewc.consolidate_from({n: torch.ones_like(p) for n, p in model.named_parameters()})
        shift(model)
        results.append(stepped(model, ewc, mode=mode))
    assert same(*results)


@each_mode
def test_each_group_steps_with_its_own_learning_rate(mode):
    model, ewc = consolidated()
    alone = copy.deepcopy((model, ewc))
    rates = {"0": 0.0, "2": 0.01, "4": 0.1}
    groups = [{"params": model[int(i)].parameters(), "lr": lr} for i, lr in rates.items()]
    optimizer = EWCOptimizer(optim.SGD(groups, lr=1.0), ewc, mode=mode)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer.step()
    for i, lr in rates.items():
        one_model, one_ewc = copy.deepcopy(alone)
        EWCOptimizer(optim.SGD(one_model.parameters(), lr=lr), one_ewc, mode=mode).step()
        for kind in ("weight", "bias"):
            name = f"{i}.{kind}"
            assert torch.equal(model.get_parameter(name), one_model.get_parameter(name))
            assert torch.equal(model.get_parameter(name), before[name]) == (lr == 0.0)


@each_mode
def test_several_optimizers_share_an_ewc(mode):
    model, ewc = consolidated()
    together = copy.deepcopy((model, ewc))
    for i in (0, 2, 4):
        EWCOptimizer(optim.SGD(model[i].parameters(), lr=0.01), ewc, mode=mode).step()
    stepped(*together, mode=mode)
    assert same(model.state_dict(), together[0].state_dict())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_does_what_the_inner_one_does(set_to_none):
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.01), ewc)
    loss(model, batch(model)).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in model.parameters():
        assert param.grad is None if set_to_none else not param.grad.any()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert not same(model.state_dict(), before)


# An Optimizer to everyone else


def wrapped(inner=lambda ps: optim.Adam(ps, lr=0.01)):
    model, ewc = consolidated()
    return model, ewc, EWCOptimizer(inner(model.parameters()), ewc)


def test_it_is_an_optimizer_and_shows_the_inner_ones_state():
    model, _, optimizer = wrapped()
    assert isinstance(optimizer, optim.Optimizer)
    loss(model, batch(model)).backward()
    optimizer.step()
    inner = optimizer.optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lr: 0.01" in repr(optimizer)


def test_methods_that_only_the_inner_optimizer_has_are_found():
    class ScheduleFree(optim.SGD):
        def train(self):
            return "training"

    _, _, optimizer = wrapped(lambda ps: ScheduleFree(ps, lr=0.1))
    assert optimizer.train() == "training"
    with pytest.raises(AttributeError, match="evaluate"):
        optimizer.evaluate()


def test_pytorchs_hooks_run_once_each_in_pytorchs_order():
    model, _, optimizer = wrapped()
    calls = []

    def note(name):
        return lambda *args: calls.append(name)

    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    optimizer.optimizer.register_step_pre_hook(note("inner before"))
    optimizer.optimizer.register_step_post_hook(note("inner after"))
    optimizer.register_state_dict_pre_hook(note("state"))
    optimizer.register_state_dict_post_hook(note("state made"))
    optimizer.register_load_state_dict_pre_hook(note("load"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    loss(model, batch(model)).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [
        "before", "inner before", "inner after", "after", "state", "state made", "load", "loaded"
    ]  # fmt: skip


def test_a_pre_hook_of_the_inner_optimizer_sees_the_penalty():
    _, _, optimizer = wrapped()
    seen = []
    optimizer.optimizer.register_step_pre_hook(
        lambda inner, args, kwargs: seen.append(inner.param_groups[0]["params"][0].grad.clone())
    )
    optimizer.zero_grad()
    optimizer.step()
    assert seen[0].any()


def test_its_state_dict_is_the_inner_ones_with_one_more_key():
    model, ewc, optimizer = wrapped()
    loss(model, batch(model)).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert same(state.pop("ewc"), ewc.state_dict())
    assert same(state, optimizer.optimizer.state_dict())


def test_a_plain_optimizer_and_the_wrapper_load_each_others_state():
    model, ewc, optimizer = wrapped()
    loss(model, batch(model)).backward()
    optimizer.step()
    plain = optim.Adam(model.parameters(), lr=1.0)
    plain.load_state_dict(optimizer.state_dict())
    assert same(plain.state_dict(), optimizer.optimizer.state_dict())

    before = copy.deepcopy(ewc.state_dict())
    plain.param_groups[0]["lr"] = 0.125
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert same(ewc.state_dict(), before)


def test_loading_takes_effect_in_the_next_step():
    model, _, optimizer = wrapped(lambda ps: optim.SGD(ps, lr=0.1))
    state = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(model)
    fresh = EWCOptimizer(optim.SGD(other.parameters(), lr=1.0), EWC(other, ewc_lambda=0.0))
    fresh.step()
    fresh.load_state_dict(state)
    for one in (optimizer, fresh):
        one.zero_grad()
        one.step()
    assert same(other.state_dict(), model.state_dict())
    assert torch.equal(fresh.last_penalty, optimizer.last_penalty)


def test_last_penalty_is_the_penalty_before_the_step():
    _, ewc, optimizer = wrapped()
    before = ewc.penalty().item()
    optimizer.step()
    assert optimizer.last_penalty.item() == pytest.approx(before, rel=2**-20)
