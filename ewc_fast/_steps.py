"""Runs the optimizers' fused steps: each group of rows by the implementation chosen for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ewc_fast import _steps_gpu, reference_steps
from ewc_fast._checks import Operand, Operation, TensorList
from ewc_fast._dispatch import Impl
from ewc_fast._engine import add_values, mark_written
from ewc_fast._native import core
from ewc_fast._plan import Group, Plan
from ewc_fast.reference_steps import AdamOptions, SgdOptions

# In the order of StepOperand in csrc/optimizer.h, which says where kernels look for each.
_SHARED = (
    Operand("params", "param", written=True),
    Operand("grads", "param"),
    Operand("fisher", "fisher"),
    Operand("anchor", "state"),
    Operand("master", "state", written=True),
)
_PATH = Operand("path", "state", written=True, slot=8)
_OPERANDS = {
    "adam_step_": (
        *_SHARED,
        Operand("exp_avgs", "moment", written=True),
        Operand("exp_avg_sqs", "moment", written=True),
        Operand("max_exp_avg_sqs", "moment", written=True),
        _PATH,
        Operand("steps", "count", written=True),
    ),
    "sgd_step_": (*_SHARED, Operand("momentum_buffers", "moment", written=True), _PATH),
}


@functools.cache
def operation(name: str, present: tuple[str, ...]) -> Operation:
    """Return the operation with the operands that are present; the same object each time."""
    operands = (
        Operand(o.name, o.role, o.written, slot=slot if o.slot is None else o.slot)
        for slot, o in enumerate(_OPERANDS[name])
        if o.name in present
    )
    return Operation(name, tuple(operands), measure=0, sums="fisher" in present)


def adam_step_(
    lists: Mapping[str, TensorList],
    options: AdamOptions,
    impl: Impl = "auto",
    plan: Plan | None = None,
    lr: Tensor | None = None,
) -> Tensor:
    """See :func:`ewc_fast.functional.adam_step_`; ``lists`` holds the operands that are there.

    ``lr`` is a scalar on a device that counts instead of the options', read when kernels run.
    """

    def on_cpu(core_plan: Any) -> float:
        now = core.AdamOptions(*_with_rate(options, lr))
        return core.adam_step(core_plan, now, torch.get_num_threads())

    def reference(**operands: Any) -> Tensor:
        return reference_steps.adam_step_(_with_rate(options, lr), **operands)

    on_gpu = functools.partial(_on_gpu, options, lr)
    return _run(operation("adam_step_", tuple(lists)), lists, on_cpu, on_gpu, reference, impl, plan)


def sgd_step_(
    lists: Mapping[str, TensorList],
    options: SgdOptions,
    impl: Impl = "auto",
    plan: Plan | None = None,
    lr: Tensor | None = None,
) -> Tensor:
    """See :func:`ewc_fast.functional.sgd_step_`, and above."""

    def on_cpu(core_plan: Any) -> float:
        now = core.SgdOptions(*_with_rate(options, lr))
        return core.sgd_step(core_plan, now, torch.get_num_threads())

    def reference(**operands: Any) -> Tensor:
        return reference_steps.sgd_step_(_with_rate(options, lr), **operands)

    on_gpu = functools.partial(_on_gpu, options, lr)
    return _run(operation("sgd_step_", tuple(lists)), lists, on_cpu, on_gpu, reference, impl, plan)


OptionsOf = TypeVar("OptionsOf", AdamOptions, SgdOptions)


def _with_rate(options: OptionsOf, lr: Tensor | None) -> OptionsOf:
    """Return options with the learning rate as a number, for which this waits."""
    return options if lr is None else options._replace(lr=lr.item())


def _on_gpu(
    options: AdamOptions | SgdOptions, lr: Tensor | None, operation: Operation, group: Group
) -> Tensor | None:
    there = None if lr is None else _steps_gpu.on_one_device(lr, group)
    return _steps_gpu.run(operation, group, options, there)


def _run(
    operation: Operation,
    lists: Mapping[str, TensorList],
    on_cpu: Callable[[Any], float],
    on_gpu: Callable[[Operation, Group], Tensor | None],
    in_pytorch: Callable[..., Tensor],
    impl: Impl,
    plan: Plan | None,
) -> Tensor:
    """Run a step over all groups of rows; return the penalty before it."""
    names = [operand.name for operand in operation.operands]
    values: list[float | Tensor] = []
    for group in (plan or Plan()).groups(operation, [lists[name] for name in names], impl):
        if group.impl == "cpu":
            values.append(on_cpu(group.core_plan))
            mark_written(operation, group.lists)
        elif group.impl != "reference":
            value = on_gpu(operation, group)
            values += [] if value is None else [value]
            mark_written(operation, group.lists)
        else:
            values.append(_run_in_pytorch(names, group, in_pytorch))
    return add_values(values, lists["params"])


def _run_in_pytorch(names: list[str], group: Group, in_pytorch: Callable[..., Tensor]) -> Tensor:
    named = dict(zip(names, group.lists, strict=True))
    return in_pytorch(**named, ordinals=group.ordinals)
