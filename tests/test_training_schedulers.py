"""Every learning rate scheduler of PyTorch drives the wrapper as it drives the inner optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler
from training import batch, consolidated, loss

from ewc_fast import EWCOptimizer


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.StepLR(optimizer, 2)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}
ABSTRACT = {"LRScheduler", "_LRScheduler"}


def pytorchs_own():
    return {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }


def test_none_is_forgotten():
    assert set(SCHEDULERS) == pytorchs_own() - ABSTRACT


def rates(optimizer, schedule, model, data):
    """Train a little; return the learning rates that the steps were taken with, and momenta."""
    found = []
    for one in data:
        optimizer.zero_grad()
        loss(model, one).backward()
        found.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        optimizer.step()
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return found, schedule.state_dict()


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_the_learning_rates_are_those_of_the_inner_optimizer_alone(scheduler, mode, device):
    model, ewc = consolidated()
    plain = copy.deepcopy(model)
    inner = optim.SGD(groups(model), lr=0.1, momentum=0.9)
    reference = optim.SGD(groups(plain), lr=0.1, momentum=0.9)
    wrapper, data = EWCOptimizer(inner, ewc, mode=mode), [batch(model) for _ in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", say
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")  # SequentialLR's own
        found, state = rates(wrapper, scheduler(wrapper), model, data)
        expected, expected_state = rates(reference, scheduler(reference), plain, data)
    assert found == expected
    assert len({str(rate) for rate in found}) > 1, "the schedule changes nothing"
    for key in set(state) - {"_schedulers", "lr_lambdas"}:
        assert state[key] == expected_state[key], key


def groups(model):
    """Two groups with rates of their own."""
    return [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.05}]


def test_a_learning_rate_may_be_a_tensor(device):
    results = []
    for rate in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        model, ewc = consolidated()
        inner = optim.AdamW(model.parameters(), lr=rate, foreach=False)
        wrapper = EWCOptimizer(inner, ewc, mode="proximal")
        schedule = lr_scheduler.StepLR(wrapper, 1, gamma=0.5)
        for one in [batch(model) for _ in range(3)]:
            wrapper.zero_grad()
            loss(model, one).backward()
            wrapper.step()
            schedule.step()
        results.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*results)
