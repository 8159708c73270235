"""Springs with an 8-bit Fisher, applied by kernels that decode while they load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast._checks import Operand, Operation
from ewc_fast._dispatch import Impl
from ewc_fast._engine import add_values, run_natively
from ewc_fast._native import core
from ewc_fast._piecewise import PiecewiseSprings
from ewc_fast._plan import ADD_PENALTY_GRAD, PENALTY, PENALTY_GRAD, PROXIMAL_STEP, Plan
from ewc_fast._springs import ActiveSprings, Spring
from ewc_fast.offload import OffloadedSprings


def in_8_bits(operation: Operation) -> Operation:
    """Return an operation that reads the Fisher's codes, and their scales behind all else."""
    operands = [
        replace(operand, role="codes") if operand.role == "fisher" else operand
        for operand in operation.operands
    ]
    return replace(operation, operands=(*operands, Operand("scales", "scales")))


_ADD_PENALTY_GRAD = in_8_bits(ADD_PENALTY_GRAD)
_PENALTY = in_8_bits(PENALTY)
_PENALTY_GRAD = in_8_bits(PENALTY_GRAD)
_PROXIMAL_STEP = in_8_bits(PROXIMAL_STEP)


def active_springs(
    params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl, *, on_cpu: bool
) -> ActiveSprings:
    """Return what applies springs in this format and place."""
    if on_cpu:
        return OffloadedSprings(params, springs, impl)
    if all(spring.scales is None for spring in springs):
        return ActiveSprings(params, springs, impl)
    chosen = PiecewiseSprings if impl == "reference" else EncodedSprings
    return chosen(params, springs, impl)


class EncodedSprings(PiecewiseSprings):
    """Springs with an 8-bit Fisher: bit by bit what a float32 Fisher of the same values gives.

    A step's gradient moves 17.02 bytes a float32 parameter instead of 20. What kernels can't walk
    (parameters of other strides than their springs', devices without kernels) goes through pieces
    that are decoded; so do springs beside float64 parameters, whose Fisher stays in float64.
    """

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        super().__init__(params, springs, impl)
        self._rows = [row for row, spring in enumerate(springs) if spring.scales is not None]
        self._others = [row for row, spring in enumerate(springs) if spring.scales is None]
        # These tensors stay: merging and loading write into them, or replace the springs and with
        # them this object.
        kept = [springs[row] for row in self._rows]
        scales = [spring.scales for spring in kept if spring.scales is not None]
        self._kept = [s.fisher for s in kept], [s.anchor for s in kept], scales
        self._kernel_plans: dict[str, Plan] = {}

    def proximal_step_(self, ewc_lambda: float | Tensor, lr: float | Tensor) -> None:
        """Pull every parameter towards its anchor by the proximal step."""
        moving = self._moving()
        assert isinstance(moving, EncodedSprings)
        moving._run(
            _PROXIMAL_STEP,
            core.proximal_step,
            _checks.non_negative("ewc_lambda * lr", float(ewc_lambda) * float(lr)),
            [moving._params],
            lambda part, lists: part.proximal_step_(ewc_lambda, lr),
        )

    @torch.no_grad()
    def value(self, params: Sequence[Tensor], ewc_lambda: float) -> Tensor:
        """Return the penalty alone."""
        values = self._run(
            _PENALTY,
            core.penalty,
            ewc_lambda,
            [list(params)],
            lambda part, lists: part.value(lists[0], ewc_lambda),
        )
        return add_values(values, self._params)

    @torch.no_grad()
    def pulls(self, params: Sequence[Tensor], ewc_lambda: float) -> list[Tensor]:
        """Return the penalty's gradient."""
        out = [torch.empty_like(param) for param in params]

        def in_pieces(part: PiecewiseSprings, lists: list[list[Tensor]]) -> None:
            torch._foreach_copy_(lists[0], part.pulls(lists[1], ewc_lambda))

        self._run(_PENALTY_GRAD, core.penalty_grad, ewc_lambda, [out, list(params)], in_pieces)
        return out

    def _add_to(
        self, grads: list[Tensor], ewc_lambda: float | Tensor, constant: float | Tensor
    ) -> Tensor:
        values = self._run(
            _ADD_PENALTY_GRAD,
            core.add_penalty_grad,
            float(ewc_lambda),
            [grads, self._params],
            lambda part, lists: part._add_to(lists[0], ewc_lambda, 0.0),
        )
        return add_values([constant, *values], self._params)

    def _run(
        self,
        operation: Operation,
        native: Callable[..., float | None],
        coefficient: float,
        lists: list[list[Tensor]],
        in_pieces: Callable[[PiecewiseSprings, list[list[Tensor]]], Tensor | None],
    ) -> list[float | Tensor]:
        """Run an operation by its kernels, and ``in_pieces`` where there are none.

        ``lists`` are the operands before the Fisher. Return the values, where it has any.
        """
        left = list(self._others)
        values: list[Any] = []
        own = _picked(lists, self._rows) if left else lists
        plan = self._kernel_plans.setdefault(
            operation.name, Plan(pinned=("fisher", "anchor", "scales"))
        )
        for group in plan.groups(operation, (*own, *self._kept), self._impl):
            if group.impl == "reference":
                left += [self._rows[place] for place in group.ordinals]
            else:
                values.append(run_natively(operation, native, group, coefficient))
        if left:
            (params,) = _picked([self._params], left)
            part = PiecewiseSprings(params, [self._springs[row] for row in left], self._impl)
            values.append(in_pieces(part, _picked(lists, left)))
        return [value for value in values if value is not None]


def _picked(lists: list[list[Tensor]], rows: list[int]) -> list[list[Tensor]]:
    return [[tensors[row] for row in rows] for tensors in lists]
