"""SI inside the fused steps: the path that EWCOptimizer adds up around PyTorch's optimizer."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from models import mlp
from torch import nn
from training import batch, loss, same

from ewc_fast import EWC, EWCOptimizer, optim

STEPS = 100  # in each of two tasks
KINDS = {
    "sgd": (partial(torch.optim.SGD, lr=0.02), partial(optim.SGD, lr=0.02)),
    "momentum": (
        partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-2),
        partial(optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-2),
    ),
    "adamw": (partial(torch.optim.AdamW, lr=1e-3), partial(optim.AdamW, lr=1e-3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("mode", ["gradient", "proximal"])


def si(model, **options):
    return EWC(model, ewc_lambda=0.2, importance="si", **options)


def take(optimizer, model, data):
    optimizer.zero_grad()
    loss(model, data).backward()
    optimizer.step()


def assert_close(found, expected, rtol):
    for field in ("omega", "start", "fisher", "anchor"):
        assert found[field].keys() == expected[field].keys()
        for name, values in expected[field].items():
            budget = rtol * values.abs().amax().item()
            torch.testing.assert_close(found[field][name], values, rtol=0, atol=budget)


@both_modes
@every_kind
def test_two_tasks_are_the_wrappers(kind, mode):
    """In float64: what is left is rounding, magnified by 200 steps."""
    theirs, ours = KINDS[kind]
    torch.manual_seed(0)
    model = mlp().double()
    twin = copy.deepcopy(model)
    wrapped = EWCOptimizer(theirs(model.parameters()), si(model), mode=mode)
    fused = ours(twin.parameters(), ewc=si(twin), mode=mode)
    for _ in range(2):
        for _ in range(STEPS):
            data = batch(model)
            take(wrapped, model, data)
            take(fused, twin, data)
        assert_close(fused.ewc.state_dict(), wrapped.ewc.state_dict(), 1e-9)
        for each in (wrapped, fused):
            each.ewc.consolidate()
    assert_close(fused.ewc.state_dict(), wrapped.ewc.state_dict(), 1e-9)


@both_modes
@every_kind
@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": True}, {"stochastic_rounding": True}],
    ids=["nearest", "master", "by_chance"],
)
def test_the_path_of_bfloat16_is_that_of_what_is_kept(kind, mode, options):
    """From gradients and parameters as they stand around each step, exactly but for the sum."""
    torch.manual_seed(0)
    model = mlp().bfloat16()
    optimizer = KINDS[kind][1](model.parameters(), ewc=si(model), mode=mode, **options)
    for _ in range(2):
        expected = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
        start = copy.deepcopy(model).state_dict()
        for _ in range(STEPS):
            before = copy.deepcopy(model).state_dict()
            take(optimizer, model, batch(model))
            for name, p in model.named_parameters():
                moved = p.detach().double() - before[name].double()
                expected[name] -= p.grad.double() * moved
        state = optimizer.ewc.state_dict()
        for name, values in expected.items():
            assert state["omega"][name].dtype == torch.float32
            torch.testing.assert_close(
                state["omega"][name].double(), values, rtol=0, atol=1e-5 * values.abs().amax()
            )
            assert torch.equal(state["start"][name], start[name].float())
        optimizer.ewc.consolidate()


def test_maximize_counts_as_in_the_wrapper():
    torch.manual_seed(0)
    model = mlp().double()
    twin = copy.deepcopy(model)
    theirs = torch.optim.SGD(model.parameters(), lr=0.01, maximize=True)
    wrapped = EWCOptimizer(theirs, si(model), mode="proximal")
    fused = optim.SGD(twin.parameters(), lr=0.01, maximize=True, ewc=si(twin), mode="proximal")
    for _ in range(20):
        data = batch(model)
        take(wrapped, model, data)
        take(fused, twin, data)
    found, expected = fused.ewc.state_dict(), wrapped.ewc.state_dict()
    assert sum(values.sum().item() for values in found["omega"].values()) < 0
    assert_close(found, expected, 1e-9)


@every_kind
def test_a_skipped_step_and_a_failed_one_leave_the_path_alone(kind):
    torch.manual_seed(0)
    model = mlp()
    optimizer = KINDS[kind][1](model.parameters(), ewc=si(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    data = batch(model)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(factor * loss(model, data)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before = copy.deepcopy(optimizer.state_dict())
    step(float("inf"))
    assert same(optimizer.state_dict(), before)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = before["param_groups"][0]["lr"]
    assert same(optimizer.state_dict(), before)


def test_training_resumes_bit_for_bit_in_mid_task():
    def make(seed):
        torch.manual_seed(seed)
        model = mlp()
        return model, optim.AdamW(model.parameters(), lr=1e-2, ewc=si(model))

    model, optimizer = make(0)
    tasks = [[batch(model) for _ in range(4)] for _ in range(2)]
    for data in tasks[0]:
        take(optimizer, model, data)
    optimizer.ewc.consolidate()
    for data in tasks[1][:2]:
        take(optimizer, model, data)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    twin, resumed = make(1)
    twin.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each, its in ((model, optimizer), (twin, resumed)):
        for data in tasks[1][2:]:
            take(its, each, data)
        its.ewc.consolidate()
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_only_tracked_parameters_with_a_gradient_have_a_path():
    model, other = mlp(), nn.Parameter(torch.ones(3))
    model[0].weight.requires_grad_(False)
    optimizer = optim.SGD([*model.parameters(), other], lr=0.1, ewc=si(model))
    (model[-1].bias.sum() + other.sum()).backward()
    optimizer.step()
    assert optimizer.ewc.state_dict()["omega"].keys() == {"4.bias"}
    assert torch.equal(other.detach(), torch.full((3,), 0.9))
    optimizer.ewc.consolidate()
    assert optimizer.ewc.fisher["4.bias"].all()
    assert not optimizer.ewc.fisher["2.weight"].any()
