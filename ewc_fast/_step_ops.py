"""The optimizers' steps as PyTorch operators, for ``torch.compile``; eager calls skip them.

Lists that a step lacks are empty. Learning rate and strength are scalar tensors, read and checked
when the operator runs, as in :mod:`ewc_fast._ops`; so is the seed where parameters are rounded by
chance, which the graph draws anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ewc_fast import _checks, _steps
from ewc_fast._checks import TensorList
from ewc_fast.reference_steps import AdamOptions, SgdOptions

_library = torch.library.Library("ewc_fast", "FRAGMENT")

# The lists in the order of _steps.OPERANDS, the Numbers, then the other options by name.
_SCHEMAS = {
    "adam_step_": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] fisher, Tensor[] anchor, "
    "Tensor(b!)[] master, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] path, Tensor(g!)[] steps, Tensor lr, "
    "Tensor ewc_lambda, Tensor? rounding_seed, *, float weight_decay, bool maximize, "
    "bool proximal, float beta1, float beta2, float eps, bool decoupled) -> Tensor",
    "sgd_step_": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] fisher, Tensor[] anchor, "
    "Tensor(b!)[] master, Tensor(c!)[] momentum_buffers, Tensor(d!)[] path, Tensor lr, "
    "Tensor ewc_lambda, Tensor? rounding_seed, *, float weight_decay, bool maximize, "
    "bool proximal, float momentum, float dampening, bool nesterov, bool first) -> Tensor",
}


class Numbers(NamedTuple):
    """What changes from step to step, and no graph may be made for: scalar tensors.

    All are on the CPU, but for a learning rate on a GPU, which is read there.
    """

    lr: Tensor
    ewc_lambda: Tensor
    rounding_seed: Tensor | None


def adam_step_(lists: Mapping[str, TensorList], options: AdamOptions, numbers: Numbers) -> Tensor:
    """Put a step of Adam into the graph; ``numbers`` count instead of the options'."""
    given, scalars = _arguments("adam_step_", lists, options, numbers)
    value: Tensor = torch.ops.ewc_fast.adam_step_(*given, **scalars)
    return value


def sgd_step_(lists: Mapping[str, TensorList], options: SgdOptions, numbers: Numbers) -> Tensor:
    """Put a step of SGD into the graph, as above."""
    given, scalars = _arguments("sgd_step_", lists, options, numbers)
    value: Tensor = torch.ops.ewc_fast.sgd_step_(*given, **scalars)
    return value


def _arguments(
    name: str,
    lists: Mapping[str, TensorList],
    options: AdamOptions | SgdOptions,
    numbers: Numbers,
) -> tuple[list[Any], dict[str, Any]]:
    """Return an operator's arguments, positional and by name."""
    ordered = [list(lists.get(operand.name, ())) for operand in _steps.OPERANDS[name]]
    fields = _STEPS[name][1]._fields
    scalars = {k: v for k, v in zip(fields, options, strict=True) if k not in Numbers._fields}
    return [*ordered, *numbers], scalars


def _operator(
    name: str,
    step: Callable[..., _steps.Step],
    kind: type[AdamOptions] | type[SgdOptions],
) -> Callable[..., Tensor]:
    """Return what an operator does when it runs: validate a step and take it."""
    names = [operand.name for operand in _steps.OPERANDS[name]]

    def run(*given: Any, **scalars: Any) -> Tensor:
        *lists, lr, ewc_lambda, drawn = given
        rate, rate_on_gpu = _checks.learning_rate(lr)
        numbers: dict[str, Any] = {
            "lr": rate,
            "ewc_lambda": _checks.strength(ewc_lambda, rate),
            "rounding_seed": None if drawn is None else int(drawn),
        }
        present = {n: tensors for n, tensors in zip(names, lists, strict=True) if tensors}
        return step(present, kind(**numbers, **scalars), lr=rate_on_gpu)()

    return run


def _fake(params: list[Tensor], *_: Any, **__: Any) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=params[0].device)


_STEPS: dict[str, Any] = {
    "adam_step_": (_steps.adam_step, AdamOptions),
    "sgd_step_": (_steps.sgd_step, SgdOptions),
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=[torch.Tag.pt2_compliant_tag])
    _run = _operator(_name, *_STEPS[_name])
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ewc_fast::{_name}", _fake, lib=_library)
