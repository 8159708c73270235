"""The optimizers' steps on a GPU: launches, and the learning rate that a CUDA graph can follow."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast._checks import Operation
from ewc_fast._native import core
from ewc_fast._plan import Group
from ewc_fast.reference_steps import AdamOptions, SgdOptions

Options = AdamOptions | SgdOptions


def run(operation: Operation, group: Group, options: Options, lr: Tensor | None) -> Tensor | None:
    """Take a step with one group of rows; return the penalty before it, where there are springs.

    ``lr``, a scalar on the device, counts instead of the options' where it is given. Nobody waits.
    """
    if group.impl == "cuda":
        return _run_cuda(operation, group, options, lr)
    from ewc_fast._triton import step_launch  # loads Triton

    assert group.table is not None
    names = tuple(operand.name for operand in operation.operands)
    return step_launch.run(group.table, names, options, lr)


def _run_cuda(
    operation: Operation, group: Group, options: Options, lr: Tensor | None
) -> Tensor | None:
    """Launch the CUDA kernels.

    Value, partial sums and coefficients share one allocation, made by PyTorch: so they may be
    captured in a CUDA graph, and wait in its stream's order before they are used anew.
    """
    needed = core.cuda_step_memory_needed(group.core_plan)
    memory = torch.empty(needed, dtype=torch.float64, device=group.lists[0][0].device)
    address, is_double = (0, False) if lr is None else (lr.data_ptr(), lr.dtype == torch.float64)
    if isinstance(options, AdamOptions):
        adam = core.AdamOptions(*options)
        core.cuda_adam_step(group.core_plan, adam, memory.data_ptr(), address, is_double)
    else:
        sgd = core.SgdOptions(*options)
        core.cuda_sgd_step(group.core_plan, sgd, memory.data_ptr(), address, is_double)
    return memory[0] if operation.sums else None


def on_one_device(lr: Tensor, group: Group) -> Tensor:
    """Return a learning rate where a group's kernels can read it: the tensor itself, mostly."""
    return lr.to(group.lists[0][0].device, non_blocking=True)
