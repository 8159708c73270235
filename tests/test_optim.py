"""The wrapper is the inner optimizer plus the penalty, and nothing else."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import mlp
from numerics import assert_within, u
from torch import nn, optim
from training import batch, consolidated, gradients, loss, same, shift

from ewc_fast import EWC, EWCOptimizer

INNER = {
    "sgd": lambda ps: optim.SGD(ps, lr=0.05),
    "sgd_momentum_decay": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: optim.Adam(ps, lr=0.01),
    "adam_one_by_one": lambda ps: optim.Adam(ps, lr=0.01, foreach=False),
    "adam_fused": lambda ps: optim.Adam(ps, lr=0.01, fused=True),
    "adamw": lambda ps: optim.AdamW(ps, lr=0.01),
    "rmsprop": lambda ps: optim.RMSprop(ps, lr=0.01),
    "adagrad": lambda ps: optim.Adagrad(ps, lr=0.01),
}
each_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())


def twins(make=mlp, **options):
    """Return the same model and EWC twice."""
    pair = consolidated(make, **options)
    return pair, copy.deepcopy(pair)


def train(model, optimizer, data, before_step=lambda: None):
    for one in data:
        optimizer.zero_grad()
        loss(model, one).backward()
        before_step()
        optimizer.step()


@each_inner
def test_a_step_is_the_penaltys_gradient_and_the_inner_step(inner):
    (model, ewc), (plain, by_hand) = twins()
    data = [batch(model) for _ in range(5)]
    train(model, EWCOptimizer(inner(model.parameters()), ewc), data)
    train(plain, inner(plain.parameters()), data, before_step=by_hand.add_penalty_grad_)
    assert same(model.state_dict(), plain.state_dict())


@each_inner
def test_a_proximal_step_follows_the_inner_step(inner):
    (model, ewc), (plain, by_hand) = twins()
    data = [batch(model)]
    optimizer = EWCOptimizer(inner(model.parameters()), ewc, mode="proximal")
    inner_alone = inner(plain.parameters())
    train(model, optimizer, data)
    train(plain, inner_alone, data)
    strength = inner_alone.param_groups[0]["lr"] * ewc.ewc_lambda
    for name, param in plain.named_parameters():
        fisher, anchor = by_hand.fisher[name].double(), by_hand.anchor[name].double()
        theta = param.detach().double()
        exact = (theta + strength * fisher * anchor) / (1 + strength * fisher)
        # a dozen roundings of numbers no larger than these
        budget = 12 * u(torch.float32) * (theta.abs() + anchor.abs())
        assert_within(model.get_parameter(name), exact, budget, name)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@each_inner
def test_before_the_first_task_it_is_the_inner_optimizer(inner, mode):
    model = mlp()
    plain, data = copy.deepcopy(model), [batch(model) for _ in range(3)]
    ewc = EWC(model, ewc_lambda=1e6)
    train(model, EWCOptimizer(inner(model.parameters()), ewc, mode=mode), data)
    train(plain, inner(plain.parameters()), data)
    assert same(model.state_dict(), plain.state_dict())


def test_a_task_consolidated_later_is_taken_up():
    model = mlp()
    ewc = EWC(model, ewc_lambda=10.0)
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc)
    data = [batch(model)]
    train(model, optimizer, data)
    assert optimizer.last_penalty.item() == 0.0
    ewc.consolidate(data)
    train(model, optimizer, data * 2)
    assert optimizer.last_penalty.item() > 0.0


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_where_the_gradient_form_diverges_the_proximal_one_does_not(mode):
    model = nn.Linear(3, 1, bias=False)
    ewc = EWC(model, ewc_lambda=300.0)
    anchor = model.weight.detach().clone()
    ewc.consolidate_from({"weight": torch.tensor([[1.0, 0.1, 0.0]])})
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc, mode=mode)
    shift(model, by=1.0)
    start = (model.weight.detach() - anchor).abs()
    for _ in range(20):  # lr * lambda * F = 30, 3 and 0
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    distance = (model.weight.detach() - anchor).abs()
    assert distance[0, 2] == start[0, 2]
    if mode == "gradient":  # multiplied by 1 - 30 and 1 - 3 each step
        assert (distance[0, :2] > 1e5 * start[0, :2]).all()
    else:  # divided by 1 + 30 and 1 + 3 each step
        assert (distance[0, :2] <= u(torch.float32) * 4 * (anchor.abs() + start)[0, :2]).all()


def test_a_training_run_that_diverges_by_gradients_converges_by_proximal_steps():
    losses = {}
    for mode in ("gradient", "proximal"):
        torch.manual_seed(0)
        model, ewc = consolidated(ewc_lambda=1e3)
        optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc, mode=mode)
        stiffest = max(fisher.max().item() for fisher in ewc.fisher.values())
        assert 0.1 * 1e3 * stiffest > 2
        data = [batch(model)] * 60
        train(model, optimizer, data)
        losses[mode] = loss(model, data[0]).item() + ewc.penalty().item()
    assert losses["proximal"] < 100
    assert not losses["gradient"] < 1e6  # perhaps NaN


SCHEDULERS = {
    "step": lambda o: optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "one_cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "warmup_then_cosine": lambda o: optim.lr_scheduler.SequentialLR(
        o,
        [optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3), optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        milestones=[3],
    ),
    "cyclic": lambda o: optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
}


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_set_its_learning_rate(scheduler, mode):
    (model, ewc), (plain, _) = twins()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), 0.1, momentum=0.9), ewc, mode=mode)
    reference = optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", say
        rates = scheduler(reference)
        schedule = scheduler(optimizer)
        for one in [batch(model) for _ in range(10)]:
            train(plain, reference, [one])
            train(model, optimizer, [one])
            rates.step()
            schedule.step()
            assert schedule.get_last_lr() == rates.get_last_lr()
            assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert optimizer.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_a_plateau_scheduler_reduces_its_learning_rate():
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=1.0), ewc)
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["sgd", "adam_fused"])
def test_grad_scaler_unscales_before_the_penalty_and_skips_whole_steps(name):
    (model, ewc), (plain, by_hand) = twins()
    optimizer, reference = EWCOptimizer(INNER[name](model.parameters()), ewc), INNER[name](
        plain.parameters()
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    one = batch(model)
    for value in (1.0, float("inf"), 1.0):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss(model, one) * value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(model.state_dict(), before) == (value != 1.0)
        if value == 1.0:  # scaling by a power of two is exact
            train(plain, reference, [one], before_step=by_hand.add_penalty_grad_)
            assert same(model.state_dict(), plain.state_dict())
    assert scaler.get_scale() == 2.0**9


def test_clipping_before_the_step_clips_the_tasks_gradient_alone():
    (model, ewc), (plain, by_hand) = twins()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc)
    one, most = batch(model), 1e-3
    train(model, optimizer, [one], lambda: nn.utils.clip_grad_norm_(model.parameters(), most))

    def clip_then_pull():
        nn.utils.clip_grad_norm_(plain.parameters(), most)
        by_hand.add_penalty_grad_()

    train(plain, optim.SGD(plain.parameters(), lr=0.1), [one], clip_then_pull)
    assert same(model.state_dict(), plain.state_dict())
    total = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert total > 10 * most  # the penalty is whole


def test_the_sum_can_be_clipped_by_hand_as_documented():
    model, ewc = consolidated()
    loss(model, batch(model)).backward()
    ewc.add_penalty_grad_()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    total = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert total <= 1e-3


def test_accumulated_gradients_get_one_penalty():
    (model, ewc), (plain, by_hand) = twins()
    data = [batch(model) for _ in range(3)]
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc)
    for one in data:
        loss(model, one).backward()
        loss(plain, one).backward()
    optimizer.step()
    by_hand.add_penalty_grad_()
    optim.SGD(plain.parameters(), lr=0.1).step()
    assert same(model.state_dict(), plain.state_dict())


CLOSURES = {
    "lbfgs": lambda ps: optim.LBFGS(ps, lr=0.5, max_iter=4),
    "lbfgs_line_search": lambda ps: optim.LBFGS(ps, max_iter=4, line_search_fn="strong_wolfe"),
    "sgd": lambda ps: optim.SGD(ps, lr=0.1),
}


@pytest.mark.parametrize("inner", CLOSURES.values(), ids=CLOSURES.keys())
def test_with_a_closure_the_penalty_joins_every_evaluation(inner):
    (model, ewc), (plain, by_hand) = twins()
    optimizer, reference, one = (
        EWCOptimizer(inner(model.parameters()), ewc),
        inner(plain.parameters()),
        batch(model),
    )

    def closure():
        optimizer.zero_grad()
        value = loss(model, one)
        value.backward()
        return value

    def with_penalty():
        reference.zero_grad()
        value = loss(plain, one)
        value.backward()
        return value + by_hand.add_penalty_grad_().to(value)

    for _ in range(3):
        assert torch.equal(optimizer.step(closure), reference.step(with_penalty))
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("value", [None, 2.5], ids=["None", "float"])
def test_a_closure_may_return_no_tensor(value):
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc)
    penalty = ewc.penalty().item()
    result = optimizer.step(lambda: value)
    if value is None:
        assert result is None
    else:
        assert result == pytest.approx(value + penalty, rel=4 * u(torch.float32))


def test_a_closure_finds_gradients_switched_on():
    class Old(optim.SGD):
        """An optimizer that leaves that to its caller, as all did once."""

        def step(self, closure):
            value = closure()
            with torch.no_grad():
                super().step()
            return value

    model, ewc = consolidated()
    optimizer = EWCOptimizer(Old(model.parameters(), lr=0.1), ewc)

    def closure():
        value = loss(model, batch(model))
        value.backward()
        return value

    assert optimizer.step(closure).item() > 0


def test_a_proximal_step_takes_a_closure_as_it_is():
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc, mode="proximal")
    assert optimizer.step(lambda: 2.5) == 2.5
