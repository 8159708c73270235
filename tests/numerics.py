"""Error budgets: what rounding must cost at a dtype, and the assertion that nothing costs more.

``u`` is the unit roundoff: the largest relative error of one rounding to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def u(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a dtype."""
    return torch.finfo(dtype).eps / 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on parameters of ``dtype`` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest(dtype: torch.dtype) -> float:
    """Return the spacing of denormals: the error of a result that underflows."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def assert_within(actual: Tensor, exact: Tensor, budget: Tensor | float, what: str) -> None:
    """Assert ``|actual - exact| <= budget`` for every element; say which one is worst."""
    error = (actual.double() - exact.double()).abs()
    allowed = torch.as_tensor(budget, dtype=torch.float64).expand_as(error)
    bad = ~(error <= allowed)  # also true for NaN
    if bad.any():
        worst = int((error / allowed.clamp_min(1e-300)).flatten().argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements over budget; at {worst}: "
            f"got {actual.flatten()[worst].item()!r}, exact {exact.flatten()[worst].item()!r}, "
            f"allowed error {allowed.flatten()[worst].item():.3g}"
        )


def gradient_budget(grad: Tensor, pull: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error allowed for grad + pull, pull = lambda F (theta - a), from exact inputs.

    The pull takes lambda's own rounding and three operations, the sum one, the store one; first
    order, doubled for products of errors.
    """
    compute, pull, total = u(compute_dtype(dtype)), pull.abs(), (grad + pull).abs()
    return 2 * (4 * compute * pull + (compute + u(dtype)) * total) + smallest(dtype)


def value_budget(value: float, dtype: torch.dtype) -> float:
    """Return the error allowed for a penalty: terms are positive, so errors stay relative.

    A lane adds 256 terms of five roundings each before it is flushed to float64.
    """
    return (256 + 5) * u(compute_dtype(dtype)) * abs(value)
