"""Every operation over lists: operands for it, its exact results in float64, the error allowed.

Operands stand in the kernels' order. For kernels that are called by themselves (on the host, on a
GPU); ``ewc_fast.functional`` has its own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import DTYPES
from numerics import assert_within, compute_dtype, gradient_budget, smallest, u, value_budget
from torch import Tensor

Lists = list[list[Tensor]]

every_instance = pytest.mark.parametrize(
    ("dtype", "fisher"),  # of the parameters; of the Fisher, None being the state's
    [
        *[pytest.param(dtype, None, id=f"{dtype}"[6:]) for dtype in DTYPES],
        *[
            pytest.param(dtype, torch.bfloat16, id=f"{dtype}-bfloat16_fisher"[6:])
            for dtype in DTYPES
            if dtype != torch.float64  # beside which the Fisher is float64
        ],
    ],
)


@dataclass(frozen=True)
class ListOperation:
    """One operation: how operands are made, and whether results are what they must be."""

    name: str
    make: Callable[[list[Tensor], torch.dtype | None], Lists]
    check: Callable[[Lists, Lists, float, float | None], None]
    coefficient: float
    param: int  # places among the operands: of the parameters, or gradients; of the Fisher
    fisher: int
    written: tuple[int, ...]
    sums: bool = False


def state(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return random tensors in the state's dtype, or another."""
    made = [torch.randn(p.shape, dtype=torch.float64) for p in params]
    return [s.to(dtype or compute_dtype(p.dtype)) for s, p in zip(made, params, strict=True)]


