r"""Squared per-sample gradients of parameters that enter no product: of a table's rows, of scales
and shifts. For the recorder: operands are its own and are not checked.

.. math::
    F_{vd} \mathrel{+}= \sum_n \Bigl(\sum_{t :\, i_{nt} = v} g_{ntd}\Bigr)^2, \qquad
    F_d \mathrel{+}= \sum_n \Bigl(\sum_t g_{ntd}\, x_{ntd}\Bigr)^2

``impl`` is ``"triton"``, ``"reference"`` (PyTorch), or ``"auto"``: Triton on CUDA where it is
installed, PyTorch elsewhere. Triton's results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ewc_fast import _triton, reference
from ewc_fast._dispatch import choose

Way = Literal["auto", "triton", "reference"]


@dataclass(frozen=True)
class Factor:
    """What gradients are multiplied by, (values - means) * scales.

    values: (N, T, D); means and scales: (N or 1, T, 1) or (N or 1, 1, D), or none.
    """

    values: Tensor
    means: Tensor | None = None
    scales: Tensor | None = None

    def computed(self) -> Tensor:
        """Return all of it, in memory."""
        if self.means is None:
            return self.values if self.scales is None else self.values * self.scales
        distance = self.values - self.means
        return distance if self.scales is None else distance.mul_(self.scales)


def add_squared_rows_(
    total: Tensor, indices: Tensor, values: Tensor, skipped_row: int, impl: Way = "auto"
) -> None:
    """Add to ``total`` (V, D) of gradients ``values`` (N, T, D) of the rows ``indices`` (N, T).

    Entries of ``skipped_row`` are passed over.
    """
    if _runs_triton(impl, "accumulate_squared_rows_", total):
        from ewc_fast._triton.squared_rows import accumulate_squared_rows_

        accumulate_squared_rows_(total, indices, values, skipped_row)
        torch.autograd.graph.increment_version([total])
    else:
        reference.accumulate_squared_rows_(total, indices, values, skipped_row=skipped_row)


def add_squared_sums_(
    total: Tensor,
    grads: Tensor,
    factor: Factor | None,
    bias_total: Tensor | None = None,
    impl: Way = "auto",
) -> None:
    """Add to ``total`` (D) of ``grads`` (N, T, D) times a factor; to ``bias_total`` without it."""
    if _runs_triton(impl, "accumulate_squared_sums_", total):
        from ewc_fast._triton.squared_sums import accumulate_squared_sums_

        if factor is None:
            accumulate_squared_sums_(None, total, grads, None)
        else:
            means, scales = factor.means, factor.scales
            accumulate_squared_sums_(total, bias_total, grads, factor.values, means, scales)
        torch.autograd.graph.increment_version([t for t in (total, bias_total) if t is not None])
    else:
        values = None if factor is None else factor.computed()
        reference.accumulate_squared_sums_(total, grads, values, bias_total=bias_total)


def _runs_triton(impl: Way, operation: str, total: Tensor) -> bool:
    why_not = None if impl == "reference" else _triton.unavailable(total.device.type)
    return choose(impl, operation, total.device.type, True, None, why_not) == "triton"
