"""Fused optimizers on 16-bit parameters: master copies, rounding by chance, PyTorch's own loss."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from fused_optimizers import PAIRS, largest_gap, parameters, set_gradients, tensors_of
from torch import nn

from ewc_fast.optim import SGD, Adam


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PAIRS)
def test_master_copies_follow_float32_training(kind, dtype):
    half, full = parameters(dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    options = {"lr": 1e-4} | ({"momentum": 0.9} if kind is SGD else {})
    optimizer = kind(half, master_weights=True, **options)
    exact = kind(full, **options)
    for step in range(50):
        set_gradients(half, step)
        for p, q in zip(half, full, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        exact.step()
    for p, q in zip(half, full, strict=True):
        assert torch.equal(optimizer.state[p]["master"], q.detach())
        assert torch.equal(p, q.detach().to(dtype))
    resumed = kind(half, master_weights=True, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, value in tensors_of(optimizer).items():
        assert torch.equal(tensors_of(resumed)[name], value)
        assert tensors_of(resumed)[name].dtype == value.dtype


def test_rounding_by_chance_keeps_updates_that_nearest_loses():
    """Steps of 2^-12 from 1: bfloat16 has nothing between 1 and 1 + 2^-7."""
    results = {}
    for by_chance in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = SGD([param], lr=2.0**-12, stochastic_rounding=by_chance)
        for _ in range(100):
            param.grad = -torch.ones_like(param)
            optimizer.step()
        results[by_chance] = param.detach().float().mean().item()
    assert results[False] == 1.0
    # Each of 100 steps goes up 2^-7 with probability 2^-5: the mean's standard deviation is 1e-4.
    assert abs(results[True] - (1 + 100 * 2.0**-12)) < 5e-4


@pytest.mark.parametrize(
    ("dtype", "amsgrad"), list(itertools.product([torch.bfloat16, torch.float16], [False, True]))
)
def test_half_precision_loses_no_more_than_pytorchs_fused_step(dtype, amsgrad):
    ours = Adam(parameters(dtype), lr=0.01, amsgrad=amsgrad)
    theirs = torch.optim.Adam(parameters(dtype), lr=0.01, amsgrad=amsgrad, fused=True)
    start = [nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    exact = torch.optim.Adam(start, lr=0.01, amsgrad=amsgrad, foreach=False)
    for step in range(10):
        for optimizer in (ours, theirs, exact):
            set_gradients(optimizer.param_groups[0]["params"], step, dtype)
            optimizer.step()
    allowed = 1.5 * largest_gap(tensors_of(theirs), tensors_of(exact)) + torch.finfo(dtype).eps
    assert largest_gap(tensors_of(ours), tensors_of(exact)) <= allowed
