"""What each operation takes, and how its rows are validated and split among implementations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ewc_fast import _checks
from ewc_fast._checks import Operand, Operation, TensorList
from ewc_fast._dispatch import Impl, choose
from ewc_fast._native import core, cuda_unavailable, reader

_PARAMS = Operand("params", "param")
_FISHER = Operand("fisher", "state")
_ANCHOR = Operand("anchor", "state")

ADD_PENALTY_GRAD = Operation(
    "add_penalty_grad_",
    (Operand("grads", "param", written=True), _PARAMS, _FISHER, _ANCHOR),
    measure=1,
    sums=True,
)
PENALTY = Operation("penalty", (_PARAMS, _FISHER, _ANCHOR), measure=0, sums=True)
PENALTY_GRAD = Operation(
    "penalty_grad",
    (Operand("out", "param", written=True), _PARAMS, _FISHER, _ANCHOR),
    measure=1,
)
ACCUMULATE_SQUARE = Operation(
    "accumulate_square_",
    (Operand("fisher", "state", written=True), Operand("grads", "param", stacked=True)),
    measure=0,
)
MERGE = Operation(
    "merge_",
    (
        Operand("fisher", "state", written=True),
        Operand("anchor", "state", written=True),
        Operand("residual", "residual", written=True),
        Operand("new_fisher", "state"),
        _PARAMS,
    ),
    measure=4,
    sums=True,
)
MERGE_ONLINE = Operation(
    "merge_online_",
    (
        Operand("fisher", "state", written=True),
        Operand("anchor", "state", written=True),
        Operand("new_fisher", "state"),
        _PARAMS,
    ),
    measure=3,
)
PROXIMAL_STEP = Operation(
    "proximal_step_",
    (Operand("params", "param", written=True), _FISHER, _ANCHOR),
    measure=0,
)


class Group(NamedTuple):
    """Rows that one implementation runs in one call."""

    impl: Impl
    lists: Sequence[TensorList]
    core_plan: Any = None  # core.Plan, unless PyTorch runs the rows


class Plan:
    """Validation and addresses of one operation's operands, kept from call to call.

    Give the same plan to every call of a training loop. Each call compares address, shape, strides,
    dtype and device of every tensor with those of the call before: new addresses are taken over,
    any other change validates everything anew. ``pinned`` names operands that the plan's owner
    promises not to replace; they are not compared. A plan serves one thread at a time.
    """

    def __init__(self, pinned: Iterable[str] = ()) -> None:
        self._pinned = frozenset(pinned)
        self._operation: Operation | None = None
        self._requested: Impl = "auto"
        self._chosen: Impl = "cpu"
        self._core_plan: core.Plan | None = None

    def groups(
        self, operation: Operation, lists: Sequence[TensorList], requested: Impl
    ) -> list[Group]:
        """Return the validated rows, grouped by implementation and device."""
        if (
            self._operation is operation
            and self._core_plan is not None
            and self._requested == requested
            and self._core_plan.refresh(*lists)
        ):
            return [Group(self._chosen, lists, self._core_plan)]
        self._operation = None
        groups = _validated_groups(operation, lists, requested, self._pinned)
        if len(groups) == 1 and groups[0].core_plan is not None:
            self._operation, self._requested = operation, requested
            self._chosen, self._core_plan = groups[0].impl, groups[0].core_plan
        return groups


def _validated_groups(
    operation: Operation, lists: Sequence[TensorList], requested: Impl, pinned: Collection[str]
) -> list[Group]:
    _checks.impl(requested)
    whole = _whole_group(operation, lists, requested, pinned)
    if whole is not None:
        return [whole]
    _checks.operands(operation, lists)
    on_cuda = requested == "cuda" or any(tensor.is_cuda for tensor in lists[0])
    why_no_cuda = cuda_unavailable() if on_cuda else None
    rows: dict[tuple[Impl, torch.device], list[int]] = {}
    for index, tensor in enumerate(lists[0]):
        dense = _checks.dense(operation, lists, index)
        chosen = choose(requested, operation.name, tensor.device.type, dense, why_no_cuda)
        rows.setdefault((chosen, tensor.device), []).append(index)
    groups = []
    for (chosen, _), indices in rows.items():
        picked = [[tensors[i] for i in indices] for tensors in lists]
        if chosen == "reference":
            groups.append(Group(chosen, picked))
        else:
            native = _core_plan(operation, pinned)
            native.adopt(*picked)
            groups.append(Group(chosen, picked, native))
    return groups


def _whole_group(
    operation: Operation, lists: Sequence[TensorList], requested: Impl, pinned: Collection[str]
) -> Group | None:
    """Return by far the most calls' only group: dense, on one device, all in order; else None."""
    if requested == "reference":
        return None
    core_plan = _core_plan(operation, pinned)
    if not core_plan.accepts(*lists):
        return None
    device_type: Impl = "cuda" if core_plan.on_cuda else "cpu"
    if requested not in ("auto", device_type):
        return None
    why_no_cuda = cuda_unavailable() if core_plan.on_cuda else None
    chosen = choose(requested, operation.name, device_type, True, why_no_cuda)
    return Group(chosen, lists, core_plan) if chosen == device_type else None


def _core_plan(operation: Operation, pinned: Collection[str]) -> core.Plan:
    specs = [(o.name, o.role, o.written, o.stacked, o.name in pinned) for o in operation.operands]
    return core.Plan(reader, specs)
