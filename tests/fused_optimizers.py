"""Fused optimizers beside PyTorch's: parameters, gradients, springs, and how far they are apart."""

from __future__ import annotations

import torch
from torch import nn

from ewc_fast import EWC
from ewc_fast.optim import SGD, Adam, AdamW

PAIRS = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
SHAPES = [(33, 7), (7,), (), (0,), (2, 3, 4, 5)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [nn.Parameter(p.to(dtype)) for p in made]


def set_gradients(params, step, dtype=None):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(dtype or p.dtype).to(p.dtype)


def consolidated(params, ewc_lambda=0.5, bfloat16=False):
    ewc = EWC([(str(i), p) for i, p in enumerate(params)], ewc_lambda=ewc_lambda)
    generator = torch.Generator().manual_seed(99)
    ewc.consolidate_from(
        {str(i): torch.rand(p.shape, generator=generator).to(p) for i, p in enumerate(params)}
    )
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return ewc


def tensors_of(optimizer):
    """Every tensor that a step changes, by a readable name."""
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        found[f"param {i}"] = p.detach()
        for name, value in optimizer.state.get(p, {}).items():
            found[f"{name} {i}"] = value
    return found


def largest_gap(found, exact):
    """The largest error, as a share of the largest value of its tensor."""
    gaps = [
        ((value.double() - exact[name].double()).abs().max() / exact[name].abs().max()).item()
        for name, value in found.items()
        if value.numel()
    ]
    return max(gaps)
