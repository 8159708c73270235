"""The optimizers with the penalty inside are PyTorch's, plus the reference penalty."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fused_optimizers import PAIRS, consolidated, largest_gap, parameters, set_gradients, tensors_of
from torch import nn

from ewc_fast import EWC, EWCOptimizer, reference
from ewc_fast.optim import SGD, Adam, AdamW

GRID = [
    pytest.param(Adam, {}, id="adam"),
    pytest.param(Adam, {"weight_decay": 0.1, "amsgrad": True}, id="adam-coupled-amsgrad"),
    pytest.param(Adam, {"maximize": True, "betas": (0.4, 0.9), "eps": 1e-4}, id="adam-maximize"),
    pytest.param(Adam, {"betas": (0.0, 0.5)}, id="adam-no-first-moment"),
    pytest.param(AdamW, {}, id="adamw"),
    pytest.param(
        AdamW, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}, id="adamw-amsgrad-maximize"
    ),
    pytest.param(
        AdamW,
        {"lr": torch.tensor(2e-3, dtype=torch.float64), "weight_decay": 0.0},
        id="adamw-tensor-lr",
    ),
    pytest.param(SGD, {}, id="sgd"),
    pytest.param(SGD, {"momentum": 0.9, "weight_decay": 0.01}, id="sgd-momentum-decay"),
    pytest.param(SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}, id="sgd-dampening"),
    pytest.param(SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, id="sgd-nesterov"),
]
STEPS = 1000


def assert_equal_but_for_rounding(optimizer, other, steps):
    """Each float64 step may round four times more, in values as large as gradients or its own."""
    found, wanted = tensors_of(optimizer), tensors_of(other)
    for name, value in found.items():
        scale = max(1.0, wanted[name].abs().max().item()) if value.numel() else 1.0
        allowed = 4 * steps * torch.finfo(torch.float64).eps * scale
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize(("kind", "options"), GRID)
def test_without_ewc_a_thousand_steps_are_as_exact_as_pytorchs(kind, options):
    """Both are held to PyTorch's own optimizer in float64; ours may lose twice as much."""
    ours = kind(parameters(), **options)
    theirs = PAIRS[kind](parameters(), foreach=False, **options)
    exact = PAIRS[kind](parameters(torch.float64), foreach=False, **options)
    for step in range(STEPS):
        for optimizer in (ours, theirs, exact):
            params = optimizer.param_groups[0]["params"]
            set_gradients(params, step, torch.float32)
            optimizer.step()
    found, wanted = tensors_of(ours), tensors_of(exact)
    assert found.keys() == tensors_of(theirs).keys() == wanted.keys()
    allowed = 2 * largest_gap(tensors_of(theirs), wanted) + 4 * torch.finfo(torch.float32).eps
    assert largest_gap(found, wanted) <= allowed


@pytest.mark.parametrize(("kind", "options"), GRID)
def test_float64_is_pytorchs_to_the_last_places(kind, options):
    ours = kind(parameters(torch.float64), **options)
    theirs = PAIRS[kind](parameters(torch.float64), foreach=False, **options)
    for step in range(100):
        for optimizer in (ours, theirs):
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    assert_equal_but_for_rounding(ours, theirs, steps=100)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize(("kind", "options"), GRID)
def test_with_ewc_it_is_pytorchs_optimizer_and_the_reference_penalty(kind, options, mode):
    """In float64, where rounding hides nothing. The penalty is never turned around to maximize."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    ewc, other = consolidated(ours), consolidated(theirs)
    optimizer = kind(ours, ewc=ewc, mode=mode, **options)
    inner = PAIRS[kind](theirs, foreach=False, **options)
    fisher, anchor = list(other.fisher.values()), list(other.anchor.values())
    sign = -1 if options.get("maximize") else 1
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        value = reference.penalty(theirs, fisher, anchor, ewc_lambda=0.5).detach()
        with torch.no_grad():
            if mode == "gradient":
                pulls = reference.penalty_grad(theirs, fisher, anchor, ewc_lambda=0.5)
                for p, pull in zip(theirs, pulls, strict=True):
                    p.grad += sign * pull
        inner.step()
        if mode == "proximal":
            lr = float(inner.param_groups[0]["lr"])
            reference.proximal_step_(theirs, fisher, anchor, ewc_lambda=0.5, lr=lr)
        optimizer.step()
        torch.testing.assert_close(optimizer.last_penalty, value, rtol=1e-12, atol=0)
    assert_equal_but_for_rounding(optimizer, inner, steps=20)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", PAIRS)
def test_it_does_what_the_wrapper_does(kind, mode):
    """Whatever has no gradient, is frozen, or is not tracked by the EWC."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    fused = kind(ours, ewc=consolidated(ours[:4]), mode=mode)
    wrapper = EWCOptimizer(PAIRS[kind](theirs, foreach=False), consolidated(theirs[:4]), mode=mode)
    for step in range(5):
        for params, optimizer in ((ours, fused), (theirs, wrapper)):
            set_gradients(params, step)
            params[1].grad = None
            params[2].requires_grad_(step % 2 == 0)
            if step == 3:
                params[2].grad = params[4].grad = None
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("kind", "options"), GRID)
@pytest.mark.parametrize("to_ours", [True, False])
def test_checkpoints_load_both_ways(kind, options, to_ours):
    classes = (PAIRS[kind], kind) if to_ours else (kind, PAIRS[kind])
    first, second = parameters(), parameters()
    whole, half = classes[0](first, **options), classes[0](second, **options)
    for step in range(3):
        for params, optimizer in ((first, whole), (second, half)):
            set_gradients(params, step)
            optimizer.step()
    resumed = classes[1](second, **options)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    assert [sorted(s) for s in resumed.state.values()] == [sorted(s) for s in half.state.values()]
    for step in range(3, 6):
        for params, optimizer in ((first, whole), (second, resumed)):
            set_gradients(params, step)
            optimizer.step()
    assert largest_gap(tensors_of(resumed), tensors_of(whole)) <= 1e-6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", PAIRS)
