"""The wrapper in loops as people write them: mixed precision, clipping, averaged weights.

``test_optim.py`` has what the wrapper promises by itself; here it meets the rest of a loop, on the
CPU and on the GPU where there is one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_within, u
from torch import nn, optim
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from training import all_of, batch, consolidated, gradients, loss, penalty_by_definition, same

from ewc_fast import EWCOptimizer

INNER = {
    "sgd": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: optim.AdamW(ps, lr=0.01),
    "adamw_foreach": lambda ps: optim.AdamW(ps, lr=0.01, foreach=True),
    "adamw_fused": lambda ps: optim.AdamW(ps, lr=0.01, fused=True),
}
each_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])


def twins():
    """Return the same model and EWC twice."""
    pair = consolidated()
    return pair, copy.deepcopy(pair)


def everything(model, optimizer):
    """Return all that a step may change, as it is now; but for gradients, which scaling changes."""
    parameters, _, *rest = all_of(model)
    value = optimizer.last_penalty
    kept = None if value is None else value.clone()
    return parameters, rest, copy.deepcopy(optimizer.state_dict()), kept


# Mixed precision


@each_mode
@each_inner
def test_a_step_that_grad_scaler_skips_leaves_all_as_it_was(inner, mode, device):
    model, ewc = consolidated()
    optimizer = EWCOptimizer(inner(model.parameters()), ewc, mode=mode)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    one = batch(model)
    for factor in (float("inf"), 1.0, float("inf"), float("nan"), 1.0):
        before = everything(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(loss(model, one) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(everything(model, optimizer), before) == (factor != 1.0)
    assert scaler.get_scale() == 2.0**7
    assert (optimizer.last_penalty is None) == (mode == "proximal")


@each_inner
def test_gradients_unscaled_and_clipped_get_the_penalty_whole(inner, device):
    """The documented recipe: ``unscale_``, ``clip_grad_norm_``, ``step``."""
    (model, ewc), (plain, by_hand) = twins()
    optimizer, reference = EWCOptimizer(inner(model.parameters()), ewc), inner(plain.parameters())
    scaler, most = torch.amp.GradScaler(device, init_scale=2.0**10), 1e-2
    for one in [batch(model) for _ in range(3)]:
        optimizer.zero_grad()
        scaler.scale(loss(model, one)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), most)
        scaler.step(optimizer)
        scaler.update()

        reference.zero_grad()
        loss(plain, one).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), most)
        by_hand.add_penalty_grad_()
        reference.step()
        assert same(model.state_dict(), plain.state_dict())


def test_the_clipped_sum_can_be_stepped_through_grad_scaler(device):
    """The other documented order: unscaled gradients, the penalty, and then clipping of all."""
    model, ewc = consolidated()
    inner, most = optim.SGD(model.parameters(), lr=1.0), 1e-2
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaler.scale(loss(model, batch(model))).backward()
    scaler.unscale_(inner)
    ewc.add_penalty_grad_()
    nn.utils.clip_grad_norm_(model.parameters(), most)
    scaler.step(inner)
    moved = torch.stack([(p - before[n]).norm() for n, p in model.named_parameters()]).norm()
    roundings = max(p.abs().max().item() for p in before.values()) * u(torch.float32) * 12
    assert moved.item() <= most + roundings
    assert moved.item() >= 0.9 * most


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_the_penalty_is_not_cast_by_autocast(inside, device):
    model, ewc = consolidated()
    value, pulls = penalty_by_definition(model, ewc)
    value += ewc.constant_penalty
    with torch.autocast(device, torch.bfloat16):
        task = loss(model, batch(model))
        penalty = ewc.penalty() if inside else None
    penalty = ewc.penalty() if penalty is None else penalty
    task.backward()
    before = gradients(model)
    model.zero_grad()
    assert penalty.dtype == torch.float32
    assert abs(penalty.item() - value) <= 300 * u(torch.float32) * value
    penalty.backward()
    for name, grad in gradients(model).items():
        assert_within(grad, pulls[name], 8 * u(torch.float32) * pulls[name].abs(), name)
    assert before.keys() == pulls.keys()


@each_inner
def test_a_step_inside_autocast_is_the_step_outside(inner, device):
    (model, ewc), (plain, by_hand) = twins()
    optimizer, reference = EWCOptimizer(inner(model.parameters()), ewc), inner(plain.parameters())
    one = batch(model)
    with torch.autocast(device, torch.bfloat16):
        loss(model, one).backward()
        optimizer.step()
    with torch.autocast(device, torch.bfloat16):
        task = loss(plain, one)
    task.backward()
    by_hand.add_penalty_grad_()
    reference.step()
    assert same(model.state_dict(), plain.state_dict())


# Averaged weights


AVERAGES = {"swa": {}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES.keys())
def test_averaged_models_follow_the_trained_one(options, device):
    (model, ewc), (plain, by_hand) = twins()
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1), ewc)
    reference = optim.SGD(plain.parameters(), lr=0.1)
    average, expected = AveragedModel(model, **options), AveragedModel(plain, **options)
    rates, expected_rates = SWALR(optimizer, 0.02, 3), SWALR(reference, 0.02, 3)
    for one in [batch(model) for _ in range(4)]:
        optimizer.zero_grad()
        loss(model, one).backward()
        optimizer.step()
        reference.zero_grad()
        loss(plain, one).backward()
        by_hand.add_penalty_grad_()
        reference.step()
        for averaged, trained, rate in (
            (average, model, rates),
            (expected, plain, expected_rates),
        ):
            averaged.update_parameters(trained)
            rate.step()
        assert rates.get_last_lr() == expected_rates.get_last_lr()
    assert same(average.state_dict(), expected.state_dict())
    assert not same(average.module.state_dict(), model.state_dict())


def test_the_next_task_can_be_anchored_at_the_average(device):
    """Copy the average into the model before ``consolidate``: Fisher and anchor are its own."""
    model, ewc = consolidated(anchor="latest")
    average = AveragedModel(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    ewc.consolidate([batch(model)])
    assert same(ewc.anchor, {n: p.detach() for n, p in average.module.named_parameters()})