def positive(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the same without negative values, like a Fisher; every fifth value is zero."""
    made = [s.abs_() for s in state(params, dtype)]
    for s in made:
        s.flatten()[::5] = 0
    return made


def noise(params: Sequence[Tensor]) -> list[Tensor]:
    """Return random tensors of the parameters' dtype."""
    return [torch.randn(p.shape).to(p.dtype) for p in params]


def rows(before: Lists, after: Lists) -> zip[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Pair each row's operands before with those after, in float64 except for dtypes asked of."""
    return zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)


def fisher_budget(exact: Tensor, dtype: torch.dtype, rounding: Tensor) -> Tensor:
    """Return the error allowed for a Fisher: a whole unit where bfloat16 is rounded by chance."""
    if dtype == torch.bfloat16:
        return rounding + 2 * u(dtype) * (exact.abs() + rounding) + smallest(dtype)
    return rounding + u(dtype) * exact.abs() + smallest(dtype)


def _pull(param: Tensor, fisher: Tensor, anchor: Tensor, ewc_lambda: float) -> Tensor:
    return ewc_lambda * fisher.double() * (param.double() - anchor.double())


def _penalty_of(params: list[Tensor], fisher: list[Tensor], anchor: list[Tensor], c: float):
    operands = zip(params, fisher, anchor, strict=True)
    terms = [0.5 * (_pull(p, f, a, c) * (p.double() - a.double())).sum() for p, f, a in operands]
    return float(sum(terms)), params[0].dtype if params else torch.float32


def _check_value(params: list[Tensor], fisher: list[Tensor], anchor: list[Tensor], c, value):
    exact, dtype = _penalty_of(params, fisher, anchor, c)
    assert abs(value - exact) <= value_budget(exact, dtype), (value, exact)


def _check_add_penalty_grad(before: Lists, after: Lists, c: float, value: float | None) -> None:
    for (old, p, f, a), (grad, *_) in rows(before, after):
        pull = _pull(p, f, a, c)
        budget = gradient_budget(old.double(), pull, p.dtype)
        assert_within(grad, old.double() + pull, budget, "grad")
    _check_value(*before[1:], c, value)


def _check_penalty(before: Lists, after: Lists, c: float, value: float | None) -> None:
    _check_value(*before, c, value)


def _check_penalty_grad(before: Lists, after: Lists, c: float, value: float | None) -> None:
    for (_, p, f, a), (out, *_) in rows(before, after):
        pull = _pull(p, f, a, c)
        assert_within(out, pull, gradient_budget(0 * pull, pull, p.dtype), "out")


def _check_accumulate_square(before: Lists, after: Lists, c: float, value: float | None) -> None:
    for (old, g), (fisher, _) in rows(before, after):
        samples = g.shape[0] if g.dim() > old.dim() else 1
        squares = g.double().square()
        exact = old.double() + c * (squares.sum(0) if g.dim() > old.dim() else squares)
        # one square, `samples` additions, weight, product, sum
        rounding = 2 * (5 + samples) * u(compute_dtype(g.dtype)) * exact
        assert_within(fisher, exact, fisher_budget(exact, fisher.dtype, rounding), "fisher")


def _check_merge(before: Lists, after: Lists, c: float, value: float | None) -> None:
    constant = 0.0
    for old, (f, a, r, _, _) in rows(before, after):
        f_old, a_old, r_old, n, p = (t.double() for t in old)
        kept, start, double = c * f_old, a_old + r_old, u(torch.float64)
        total = kept + n
        share = torch.where(kept > 0, n / total, 1.0)
        exact = torch.where(kept > 0, start + share * (p - start), p)
        constant += (0.5 * share * kept * (p - start).square()).sum().item()
        assert_within(f, total, fisher_budget(total, f.dtype, 2 * double * total), "fisher")
        inner = 8 * double * (start.abs() + p.abs())
        assert_within(a, exact, u(a.dtype) * exact.abs() + inner, "anchor: rounded once")
        left = u(a.dtype) * u(torch.bfloat16) * exact.abs() + inner + 1e-42
        assert_within(a.double() + r.double(), exact, left, "anchor + residual")
    assert abs(value - constant) <= 1e-12 * constant


def _check_merge_online(before: Lists, after: Lists, c: float, value: float | None) -> None:
    for (old, _, n, p), (f, a, *_) in rows(before, after):
        total = c * old.double() + n.double()
        budget = fisher_budget(total, f.dtype, 2 * u(torch.float64) * total)
        assert_within(f, total, budget, "fisher: float64 arithmetic, rounded once")
        assert torch.equal(a, p.to(a.dtype))


def _check_proximal_step(before: Lists, after: Lists, c: float, value: float | None) -> None:
    for (old, f, a), (p, *_) in rows(before, after):
        s, theta, rest = c * f.double(), old.double(), a.double()
        exact, moved = (theta + s * rest) / (1 + s), (theta - rest).abs()
        compute = u(compute_dtype(p.dtype))
        budget = 6 * compute * moved + (compute + u(p.dtype)) * (exact.abs() + moved * compute)
        assert_within(p, exact, 2 * budget + smallest(p.dtype), "params")
        assert torch.equal(p[f == 0], old[f == 0])


def _residual(params: list[Tensor]) -> list[Tensor]:
    return [1e-8 * s for s in state(params, torch.bfloat16)]


OPERATIONS = {
    operation.name: operation
    for operation in [
        ListOperation(
            "add_penalty_grad",
            lambda p, f: [noise(p), p, positive(p, f), state(p)],
            _check_add_penalty_grad, 1.7, param=1, fisher=2, written=(0,), sums=True,
        ),
        ListOperation(
            "penalty",
            lambda p, f: [p, positive(p, f), state(p)],
            _check_penalty, 1.7, param=0, fisher=1, written=(), sums=True,
        ),
        ListOperation(
            "penalty_grad",
            lambda p, f: [noise(p), p, positive(p, f), state(p)],
            _check_penalty_grad, 1.7, param=1, fisher=2, written=(0,),
        ),
        ListOperation(
            "accumulate_square",
            lambda p, f: [positive(p, f), noise(p)],
            _check_accumulate_square, 0.3, param=1, fisher=0, written=(0,),
        ),
        ListOperation(
            "merge",
            lambda p, f: [positive(p, f), state(p), _residual(p), positive(p), p],
            _check_merge, 0.9, param=4, fisher=0, written=(0, 1, 2), sums=True,
        ),
        ListOperation(
            "merge_online",
            lambda p, f: [positive(p, f), state(p), positive(p), p],
            _check_merge_online, 0.8, param=3, fisher=0, written=(0, 1),
        ),
        ListOperation(
            "proximal_step",
            lambda p, f: [p, positive(p, f), state(p)],
            _check_proximal_step, 2.0, param=0, fisher=1, written=(0,),
        ),
    ]
}  # fmt: skip


def random_bits(seed: int, elements: np.ndarray) -> np.ndarray:
    """Restate csrc/math.h: 32 bits from the seed and the element's number."""
    numbers = elements.astype(np.uint64)
    bits = np.uint32(seed) ^ (numbers.astype(np.uint32) * np.uint32(0x9E3779B1))
    bits ^= (numbers >> np.uint64(32)).astype(np.uint32) * np.uint32(0x7FEB352D)
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return bits ^ bits >> np.uint32(16)


def rounded_by_chance(values: Tensor, seed: int, ordinal: int) -> Tensor:
    """Return float32 values in bfloat16, as a call with ``seed`` rounds row ``ordinal``."""
    row_seed = int(random_bits(seed, np.array([ordinal]))[0])
    bits = values.flatten().numpy().view(np.uint32).astype(np.uint64)
    chance = random_bits(row_seed, np.arange(values.numel())).astype(np.uint64) & np.uint64(0xFFFF)
    up = torch.from_numpy((bits + chance >> np.uint64(16)).astype(np.uint16).view(np.int16).copy())
    found = torch.where(
        values.flatten().isfinite(), up.view(torch.bfloat16), values.flatten().bfloat16()
    )
    return found.reshape(values.shape)