def test_copies_go_on_as_the_original_does(kind, duplicate):
    params = parameters()
    original = kind(params, ewc=consolidated(params))
    set_gradients(params, 0)
    original.step()
    twin = duplicate(original)
    for optimizer in (original, twin):
        set_gradients(optimizer.param_groups[0]["params"], 1)
        optimizer.step()
    for name, value in tensors_of(twin).items():
        assert torch.equal(value, tensors_of(original)[name])
    assert twin.ewc is not original.ewc
    assert twin.last_penalty == original.last_penalty > 0


def test_its_own_checkpoint_brings_the_ewc_back():
    params, others = parameters(), parameters()
    saved = AdamW(params, ewc=consolidated(params))
    loaded = AdamW(others, ewc=EWC([(str(i), p) for i, p in enumerate(others)], ewc_lambda=1.0))
    for p in params:
        p.grad = torch.ones_like(p)
    saved.step()
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert loaded.ewc.tasks == 1
    assert loaded.ewc.ewc_lambda == 0.5


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("fused", [None, True])
def test_a_gradscaler_step_with_infinite_gradients_leaves_everything(kind, fused):
    params = parameters()
    optimizer = kind(params, ewc=consolidated(params), fused=fused)
    set_gradients(params, 0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: value.clone() for name, value in tensors_of(optimizer).items()}
    for bad in (True, False):
        scaled = sum((p * (float("inf") if bad else 1.0)).sum() for p in params)
        optimizer.zero_grad()
        scaler.scale(scaled).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(v, before[n]) for n, v in tensors_of(optimizer).items())
        assert unchanged == bad


def test_a_gradscaler_gives_the_step_without_one():
    params, others = parameters(), parameters()
    plain, scaled = (AdamW(p, ewc=consolidated(p), fused=True) for p in (params, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sum(p.square().sum() for p in params).backward()
    scaler.scale(sum(p.square().sum() for p in others)).backward()
    plain.step()
    scaler.step(scaled)
    for one, other in zip(params, others, strict=True):
        assert torch.equal(one, other)


def test_schedulers_groups_and_their_options_count():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    runs = []
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind([{"params": params[:2], "lr": 0.1}, {"params": params[2:3]}], lr=0.01)
        optimizer.add_param_group({"params": params[3:], "weight_decay": 0.5, "amsgrad": True})
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        runs.append((optimizer, schedulers))
    for step in range(10):
        for (optimizer, schedulers), params in zip(runs, (ours, theirs), strict=True):
            set_gradients(params, step)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    assert_equal_but_for_rounding(runs[0][0], runs[1][0], steps=10)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_any_number_of_threads_gives_the_same_bits(mode):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (70001, 3, 16385)]
        optimizer = AdamW(params, ewc=consolidated(params), mode=mode)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append({**tensors_of(optimizer), "penalty": optimizer.last_penalty})
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in other.items())


def test_the_closures_loss_is_returned_and_the_penalty_kept_apart():
    params = parameters()
    optimizer = SGD(params, lr=0.1, ewc=consolidated(params))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        expected = sum(p.square().sum() for p in params).item()
    assert optimizer.step(closure).item() == expected
    assert optimizer.last_penalty > 0


def test_a_step_before_the_first_task_is_pytorchs():
    params = parameters()
    ewc = EWC([(str(i), p) for i, p in enumerate(params)], ewc_lambda=1e6)
    optimizer = SGD(params, lr=0.1, ewc=ewc)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[0].grad = None
    optimizer.step()
    assert optimizer.last_penalty == 0
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1] - 0.1 * params[1].grad)


def test_the_state_of_a_scheduler_survives_a_larger_strength_and_a_new_task():
    """Springs are looked up anew after each consolidation, and the strength at each step."""
    params = parameters()
    ewc = EWC([(str(i), p) for i, p in enumerate(params)], ewc_lambda=0.0)
    optimizer = SGD(params, lr=0.5, ewc=ewc)
    for p in params:
        p.grad = torch.zeros_like(p)
    anchor = [p.detach().clone() for p in params]
    ewc.consolidate_from({str(i): torch.ones_like(p) for i, p in enumerate(params)})
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    optimizer.step()
    assert torch.equal(params[0], anchor[0] + 1.0)
    ewc.ewc_lambda = 2.0
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), anchor[0])


def test_odd_layouts_take_the_same_step():
    base = torch.randn(8, 6, dtype=torch.float64)
    ours = [nn.Parameter(base.clone().t()), nn.Parameter(base.clone()[:, ::2])]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    ewc, other = consolidated(ours), consolidated(theirs)
    fused, wrapper = AdamW(ours, ewc=ewc), EWCOptimizer(torch.optim.AdamW(theirs), other)
    for step in range(3):
        for params, optimizer in ((ours, fused), (theirs, wrapper)):
            set_gradients(params, step)
            optimizer.step()
    for one, other_param in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other_param, rtol=1e-13, atol=0)
