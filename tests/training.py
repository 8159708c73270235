"""Pieces of training that tests share, and what they compare before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from models import CLASSES, features, mlp
from torch import Tensor, nn

from ewc_fast import EWC


def batch(model: nn.Module, n: int = 8) -> tuple[Tensor, Tensor]:
    dtype = next(model.parameters()).dtype
    return features(n).to(dtype), torch.randint(CLASSES, (n,))


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def shift(model: nn.Module, by: float = 0.1) -> None:
    """Move all parameters, as training would."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(by * torch.randn_like(param))


def consolidated(make: Callable[[], nn.Module] = mlp, **options: Any) -> tuple[nn.Module, EWC]:
    """Return a model that was moved since its second task, and its EWC."""
    model = make()
    ewc = EWC(model, **({"ewc_lambda": 30.0} | options))
    for _ in range(2):
        ewc.consolidate([batch(model)])
        shift(model)
    return model, ewc


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def penalty_by_definition(model: nn.Module, ewc: EWC) -> tuple[float, dict[str, Tensor]]:
    """Return value and pulls from what can be read, in float64; without the constant."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fisher, anchor = ewc.fisher, ewc.anchor
    distance = {n: p.detach().double() - anchor[n].double() for n, p in params.items()}
    pulls = {n: ewc.ewc_lambda * fisher[n].double() * d for n, d in distance.items()}
    return sum((0.5 * pulls[n] * distance[n]).sum().item() for n in params), pulls


def all_of(model: nn.Module) -> list[Any]:
    """Return everything about a model that a visitor could change, to compare bit by bit."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(t), t.detach().clone(), t.requires_grad) for name, t in tensors],
        [(name, id(p.grad), p.grad if p.grad is None else p.grad.clone())
         for name, p in model.named_parameters()],
        [(name, module.training) for name, module in model.named_modules()],
        torch.is_grad_enabled(),
    ]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two results of :func:`all_of`, or two state dicts, are equal bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
