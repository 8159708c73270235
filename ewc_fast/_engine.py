"""Runs the operations: each group of rows by the implementation chosen for it.

Eager calls and the registered PyTorch operators both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc_fast import _checks, reference
from ewc_fast._checks import Operation, TensorList
from ewc_fast._dispatch import Impl
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


def mark_written(operation: Operation, lists: Sequence[TensorList]) -> None:
    """Tell autograd, which did not see the write."""
    for operand, tensors in zip(operation.operands, lists, strict=True):
        if operand.written:
            torch.autograd.graph.increment_version(tensors)


def run(
    operation: Operation,
    lists: Sequence[TensorList],
    coefficient: float,
    *,
    native: Callable[..., float | None],
    in_pytorch: Callable[..., Tensor | None],
    impl: Impl = "auto",
    plan: Plan | None = None,
    seed: int | None = None,
) -> list[float | Tensor]:
    """Run one operation over all groups; return each group's value, where it has one.

    ``seed`` is of operations that write a Fisher, and used where that is bfloat16.
    """
    groups = (plan or Plan()).groups(operation, lists, impl)
    rounding: dict[str, int] = {}
    if operation.rounds:
        rounding["seed"] = _resolved_seed(groups, seed)
    values: list[float | Tensor] = []
    for group in groups:
        value: float | Tensor | None
        if group.impl != "reference":
            value = run_natively(operation, native, group, coefficient, **rounding)
        elif operation.rounds:
            value = in_pytorch(*group.lists, **rounding, ordinals=group.ordinals)
        else:
            value = in_pytorch(*group.lists)
        if value is not None:
            values.append(value)
    return values


def run_natively(
    operation: Operation,
    native: Callable[..., float | None],
    group: Group,
    coefficient: float,
    **rounding: int,
) -> float | Tensor | None:
    """Run one operation over a group that has kernels; return its value, where it has one."""
    value: float | Tensor | None
    if group.impl == "cpu":
        value = native(group.core_plan, coefficient, torch.get_num_threads(), **rounding)
    elif group.impl == "cuda":
        value = _run_cuda(operation, native, group, coefficient, **rounding)
    else:
        value = _run_triton(operation, group, coefficient, **rounding)
    mark_written(operation, group.lists)
    return value


def _resolved_seed(groups: Sequence[Group], seed: int | None) -> int:
    """Return the call's seed. None is drawn only where used: users' random state stays theirs."""
    if seed is not None:
        return seed
    if not any(group.has_bfloat16_fisher() for group in groups):
        return 0
    return int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))


def _run_cuda(
    operation: Operation,
    native: Callable[..., Any],
    group: Group,
    coefficient: float,
    seed: int = 0,
) -> Tensor | None:
    """Launch the CUDA twin of the core's function ``native``.

    Its value and the sums that lead to it share one allocation, made by PyTorch: so they may be
    captured in a CUDA graph, and wait in its stream's order before they are used anew.
    """
    launch = getattr(core, f"cuda_{native.__name__}")
    if not operation.sums:
        launch(group.core_plan, coefficient, seed=seed)
        return None
    needed = core.cuda_memory_needed(group.core_plan)
    memory = torch.empty(needed, dtype=torch.float64, device=group.lists[0][0].device)
    launch(group.core_plan, coefficient, memory.data_ptr(), seed)
    return memory[0]


def _run_triton(
    operation: Operation, group: Group, coefficient: float, seed: int = 0
) -> Tensor | None:
    from ewc_fast._triton import launch  # loads Triton

    assert group.table is not None
    return launch.run(operation.name, group.table, coefficient, seed)


def add_values(values: list[float | Tensor], params: TensorList) -> Tensor:
    """Add values into a float64 scalar on the first parameter's device.

    Where there is one tensor and nothing to add, no kernel is launched.
    """
    device = params[0].device if params else None
    number = sum(value for value in values if not isinstance(value, Tensor))
    tensors = [value.to(device) for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.scalar_tensor(number, dtype=torch.float64, device=device)
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total + number if number else total


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
    return add_values(values, params)


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
    constant: float | Tensor = 0.0,
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
    return add_values([constant, *values], params)


def accumulate_square_(
    fisher: TensorList,
    grads: TensorList,
    weight: float,
    seed: int | None = None,
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
        seed=seed,
    )


def merge_(
    fisher: TensorList,
    anchor: TensorList,
    residual: TensorList,
    new_fisher: TensorList,
    params: TensorList,
    gamma: float,
    seed: int | None = None,
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
        seed=seed,
    )
    return add_values(values, params)


def merge_online_(
    fisher: TensorList,
    anchor: TensorList,
    new_fisher: TensorList,
    params: TensorList,
    gamma: float,
    seed: int | None = None,
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
        seed=seed,
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
        _checks.non_negative("ewc_lambda * lr", ewc_lambda * lr),
        native=core.proximal_step,
        in_pytorch=partial(reference.proximal_step_, ewc_lambda=ewc_lambda, lr=lr),
        impl=impl,
        plan=plan,
    )
