"""Drift and penalty tensor by tensor: their formulas, and that parts add up."""

from __future__ import annotations

import pytest
import torch
from models import frozen, mlp
from numerics import value_budget
from training import batch, consolidated, penalty_by_definition, shift

from ewc_fast import EWC
from ewc_fast.drift import per_layer

MODELS = {
    "float32": mlp,
    "float64": lambda: mlp().double(),
    "bfloat16": lambda: mlp().bfloat16(),
    "frozen_layer": lambda: frozen(mlp(), "2.weight"),
}


def exact_squares(ewc):
    """Return sum F (theta - a)^2 of each trainable parameter, in float64."""
    return {
        name: (ewc.fisher[name].double() * (p.double() - ewc.anchor[name].double()) ** 2).sum()
        for name, p in ewc.parameters.items()
        if p.requires_grad
    }


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_drift_and_penalty_are_what_their_formulas_say(make, device):
    model, ewc = consolidated(make)
    dtype = next(model.parameters()).dtype
    squares, drift, parts = exact_squares(ewc), ewc.drift(), ewc.penalty_per_parameter()
    assert list(drift) == list(parts) == list(squares)
    for name, square in squares.items():
        exact, part = square.item(), 0.5 * ewc.ewc_lambda * square.item()
        assert parts[name].dtype == drift[name].dtype == torch.float64
        assert abs(parts[name].item() - part) <= value_budget(part, dtype)
        assert abs(drift[name].item() - exact**0.5) <= value_budget(exact**0.5, dtype)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_parts_add_up_to_the_penalty_without_its_constant(make, device):
    model, ewc = consolidated(make)
    whole, dtype = penalty_by_definition(model, ewc)[0], next(model.parameters()).dtype
    assert abs(ewc.add_penalty_grad_().item() - ewc.constant_penalty - whole) <= value_budget(
        whole + ewc.constant_penalty, dtype
    )
    layers = ewc.penalty_per_layer()
    assert list(layers) == ["0", "2", "4"]
    for parts in (ewc.penalty_per_parameter(), layers):
        total = torch.stack([*parts.values()]).sum().item()
        assert abs(total - whole) <= value_budget(whole, dtype)


def test_a_bfloat16_fisher_will_do():
    _, ewc = consolidated()
    for spring in ewc._springs.values():
        spring.fisher = spring.fisher.bfloat16()
    for name, square in exact_squares(ewc).items():
        exact = square.item() ** 0.5
        assert abs(ewc.drift()[name].item() - exact) <= value_budget(exact, torch.float32)


@pytest.mark.parametrize("storage", ["e5m3", "float32@cpu"])
def test_every_storage_will_do(storage):
    _, ewc = consolidated(storage=storage)
    for name, square in exact_squares(ewc).items():
        assert abs(ewc.drift()[name].item() - square.item() ** 0.5) <= value_budget(
            square.item() ** 0.5, torch.float32
        )


def test_layers_are_name_prefixes_of_the_depth_asked_for():
    names = ["scale", "body.0.weight", "body.0.bias", "body.10.weight", "head.bias"]
    parts = {name: torch.tensor(2.0**n) for n, name in enumerate(names)}
    at = {
        depth: {k: v.item() for k, v in per_layer(parts, depth=depth).items()} for depth in (1, 2)
    }
    assert at[1] == {"": 1.0, "body": 14.0, "head": 16.0}
    assert at[2] == {"": 1.0, "body.0": 6.0, "body.10": 8.0, "head": 16.0}
    with pytest.raises(ValueError, match="depth: expected an integer >= 1, got 0"):
        per_layer(parts, depth=0)


def test_half_the_squared_drift_is_the_change_of_the_outputs_in_nats():
    """For one weight, whose Fisher matrix is its diagonal."""
    torch.manual_seed(1)
    model = torch.nn.Linear(1, 2, bias=False).double()
    model.weight.data[0] = 0.0
    data = [(torch.randn(50, 1).double(), torch.zeros(50, dtype=torch.long))]
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate(data)
    before = model(data[0][0]).log_softmax(-1).detach()
    step = 1e-4
    with torch.no_grad():
        model.weight[1] += step
        now = model(data[0][0]).log_softmax(-1)
    divergence = (before.exp() * (before - now)).sum(-1).mean().item()
    # the next order is as much smaller as the step
    assert 0.5 * ewc.drift()["weight"].item() ** 2 == pytest.approx(divergence, rel=10 * step)


def test_before_the_first_task_and_at_the_anchor_there_is_none():
    model = mlp()
    ewc = EWC(model, ewc_lambda=1.0)
    assert ewc.drift() == ewc.penalty_per_parameter() == ewc.penalty_per_layer() == {}
    ewc.consolidate([batch(model)])
    assert not any(value.item() for value in ewc.drift().values())
    shift(model)
    assert all(value.item() > 0 for value in ewc.drift().values())


def test_logging_leaves_gradients_and_graphs_alone():
    model, ewc = consolidated()
    assert not any(v.requires_grad for v in ewc.drift().values())
    assert not any(v.requires_grad for v in ewc.penalty_per_layer().values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_gpu():
    torch.set_default_device("cuda")
    try:
        _, ewc = consolidated()
        ewc.drift()  # compiles what must be
        torch.cuda.set_sync_debug_mode("error")
        ewc.drift(), ewc.penalty_per_layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_default_device(None)
