r"""The specification: every operation in plain PyTorch, for any device, dtype and stride.

All lists run in parallel: entry ``i`` of each belongs to parameter ``i``. Arithmetic is in the
state's dtype (float32; float64 for float64 parameters), in float64 for the merge. The formulas are
those of ``csrc/math.h``; the compiled operations are tested against this module.

A Fisher in bfloat16 is computed with in the anchor's dtype and, where it is written, rounded by
chance (:func:`round_stochastically`): the sum in float32 (from float64 in a merge) goes to one of
the two neighbours in bfloat16, to the upper one with the probability of the part that is dropped.
The random bits of element ``i`` of a row are ``random_bits(random_bits(seed, ordinal), i)``, with
the row's place in the call's lists and the element's place in the row's memory (where the row has
gaps: without counting them).

==============  =====================================================================
penalty         :math:`\frac\lambda2 \sum_i F_i (\theta_i - a_i)^2`
its gradient    :math:`\lambda F_i (\theta_i - a_i)`
merge           :math:`F' = \gamma F + F_t`, :math:`a' = a + \frac{F_t}{F'}(\theta - a)`
merge, online   :math:`F' = \gamma F + F_t`, :math:`a' = \theta`
proximal step   :math:`\theta \leftarrow (\theta + \eta\lambda F a) / (1 + \eta\lambda F)`
squared         :math:`F_{oi} \mathrel{+}= \sum_n (\sum_t g_{nto} a_{nti})^2`, for convolutions
product         with :math:`a` at the place in the input that position and kernel element meet
==============  =====================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Sequence[Tensor]
Bits = TypeVar("Bits", int, Tensor)

_32_BITS = 0xFFFFFFFF


def penalty(params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float) -> Tensor:
    """Return the penalty as a float64 scalar, differentiable in ``params``."""
    terms = [
        (ewc_lambda * f.double() * (p.double() - a.double()).square()).sum()
        for p, f, a in zip(params, fisher, anchor, strict=True)
    ]
    return 0.5 * add_scalars(terms)


def penalty_grad(
    params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float
) -> list[Tensor]:
    """Return the penalty's gradient, in the state's dtype."""
    return [
        ewc_lambda * f.to(a.dtype) * (p.to(a.dtype) - a)
        for p, f, a in zip(params, fisher, anchor, strict=True)
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
def accumulate_square_(
    fisher: Tensors,
    grads: Tensors,
    *,
    weight: float,
    seed: int = 0,
    ordinals: Sequence[int] | None = None,
) -> None:
    """Add ``weight`` times the squared gradients, summed over a leading sample dimension."""
    for f, g, ordinal in zip(fisher, grads, ordinals or range(len(fisher)), strict=True):
        compute = torch.float32 if f.dtype == torch.bfloat16 else f.dtype
        squares = g.to(compute).square()
        squares = squares.sum(0) if g.dim() > f.dim() else squares
        _keep(f, f.to(compute) + weight * squares, seed, ordinal)


@torch.no_grad()
def merge_(
    fisher: Tensors,
    anchor: Tensors,
    residual: Tensors,
    new_fisher: Tensors,
    params: Tensors,
    *,
    gamma: float,
    seed: int = 0,
    ordinals: Sequence[int] | None = None,
) -> Tensor:
    """Merge a new quadratic into the kept one; return the constant it leaves, a float64 scalar.

    ``anchor + residual`` is the exact anchor: the residual keeps what ``anchor``'s dtype drops.
    """
    constants = []
    rows = zip(fisher, anchor, residual, new_fisher, params, strict=True)
    for (f, a, r, n, p), ordinal in zip(rows, ordinals or range(len(fisher)), strict=True):
        kept = gamma * f.double()
        total = kept + n.double()
        exact = a.double() + r.double()
        distance = p.double() - exact
        share = torch.where(kept > 0, n.double() / total, 1.0)
        merged = torch.where(kept > 0, exact + share * distance, p.double())
        constants.append((0.5 * share * kept * distance.square()).sum())
        _keep(f, total, seed, ordinal)
        a.copy_(merged)
        r.copy_((merged - a.double()).float())
    return add_scalars(constants)


@torch.no_grad()
def merge_online_(
    fisher: Tensors,
    anchor: Tensors,
    new_fisher: Tensors,
    params: Tensors,
    *,
    gamma: float,
    seed: int = 0,
    ordinals: Sequence[int] | None = None,
) -> None:
    """Decay and add the Fisher; move the anchor to the parameters."""
    rows = zip(fisher, anchor, new_fisher, params, strict=True)
    for (f, a, n, p), ordinal in zip(rows, ordinals or range(len(fisher)), strict=True):
        _keep(f, gamma * f.double() + n.double(), seed, ordinal)
        a.copy_(p)


@torch.no_grad()
def proximal_step_(
    params: Tensors, fisher: Tensors, anchor: Tensors, *, ewc_lambda: float, lr: float
) -> None:
    """Move ``params`` to the minimum of the penalty plus their squared distance over 2 lr."""
    for p, f, a in zip(params, fisher, anchor, strict=True):
        strength = lr * ewc_lambda * f.to(a.dtype)
        theta = p.to(a.dtype)
        p.copy_(theta - (theta - a) / (1 + 1 / strength))


@torch.no_grad()
def accumulate_squared_product_(
    total: Tensor, grads: Tensor, inputs: Tensor, *, bias_total: Tensor | None
) -> None:
    """Add squared per-sample gradients of a linear layer: total (O, I), grads (N, T, O)."""
    g, a = grads.to(total.dtype), inputs.to(total.dtype)
    total.add_(torch.einsum("nto,nti->noi", g, a).square().sum(0))
    if bias_total is not None:
        bias_total.add_(g.sum(1).square().sum(0))


@torch.no_grad()
def accumulate_squared_convolution_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias_total: Tensor | None,
) -> None:
    """Add squared per-sample gradients of a convolution: total (O, I / groups, *kernel)."""
    g = grads.to(total.dtype).flatten(2).unflatten(1, (groups, -1))
    around = [pad for size in reversed(padding) for pad in (size, size)]
    a = F.pad(inputs.to(total.dtype), around)
    weights = total.flatten(2)
    kernel = itertools.product(*(range(size) for size in total.shape[2:]))
    for index, place in enumerate(kernel):
        window: list[slice] = [slice(None), slice(None)]
        for k, spread, step, count in zip(place, dilation, stride, grads.shape[2:], strict=True):
            window.append(
                slice(k * spread, k * spread + step * (count - 1) + 1 if count else 0, step)
            )
        met = a[tuple(window)].flatten(2).unflatten(1, (groups, -1))
        squares = torch.einsum("ngot,ngit->ngoi", g, met).square().sum(0)
        weights[:, :, index].add_(squares.flatten(0, 1))
    if bias_total is not None:
        bias_total.add_(g.sum(3).square().sum(0).flatten())


@torch.no_grad()
def accumulate_squared_rows_(
    total: Tensor, indices: Tensor, values: Tensor, *, skipped_row: int
) -> None:
    """Add squared per-sample gradients of a table (V, *row), given those (N, T, D) of some rows."""
    entries = len(total)
    sample = torch.arange(len(indices), device=indices.device).unsqueeze(1)
    keys, places = (sample * entries + indices).flatten().unique(return_inverse=True)
    flat = values.flatten(0, 1).to(total.dtype)
    sums = flat.new_zeros(len(keys), flat.shape[1]).index_add_(0, places, flat)
    rows = keys % entries
    squares = sums.square_().masked_fill_((rows == skipped_row).unsqueeze(1), 0)
    total.index_add_(0, rows, squares.view(-1, *total.shape[1:]))


@torch.no_grad()
def accumulate_squared_sums_(
    total: Tensor, grads: Tensor, factor: Tensor | None, *, bias_total: Tensor | None
) -> None:
    """Add squared sums over positions of grads (N, T, D) times a factor: total (D)."""
    product = grads if factor is None else grads * factor
    total.add_(product.sum(1, dtype=total.dtype).square().sum(0))
    if bias_total is not None:
        bias_total.add_(grads.sum(1, dtype=bias_total.dtype).square().sum(0))


def random_bits(seed: int, element: Bits) -> Bits:
    """Return 32 bits that depend on the seed and the element alone (murmur3's finaliser).

    Tensors are int64. Their products wrap around, which leaves the lowest 32 bits right.
    """
    bits = seed ^ (element * 0x9E3779B1 & _32_BITS) ^ ((element >> 32) * 0x7FEB352D & _32_BITS)
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & _32_BITS
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & _32_BITS
    return bits ^ bits >> 16


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """Round float32 to the bfloat16 below or above, above with probability of what is dropped.

    ``random`` holds 32 random bits for each element. NaN and infinity stay what they are.
    """
    bits = values.view(torch.int32).long() & _32_BITS
    rounded = bits + (random & 0xFFFF) >> 16
    quiet_nan = bits >> 16 | 0x40
    kept = torch.where(values.isnan(), quiet_nan, rounded)
    return kept.to(torch.int16).view(torch.bfloat16)


def _keep(fisher: Tensor, value: Tensor, seed: int, ordinal: int) -> None:
    """Write a Fisher: rounded by chance to bfloat16, else to nearest."""
    if fisher.dtype == torch.bfloat16:
        write_stochastically(fisher, value.float(), seed, ordinal)
    else:
        fisher.copy_(value)


def write_stochastically(target: Tensor, value: Tensor, seed: int, ordinal: int) -> None:
    """Write float32 into a row of bfloat16, rounded by chance."""
    random = random_bits(random_bits(seed, ordinal), _places_in_memory(target))
    target.copy_(round_stochastically(value, random))


def _places_in_memory(like: Tensor) -> Tensor:
    """Return each element's place in the order of memory, gaps not counted."""
    strides = torch.empty_like(like, device="meta").stride()
    places = torch.arange(like.numel(), device=like.device)
    return places.as_strided(like.shape, strides)


def add_scalars(terms: list[Tensor]) -> Tensor:
    """Add scalars that may be on several devices, on the first one's."""
    if not terms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
