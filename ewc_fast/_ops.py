"""The operations as PyTorch operators: schemas, fake kernels and autograd in one place.

``torch.compile`` and ``torch.library.opcheck`` see these; eager calls skip the dispatcher, which
costs more than the kernels on small tensors.

Strengths and learning rates are scalar tensors here, on the CPU: a graph is made for their place,
not for their value, so that a schedule of lambda recompiles nothing. They are read, and checked,
when the operator runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc_fast import _checks, _engine, reference
from ewc_fast._checks import TensorList

_library = torch.library.Library("ewc_fast", "DEF")

_SCHEMAS = {
    "penalty": "(Tensor[] params, Tensor[] fisher, Tensor[] anchor, Tensor ewc_lambda) -> Tensor",
    "add_penalty_grad_": "(Tensor(a!)[] grads, Tensor[] params, Tensor[] fisher, Tensor[] anchor, "
    "Tensor ewc_lambda) -> Tensor",
    "accumulate_square_": "(Tensor(a!)[] fisher, Tensor[] grads, float weight, "
    "SymInt? seed=None) -> ()",
    "merge_": "(Tensor(a!)[] fisher, Tensor(b!)[] anchor, Tensor(c!)[] residual, "
    "Tensor[] new_fisher, Tensor[] params, float gamma, SymInt? seed=None) -> Tensor",
    "merge_online_": "(Tensor(a!)[] fisher, Tensor(b!)[] anchor, Tensor[] new_fisher, "
    "Tensor[] params, float gamma, SymInt? seed=None) -> ()",
    "proximal_step_": "(Tensor(a!)[] params, Tensor[] fisher, Tensor[] anchor, "
    "Tensor ewc_lambda, Tensor lr) -> ()",
}
_NUMBERS = {  # the scalar tensors, which stand last
    "penalty": ("ewc_lambda",),
    "add_penalty_grad_": ("ewc_lambda",),
    "proximal_step_": ("ewc_lambda", "lr"),
}


def _with_numbers(name: str) -> Callable[..., Any]:
    """Return the engine's function, which takes floats, behind an operator that takes tensors."""
    function: Callable[..., Any] = getattr(_engine, name)
    names = _NUMBERS.get(name)
    if names is None:
        return function

    def run(*operands: Any) -> Any:
        lists, scalars = operands[: -len(names)], operands[-len(names) :]
        return function(*lists, *map(_checks.non_negative, names, scalars))

    return run


for _name, _schema in _SCHEMAS.items():
    _tags = [torch.Tag.pt2_compliant_tag]
    if "seed" in _schema:  # drawn when the operator runs, as in an eager call
        _tags.append(torch.Tag.nondeterministic_seeded)
    _library.define(_name + _schema, tags=_tags)
    _library.impl(_name, _with_numbers(_name), "CompositeExplicitAutograd")


def _fake_value(*lists_and_scalars: Any) -> Tensor:
    first: Sequence[Tensor] = lists_and_scalars[0]
    return torch.empty((), dtype=torch.float64, device=first[0].device if first else None)


def _fake_nothing(*_: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "penalty": _fake_value,
    "add_penalty_grad_": _fake_value,
    "accumulate_square_": _fake_nothing,
    "merge_": _fake_value,
    "merge_online_": _fake_nothing,
    "proximal_step_": _fake_nothing,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"ewc_fast::{_name}", _fake, lib=_library)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, fisher, anchor, ewc_lambda = inputs
    ctx.save_for_backward(*params, *fisher, *anchor, ewc_lambda)


def _thirds(saved: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return parameters, Fisher and anchor, which were saved one after the other."""
    tensors, count = list(saved), len(saved) // 3
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count :]


def _pulls(grad: Tensor, saved: Sequence[Tensor], ewc_lambda: float | Tensor) -> list[Tensor]:
    """Return the gradient of the penalty, times the one from above.

    In plain PyTorch, which can be differentiated again, transformed, and fused by a compiler.
    """
    params, fisher, anchor = _thirds(saved)
    pulls = reference.penalty_grad(params, fisher, anchor, ewc_lambda=ewc_lambda)
    return [(pull * grad).to(p.dtype) for pull, p in zip(pulls, params, strict=True)]


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, ewc_lambda = ctx.saved_tensors
    grads = _pulls(grad, saved, ewc_lambda)
    no_grads: list[None] = [None] * len(grads)
    return grads, no_grads, no_grads, None


torch.library.register_autograd(
    "ewc_fast::penalty", _penalty_backward, setup_context=_save_operands, lib=_library
)


class EagerPenalty(torch.autograd.Function):
    """The operator ``penalty`` without the dispatcher, whose list handling takes milliseconds."""

    @staticmethod
    def forward(
        fisher: TensorList, anchor: TensorList, ewc_lambda: float, *params: Tensor
    ) -> Tensor:
        """Return the penalty of ``params``."""
        return _engine.penalty(params, fisher, anchor, ewc_lambda)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the operands for the backward pass."""
        fisher, anchor, ctx.ewc_lambda, *params = inputs
        ctx.save_for_backward(*params, *fisher, *anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Return the penalty's gradient: in one pass, unless it must be differentiable itself."""
        (grad,) = grads
        if torch.is_grad_enabled() or grad.device.type != "cpu":
            pulls = _pulls(grad, ctx.saved_tensors, ctx.ewc_lambda)
        else:
            factor = ctx.ewc_lambda * grad.item()
            pulls = _engine.penalty_grad(*_thirds(ctx.saved_tensors), factor)
        return None, None, None, *pulls
