"""Runs the operations: each group of rows by the implementation chosen for it.

Eager calls and the registered PyTorch operators both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc_fast import reference
from ewc_fast._checks import Operation, TensorList
from ewc_fast._dispatch import CUDA_OPERATIONS, Impl
from ewc_fast._native import core
from ewc_fast._plan import (
    ACCUMULATE_SQUARE,
    ADD_PENALTY_GRAD,
    MERGE,
    MERGE_ONLINE,
    PENALTY,
    PENALTY_GRAD,
    PROXIMAL_STEP,
    Group,
    Plan,
)


def _mark_written(operation: Operation, lists: Sequence[TensorList]) -> None:
    """Tell autograd, which did not see the write."""
    for operand, tensors in zip(operation.operands, lists, strict=True):
        if operand.written:
            torch.autograd.graph.increment_version(tensors)


def run(
    operation: Operation,
    lists: Sequence[TensorList],
    coefficient: float,
    *,
    native: Callable[[Any, float, int], float | None],
    in_pytorch: Callable[..., Tensor | None],
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> list[float | Tensor]:
    """Run one operation over all groups; return each group's value, where it has one."""
    groups = (plan or Plan()).groups(operation, lists, impl)
    values: list[float | Tensor] = []
    for group in groups:
        if group.impl == "cpu":
            value: float | Tensor | None = native(
                group.core_plan, coefficient, torch.get_num_threads()
            )
            _mark_written(operation, group.lists)
        elif group.impl == "cuda":
            value = _run_cuda(operation, group, coefficient)
            _mark_written(operation, group.lists)
        elif group.impl == "triton":
            value = _run_triton(operation, group, coefficient)
            _mark_written(operation, group.lists)
        else:
            value = in_pytorch(*group.lists)
        if value is not None:
            values.append(value)
    return values


def _run_cuda(operation: Operation, group: Group, coefficient: float) -> Tensor:
    if operation.name not in CUDA_OPERATIONS:
        raise RuntimeError(f"no CUDA kernel for {operation.name}")
    device = group.lists[0][0].device
    value = torch.empty((), dtype=torch.float64, device=device)
    workspace = torch.empty(
        core.cuda_workspace(group.core_plan), dtype=torch.float64, device=device
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    core.cuda_add_penalty_grad(
        group.core_plan, coefficient, value.data_ptr(), workspace.data_ptr(), stream
    )
    return value


def _run_triton(operation: Operation, group: Group, coefficient: float) -> Tensor | None:
    from ewc_fast._triton import launch  # loads Triton

    assert group.table is not None
    return launch.run(operation.name, group.table, coefficient)


def _scalar(values: list[float | Tensor], params: TensorList) -> Tensor:
    """Add values into a float64 scalar on the first parameter's device."""
    device = params[0].device if params else None
    total: float | Tensor = 0.0
    for value in values:
        total = total + (value.to(device) if isinstance(value, Tensor) else value)
    if isinstance(total, Tensor):
        return total
    return torch.scalar_tensor(total, dtype=torch.float64, device=device)


def penalty(
    params: TensorList,
    fisher: TensorList,
    anchor: TensorList,
    ewc_lambda: float,
    impl: Impl = "auto",
) -> Tensor:
    """See :func:`ewc_fast.functional.penalty`."""
    in_pytorch = torch.no_grad()(partial(reference.penalty, ewc_lambda=ewc_lambda))
    values = run(
        PENALTY,
        (params, fisher, anchor),
        ewc_lambda,
        native=core.penalty,
        in_pytorch=in_pytorch,
        impl=impl,
    )
    return _scalar(values, params)


def penalty_grad(
    params: TensorList,
    fisher: TensorList,
    anchor: TensorList,
    ewc_lambda: float,
    impl: Impl = "auto",
) -> list[Tensor]:
    """Return the penalty's gradient in the parameters' dtype."""
    out = [torch.empty_like(p) for p in params]

    def in_pytorch(out: TensorList, *others: TensorList) -> None:
        for o, g in zip(out, reference.penalty_grad(*others, ewc_lambda=ewc_lambda), strict=True):
            o.copy_(g)

    run(
        PENALTY_GRAD,
        (out, params, fisher, anchor),
        ewc_lambda,
        native=core.penalty_grad,
        in_pytorch=torch.no_grad()(in_pytorch),
        impl=impl,
    )
    return out


def add_penalty_grad_(
    grads: TensorList,
    params: TensorList,
    fisher: TensorList,
    anchor: TensorList,
    ewc_lambda: float,
    constant: float = 0.0,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Tensor:
    """See :func:`ewc_fast.functional.add_penalty_grad_`."""
    values = run(
        ADD_PENALTY_GRAD,
        (grads, params, fisher, anchor),
        ewc_lambda,
        native=core.add_penalty_grad,
        in_pytorch=partial(reference.add_penalty_grad_, ewc_lambda=ewc_lambda),
        impl=impl,
        plan=plan,
    )
    return _scalar([constant, *values], params)


def accumulate_square_(
    fisher: TensorList,
    grads: TensorList,
    weight: float,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> None:
    """See :func:`ewc_fast.functional.accumulate_square_`."""
    run(
        ACCUMULATE_SQUARE,
        (fisher, grads),
        weight,
        native=core.accumulate_square,
        in_pytorch=partial(reference.accumulate_square_, weight=weight),
        impl=impl,
        plan=plan,
    )


def merge_(
    fisher: TensorList,
    anchor: TensorList,
    residual: TensorList,
    new_fisher: TensorList,
    params: TensorList,
    gamma: float,
    impl: Impl = "auto",
) -> Tensor:
    """See :func:`ewc_fast.functional.merge_`."""
    values = run(
        MERGE,
        (fisher, anchor, residual, new_fisher, params),
        gamma,
        native=core.merge,
        in_pytorch=partial(reference.merge_, gamma=gamma),
        impl=impl,
    )
    return _scalar(values, params)


def merge_online_(
    fisher: TensorList,
    anchor: TensorList,
    new_fisher: TensorList,
    params: TensorList,
    gamma: float,
    impl: Impl = "auto",
) -> None:
    """See :func:`ewc_fast.functional.merge_online_`."""
    run(
        MERGE_ONLINE,
        (fisher, anchor, new_fisher, params),
        gamma,
        native=core.merge_online,
        in_pytorch=partial(reference.merge_online_, gamma=gamma),
        impl=impl,
    )


def proximal_step_(
    params: TensorList,
    fisher: TensorList,
    anchor: TensorList,
    ewc_lambda: float,
    lr: float,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> None:
    """See :func:`ewc_fast.functional.proximal_step_`."""
    run(
        PROXIMAL_STEP,
        (params, fisher, anchor),
        ewc_lambda * lr,
        native=core.proximal_step,
        in_pytorch=partial(reference.proximal_step_, ewc_lambda=ewc_lambda, lr=lr),
        impl=impl,
        plan=plan,
    )
