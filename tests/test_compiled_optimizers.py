"""The optimizers with the penalty inside, compiled: one graph for a run, and the eager bits."""

from __future__ import annotations

import pytest
import torch
from models import mlp
from torch._dynamo.utils import counters
from training import batch, consolidated, loss, same

from ewc_fast.optim import SGD, Adam, AdamW

STEPS = 20
CASES = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (Adam, {"weight_decay": 0.01, "maximize": True}),
    "adamw": (AdamW, {}),
    "amsgrad": (AdamW, {"amsgrad": True, "betas": (0.5, 0.9), "eps": 1e-4}),
}


def trained(kind, options, dtype=torch.float32, compiled=True):
    """Return parameters, state and penalties after a run, and how many graphs it took."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model, ewc = consolidated(lambda: mlp().to(dtype))
    params = list(model.parameters())
    groups = [{"params": params[:1], "lr": torch.tensor(0.02)}, {"params": params[1:]}]
    optimizer = kind(groups, lr=torch.tensor(0.01), ewc=ewc, **options)
    bare = optimizer.step  # schedulers put what no graph holds around the optimizer's
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5),
    ]
    step = bare
    if compiled:
        step = torch.compile(lambda: bare(), fullgraph=True, backend="aot_eager")
    penalties = []
    for number in range(STEPS):
        ewc.ewc_lambda = 3.0 + number % 7
        optimizer.zero_grad()
        loss(model, batch(model)).backward()
        params[-1].grad = None  # as a head that is not in use
        step()
        penalties.append(optimizer.last_penalty.clone())
        for scheduler in schedulers:
            scheduler.step()
    left = {"penalties": penalties, "state": optimizer.state_dict()["state"]}
    return left | {"params": dict(model.named_parameters())}, counters["stats"]["unique_graphs"]


def assert_one_graph_and_the_eager_bits(kind, options, graphs=1, **more):
    found, count = trained(kind, options, **more)
    exact, _ = trained(kind, options, compiled=False, **more)
    assert count == graphs
    assert same(found, exact)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())
def test_one_graph_serves_a_run_with_schedules_and_gives_the_eager_bits(kind, options, mode):
    assert_one_graph_and_the_eager_bits(kind, options | {"mode": mode})


def test_dampened_momentum_begins_in_a_graph_of_its_own():
    options = {"momentum": 0.9, "dampening": 0.3}
    assert_one_graph_and_the_eager_bits(SGD, options, graphs=2)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_master_copies_compile_too(kind):
    options = {"master_weights": True, "mode": "proximal"}
    assert_one_graph_and_the_eager_bits(kind, options, dtype=torch.bfloat16)


def test_a_graph_rounds_by_chance_anew_at_each_step():
    options = {"stochastic_rounding": True}
    assert_one_graph_and_the_eager_bits(AdamW, options, dtype=torch.bfloat16)
