"""What fused optimizers refuse, and that a refused step has changed nothing."""

from __future__ import annotations

import pytest
import torch
from fused_optimizers import PAIRS, consolidated, parameters
from torch import nn

from ewc_fast.optim import SGD, Adam, AdamW


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: Adam(p, lr=-1.0), ValueError, "learning rate"),
        (lambda p: Adam(p, mode="both"), ValueError, "mode"),
        (lambda p: Adam(p, ewc="strong"), TypeError, "ewc"),
        (lambda p: Adam(p, differentiable=True), ValueError, "differentiable"),
        (lambda p: Adam(p, master_weights=True, stochastic_rounding=True), ValueError, "stochas"),
        (lambda p: SGD(p, nesterov=True), ValueError, "[Nn]esterov"),
        (lambda p: SGD(p, ewc=consolidated(parameters())), ValueError, "none of the parameters"),
        (lambda p: AdamW(p, banana=1), TypeError, "banana"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(parameters())


@pytest.mark.parametrize("kind", PAIRS)
def test_sparse_gradients_are_refused_and_nothing_is_written(kind):
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = kind([{"params": [dense]}, {"params": table.parameters()}])
    dense.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state


WRONG = {
    "lr": lambda group: group.update(lr=-1.0),
    "nan": lambda group: group.update(lr=torch.tensor(float("nan"))),
    "weight_decay": lambda group: group.update(weight_decay=-1.0),
    "overflow": lambda group: group.update(lr=3e38),
    "kind": lambda group: group["params"].append(nn.Parameter(torch.ones(2, dtype=torch.cfloat))),
}


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("kind", PAIRS)
def test_what_is_wrong_in_a_later_group_stops_all_of_them(kind, spoil, mode):
    params = parameters()
    options = {"momentum": 0.9, "dampening": 0.5} if kind is SGD else {}
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = kind(groups, lr=0.01, ewc=consolidated(params, 100.0), mode=mode, **options)
    spoil(optimizer.param_groups[1])
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    params[-1].grad = None
    before = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.last_penalty is None
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
