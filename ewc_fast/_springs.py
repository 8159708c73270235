"""The springs that hold parameters near their anchor: per-parameter state and its use each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc_fast import functional
from ewc_fast._checks import state_dtype
from ewc_fast._dispatch import Impl
from ewc_fast._native import gradients_of


@dataclass
class Spring:
    """Stiffness and rest position of one parameter; all three have its shape and strides."""

    fisher: Tensor
    anchor: Tensor
    residual: Tensor  # bfloat16: what anchor's dtype rounds away

    @classmethod
    def slack(cls, param: Tensor) -> Spring:
        """Return a spring without stiffness, at rest where the parameter is."""
        like = param.detach()
        dtype = state_dtype(param.dtype)
        return cls(
            fisher=torch.zeros_like(like, dtype=dtype),
            anchor=like.to(dtype=dtype, copy=True),
            residual=torch.zeros_like(like, dtype=torch.bfloat16),
        )

    def grown(self, param: Tensor) -> Spring:
        """Return a spring for a parameter that gained rows, slack on the new ones."""
        spring, rows = Spring.slack(param), self.fisher.shape[0]
        spring.fisher[:rows] = self.fisher
        spring.anchor[:rows] = self.anchor
        spring.residual[:rows] = self.residual
        return spring

    def to(self, device: torch.device | str) -> Spring:
        """Return the spring on another device."""
        return Spring(self.fisher.to(device), self.anchor.to(device), self.residual.to(device))


class ActiveSprings:
    """A fixed set of parameters with their springs, ready to be applied again and again.

    A frozen parameter (``requires_grad=False``) is a constant: it adds to neither value nor
    gradient.
    """

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        self._params = list(params)
        self._springs = list(springs)
        self._fisher = [spring.fisher for spring in springs]
        self._anchor = [spring.anchor for spring in springs]
        self._impl = impl
        # The springs' tensors are ours alone (users get views), so only the rest is compared.
        self._gradient_plan = functional.Plan(pinned=("fisher", "anchor"))
        self._proximal_plan = functional.Plan(pinned=("fisher", "anchor"))
        self._moving_part: tuple[list[bool], ActiveSprings] | None = None

    @property
    def operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters, their Fisher and their anchor, for steps that have the springs inside."""
        return self._params, self._fisher, self._anchor

    def penalty(self, ewc_lambda: float) -> Tensor:
        """Return the penalty as a differentiable float64 scalar."""
        moving = self._moving()
        return functional.penalty(
            moving._params, moving._fisher, moving._anchor, ewc_lambda=ewc_lambda
        )

    def add_penalty_grad_(self, ewc_lambda: float, constant: float) -> Tensor:
        """Add the penalty's gradient to every ``.grad``, made where missing.

        Return the penalty plus ``constant``.
        """
        grads = gradients_of(self._params)
        if grads is None:
            moving = self._moving()  # a frozen parameter may still have an old gradient
            for param in moving._params:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            return moving.add_penalty_grad_(ewc_lambda, constant)
        return functional.add_penalty_grad_(
            grads,
            self._params,
            self._fisher,
            self._anchor,
            ewc_lambda=ewc_lambda,
            constant=constant,
            impl=self._impl,
            plan=self._gradient_plan,
        )

    def proximal_step_(self, ewc_lambda: float, lr: float) -> None:
        """Pull every parameter towards its anchor by the proximal step."""
        moving = self._moving()
        functional.proximal_step_(
            moving._params,
            moving._fisher,
            moving._anchor,
            ewc_lambda=ewc_lambda,
            lr=lr,
            impl=self._impl,
            plan=moving._proximal_plan,
        )

    def _moving(self) -> ActiveSprings:
        """Return the part whose parameters are not frozen now."""
        mask = [param.requires_grad for param in self._params]
        if all(mask):
            return self
        if self._moving_part is None or self._moving_part[0] != mask:
            part = ActiveSprings(
                [param for param, moves in zip(self._params, mask, strict=True) if moves],
                [spring for spring, moves in zip(self._springs, mask, strict=True) if moves],
                self._impl,
            )
            self._moving_part = mask, part
        return self._moving_part[1]
