"""Runs the optimizers' fused steps: each group of rows by the implementation chosen for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ewc_fast import _steps_gpu, reference_steps
from ewc_fast._checks import Operand, Operation, TensorList
from ewc_fast._dispatch import Impl
from ewc_fast._engine import add_values, mark_written
from ewc_fast._native import core
from ewc_fast._plan import Group, Plan
from ewc_fast.reference_steps import AdamOptions, SgdOptions

Step = Callable[[], Tensor]  # validated; takes the step and returns the penalty before it

# In the order of StepOperand in csrc/optimizer.h, which says where kernels look for each.
_SHARED = (
    Operand("params", "param", written=True),
    Operand("grads", "param"),
    Operand("fisher", "fisher"),
    Operand("anchor", "state"),
    Operand("master", "state", written=True),
)
_PATH = Operand("path", "state", written=True, slot=8)
OPERANDS = {
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
        for slot, o in enumerate(OPERANDS[name])
        if o.name in present
    )
    return Operation(name, tuple(operands), measure=0, sums="fisher" in present)


def adam_step(
    lists: Mapping[str, TensorList],
    options: AdamOptions,
    impl: Impl = "auto",
    plan: Plan | None = None,
    lr: Tensor | None = None,
) -> Step:
    """Validate a step of Adam, and return it to be taken.

    See :func:`ewc_fast.functional.adam_step_`; ``lists`` holds the operands that are there. ``lr``
    is a scalar on a device that counts instead of the options', read when kernels run.
    """

    def on_cpu(core_plan: Any) -> float:
        now = core.AdamOptions(*_with_rate(options, lr))
        return core.adam_step(core_plan, now, torch.get_num_threads())

    def reference(**operands: Any) -> Tensor:
        return reference_steps.adam_step_(_with_rate(options, lr), **operands)

    runners = _Runners(on_cpu, functools.partial(_on_gpu, options, lr), reference)
    return _validated(operation("adam_step_", tuple(lists)), lists, runners, impl, plan)


def sgd_step(
    lists: Mapping[str, TensorList],
    options: SgdOptions,
    impl: Impl = "auto",
    plan: Plan | None = None,
    lr: Tensor | None = None,
) -> Step:
    """Validate a step of SGD: see :func:`ewc_fast.functional.sgd_step_`, and above."""

    def on_cpu(core_plan: Any) -> float:
        now = core.SgdOptions(*_with_rate(options, lr))
        return core.sgd_step(core_plan, now, torch.get_num_threads())

    def reference(**operands: Any) -> Tensor:
        return reference_steps.sgd_step_(_with_rate(options, lr), **operands)

    runners = _Runners(on_cpu, functools.partial(_on_gpu, options, lr), reference)
    return _validated(operation("sgd_step_", tuple(lists)), lists, runners, impl, plan)


OptionsOf = TypeVar("OptionsOf", AdamOptions, SgdOptions)


def _with_rate(options: OptionsOf, lr: Tensor | None) -> OptionsOf:
    """Return options with the learning rate as a number, for which this waits."""
    return options if lr is None else options._replace(lr=lr.item())


def _on_gpu(
    options: AdamOptions | SgdOptions, lr: Tensor | None, operation: Operation, group: Group
) -> Tensor | None:
    there = None if lr is None else _steps_gpu.on_one_device(lr, group)
    return _steps_gpu.run(operation, group, options, there)


class _Runners(NamedTuple):
    """One step by each implementation."""

    cpu: Callable[[Any], float]
    gpu: Callable[[Operation, Group], Tensor | None]
    pytorch: Callable[..., Tensor]


def _validated(
    operation: Operation,
    lists: Mapping[str, TensorList],
    runners: _Runners,
    impl: Impl,
    plan: Plan | None,
) -> Step:
    """Validate a step's rows and group them; return the step."""
    ordered = [lists[operand.name] for operand in operation.operands]
    groups = (plan or Plan()).groups(operation, ordered, impl)
    return functools.partial(_run, operation, groups, runners, lists["params"])


def _run(
    operation: Operation, groups: Sequence[Group], runners: _Runners, params: TensorList
) -> Tensor:
    """Run a step over all groups of rows; return the penalty before it."""
    values: list[float | Tensor] = []
    for group in groups:
        if group.impl == "cpu":
            values.append(runners.cpu(group.core_plan))
            mark_written(operation, group.lists)
        elif group.impl != "reference":
            value = runners.gpu(operation, group)
            values += [] if value is None else [value]
            mark_written(operation, group.lists)
        else:
            values.append(_run_in_pytorch(operation, group, runners.pytorch))
    return add_values(values, params)


def _run_in_pytorch(
    operation: Operation, group: Group, in_pytorch: Callable[..., Tensor]
) -> Tensor:
    names = [operand.name for operand in operation.operands]
    named = dict(zip(names, group.lists, strict=True))
    return in_pytorch(**named, ordinals=group.ordinals)
