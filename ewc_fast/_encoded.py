"""Springs with an 8-bit Fisher on CPUs, applied by a kernel that decodes while it loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewc_fast._checks import Operand, Operation
from ewc_fast._dispatch import Impl
from ewc_fast._native import core
from ewc_fast._piecewise import PiecewiseSprings
from ewc_fast._plan import Plan
from ewc_fast._springs import ActiveSprings, Spring
from ewc_fast.offload import OffloadedSprings

_ADD_PENALTY_GRAD = Operation(
    "add_penalty_grad_",
    (
        Operand("grads", "param", written=True),
        Operand("params", "param"),
        Operand("anchor", "state"),
    ),
    measure=1,
    sums=True,
)


def active_springs(
    params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl, *, on_cpu: bool
) -> ActiveSprings:
    """Return what applies springs in this format and place."""
    encoded = [spring.scales is not None for spring in springs]
    if on_cpu:
        return OffloadedSprings(params, springs, impl)
    if not any(encoded):
        return ActiveSprings(params, springs, impl)
    natively = all(encoded) and all(param.device.type == "cpu" for param in params)
    chosen = EncodedSprings if natively and impl in ("auto", "cpu") else PiecewiseSprings
    return chosen(params, springs, impl)


class EncodedSprings(PiecewiseSprings):
    """Springs on the CPU, all with an 8-bit Fisher.

    The penalty's gradient goes to dense parameters at 17 bytes each. All else, and parameters of
    other strides than their springs', goes through pieces that are decoded.
    """

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        super().__init__(params, springs, impl)
        self._encoded_plan = Plan(pinned=("anchor",))
        # The addresses stay good: merging and loading write into these tensors, or replace the
        # springs and with them this object.
        self._addresses = [_addresses(spring) for spring in springs]

    def _add_to(
        self, grads: list[Tensor], ewc_lambda: float | Tensor, constant: float | Tensor
    ) -> Tensor:
        total, ewc_lambda = float(constant), float(ewc_lambda)
        operands = grads, self._params, self._anchor
        for group in self._encoded_plan.groups(_ADD_PENALTY_GRAD, operands, self._impl):
            if group.impl == "cpu":
                fisher = [self._addresses[row] for row in group.ordinals]
                threads = torch.get_num_threads()
                total += core.add_penalty_grad_e5m3(group.core_plan, fisher, ewc_lambda, threads)
                torch.autograd.graph.increment_version(group.lists[0])
            else:
                springs = [self._springs[row] for row in group.ordinals]
                rest = PiecewiseSprings(group.lists[1], springs, self._impl)
                total += rest._add_to(list(group.lists[0]), ewc_lambda, 0.0).item()
        return torch.tensor(total, dtype=torch.float64, device="cpu")


def _addresses(spring: Spring) -> tuple[int, int, int]:
    assert spring.scales is not None
    return spring.fisher.data_ptr(), spring.scales.data_ptr(), spring.fisher.numel()
