"""What each operation takes, and how its rows are validated and split among implementations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ewc_fast import _checks, _triton
from ewc_fast._checks import Operand, Operation, TensorList
from ewc_fast._dispatch import Impl, choose
from ewc_fast._native import core, cuda_unavailable, reader

if TYPE_CHECKING:
    from ewc_fast._triton.table import Table

_PARAMS = Operand("params", "param")
_FISHER = Operand("fisher", "fisher")
_ANCHOR = Operand("anchor", "state")
_KEPT_FISHER = Operand("fisher", "fisher", written=True)

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
    (_KEPT_FISHER, Operand("grads", "param", stacked=True)),
    measure=0,
)
MERGE = Operation(
    "merge_",
    (
        _KEPT_FISHER,
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
        _KEPT_FISHER,
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
    ordinals: Sequence[int]  # the rows' places in the call's lists
    core_plan: Any = None  # core.Plan, unless PyTorch runs the rows
    table: Table | None = None  # what Triton's kernels read

    def has_bfloat16_fisher(self) -> bool:
        """Whether a Fisher, the first operand, is kept in bfloat16."""
        if self.core_plan is not None:
            found: bool = self.core_plan.has_bfloat16_fisher
            return found
        return any(fisher.dtype == torch.bfloat16 for fisher in self.lists[0])


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
        self._impl: Impl = "auto"
        self._kept: Group | None = None
        self._moves = 0  # of the kept group's addresses, at the last look
        self._read_by_graphs: list[Tensor] = []

    def groups(
        self, operation: Operation, lists: Sequence[TensorList], requested: Impl
    ) -> list[Group]:
        """Return the validated rows, grouped by implementation and device."""
        kept = self._kept
        if (
            kept is not None
            and self._operation is operation
            and self._impl == requested
            and kept.core_plan.refresh(*lists)
        ):
            self._update_table(kept)
            return [kept._replace(lists=lists)]
        self._forget()
        groups = _validated_groups(operation, lists, requested, self._pinned)
        if len(groups) == 1 and groups[0].core_plan is not None:
            self._operation, self._impl = operation, requested
            self._kept = groups[0]._replace(lists=())  # nobody's tensors are kept alive
            self._moves = groups[0].core_plan.moves
        return groups

    def _update_table(self, kept: Group) -> None:
        moves = kept.core_plan.moves
        if kept.table is not None and moves != self._moves:
            kept.table.take(kept.core_plan.addresses())
            self._moves = moves

    def _forget(self) -> None:
        if self._kept is not None and self._kept.table is not None:
            self._read_by_graphs += self._kept.table.read_by_graphs
        self._kept = None


def _validated_groups(
    operation: Operation, lists: Sequence[TensorList], requested: Impl, pinned: Collection[str]
) -> list[Group]:
    _checks.impl(requested)
    whole = _whole_group(operation, lists, requested, pinned)
    if whole is not None:
        return [whole]
    _checks.operands(operation, lists)
    rows: dict[tuple[Impl, torch.device], list[int]] = {}
    reasons = {tensor.device.type: _reasons(tensor.device.type) for tensor in lists[0]}
    for index, tensor in enumerate(lists[0]):
        device_type = tensor.device.type
        dense = _checks.dense(operation, lists, index)
        chosen = choose(requested, operation.name, device_type, dense, *reasons[device_type])
        rows.setdefault((chosen, tensor.device), []).append(index)
    groups = []
    for (chosen, _), indices in rows.items():
        picked = [[tensors[i] for i in indices] for tensors in lists]
        if chosen == "reference":
            groups.append(Group(chosen, picked, indices))
        else:
            native = _core_plan(operation, pinned)
            native.adopt(*picked, ordinals=indices)
            table = _table(operation, picked, indices) if chosen == "triton" else None
            groups.append(Group(chosen, picked, indices, native, table))
    return groups


def _reasons(device_type: str) -> tuple[str | None, str | None]:
    """Why CUDA and why Triton can't run on such a device, or None where they can."""
    why_no_cuda = cuda_unavailable() if device_type == "cuda" else "it is not a CUDA device"
    return why_no_cuda, _triton.unavailable(device_type)


def _table(operation: Operation, lists: Sequence[TensorList], ordinals: Sequence[int]) -> Table:
    from ewc_fast._triton.table import Table

    return Table(operation, lists, ordinals)


def _whole_group(
    operation: Operation, lists: Sequence[TensorList], requested: Impl, pinned: Collection[str]
) -> Group | None:
    """Return by far the most calls' only group: dense, on one device, all in order; else None."""
    if requested == "reference" or not lists[0]:
        return None
    core_plan = _core_plan(operation, pinned)
    if not core_plan.accepts(*lists):
        return None
    device_type = lists[0][0].device.type
    chosen = choose(requested, operation.name, device_type, True, *_reasons(device_type))
    if chosen == "reference":
        return None
    ordinals = range(len(lists[0]))
    table = _table(operation, lists, ordinals) if chosen == "triton" else None
    return Group(chosen, lists, ordinals, core_plan, table)


def _core_plan(operation: Operation, pinned: Collection[str]) -> core.Plan:
    specs = [(o.name, o.role, o.written, o.stacked, o.name in pinned) for o in operation.operands]
    slots = [i if o.slot is None else o.slot for i, o in enumerate(operation.operands)]
    return core.Plan(reader, specs, slots)
