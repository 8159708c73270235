r"""The specification: every operation in plain PyTorch, for any device, dtype and stride.

All lists run in parallel: entry ``i`` of each belongs to parameter ``i``. Arithmetic is in the
state's dtype (float32; float64 for float64 parameters), in float64 for the merge. The formulas are
those of ``csrc/math.h``; the compiled operations are tested against this module.

==============  =====================================================================
penalty         :math:`\frac\lambda2 \sum_i F_i (\theta_i - a_i)^2`
its gradient    :math:`\lambda F_i (\theta_i - a_i)`
merge           :math:`F' = \gamma F + F_t`, :math:`a' = a + \frac{F_t}{F'}(\theta - a)`
merge, online   :math:`F' = \gamma F + F_t`, :math:`a' = \theta`
proximal step   :math:`\theta \leftarrow (\theta + \eta\lambda F a) / (1 + \eta\lambda F)`
==============  =====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def penalty(params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float) -> Tensor:
    """Return the penalty as a float64 scalar, differentiable in ``params``."""
    terms = [
        (ewc_lambda * f.double() * (p.double() - a.double()).square()).sum()
        for p, f, a in zip(params, fisher, anchor, strict=True)
    ]
    return 0.5 * _sum(terms)


def penalty_grad(
    params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float
) -> list[Tensor]:
    """Return the penalty's gradient, in the state's dtype."""
    return [
        ewc_lambda * f * (p.to(f.dtype) - a) for p, f, a in zip(params, fisher, anchor, strict=True)
    ]


@torch.no_grad()
def add_penalty_grad_(
    grads: Tensors, params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float
) -> Tensor:
    """Add the penalty's gradient to ``grads``; return the penalty as a float64 scalar."""
    value = penalty(params, fisher, anchor, ewc_lambda=ewc_lambda)
    pulls = penalty_grad(params, fisher, anchor, ewc_lambda=ewc_lambda)
    for grad, pull in zip(grads, pulls, strict=True):
        grad.copy_(grad.to(pull.dtype) + pull)
    return value


@torch.no_grad()
def accumulate_square_(fisher: Tensors, grads: Tensors, *, weight: float) -> None:
    """Add ``weight`` times the squared gradients, summed over a leading sample dimension."""
    for f, g in zip(fisher, grads, strict=True):
        squares = g.to(f.dtype).square()
        f.add_(squares.sum(0) if g.dim() > f.dim() else squares, alpha=weight)


@torch.no_grad()
def merge_(
    fisher: Tensors,
    anchor: Tensors,
    residual: Tensors,
    new_fisher: Tensors,
    params: Tensors,
    *,
    gamma: float,
) -> Tensor:
    """Merge a new quadratic into the kept one; return the constant it leaves, a float64 scalar.

    ``anchor + residual`` is the exact anchor: the residual keeps what ``anchor``'s dtype drops.
    """
    constants = []
    for f, a, r, n, p in zip(fisher, anchor, residual, new_fisher, params, strict=True):
        kept = gamma * f.double()
        total = kept + n.double()
        exact = a.double() + r.double()
        distance = p.double() - exact
        share = torch.where(kept > 0, n.double() / total, 1.0)
        merged = torch.where(kept > 0, exact + share * distance, p.double())
        constants.append((0.5 * share * kept * distance.square()).sum())
        f.copy_(total)
        a.copy_(merged)
        r.copy_((merged - a.double()).float())
    return _sum(constants)


@torch.no_grad()
def merge_online_(
    fisher: Tensors, anchor: Tensors, new_fisher: Tensors, params: Tensors, *, gamma: float
) -> None:
    """Decay and add the Fisher; move the anchor to the parameters."""
    for f, a, n, p in zip(fisher, anchor, new_fisher, params, strict=True):
        f.copy_(gamma * f.double() + n.double())
        a.copy_(p)


@torch.no_grad()
def proximal_step_(
    params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float, lr: float
) -> None:
    """Move ``params`` to the minimum of the penalty plus their squared distance over 2 lr."""
    for p, f, a in zip(params, fisher, anchor, strict=True):
        strength = lr * ewc_lambda * f
        theta = p.to(f.dtype)
        p.copy_(theta - (theta - a) / (1 + 1 / strength))


def _sum(terms: list[Tensor]) -> Tensor:
    """Add scalars that may be on several devices, on the first one's."""
    if not terms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
