"""Launches the list operations' kernels over a table."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ewc_fast._triton import kernels
from ewc_fast._triton.device import current
from ewc_fast._triton.table import OPERANDS, Launch, Table

_FACTORS = {"add_penalty_grad_": 0.5, "penalty": 0.5, "merge_": 1.0}
"""What the sum of an operation's terms is multiplied by to be its value; others have none."""

_IN_FLOAT64 = frozenset({"merge_", "merge_online_"})

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,  # codes of a Fisher in 8 bits
}

SUM_BLOCK = 4096

# Products and sums are rounded each, as PyTorch does: it costs nothing where memory is the limit,
# and what is then rounded by chance falls to the same side in every implementation.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def run(operation: str, table: Table, coefficient: float, seed: int = 0) -> Tensor | None:
    """Run an operation on the current stream; return its value, where it has one.

    A float64 scalar on the device; nobody waits for it.
    """
    partial = value = None
    if operation in _FACTORS:
        # Apart, so that whoever keeps the value does not keep the sums that led to it.
        partial, value = (
            torch.empty(shape, dtype=torch.float64, device=table.device)
            for shape in ((table.chunks,), ())
        )
    with current(table.device):
        for launch in table.launches:
            _start(operation, table, launch, partial, (coefficient, seed))
        if value is not None:
            kernels.sum_partials[(1,)](
                partial, value, table.chunks, _FACTORS[operation], BLOCK=SUM_BLOCK, num_warps=8
            )
    return value


def _start(
    operation: str, table: Table, launch: Launch, partial: Tensor | None, scalars: tuple[float, int]
) -> None:
    fixed = constants(operation, launch) | OPTIONS
    on_device = table.on_device() if len(launch.rows) > 1 else None
    if on_device is not None:
        kernels.over_rows[(launch.chunks,)](
            *on_device, partial, launch.first_chunk, *scalars, **fixed
        )
        return
    for single in table.one_by_one(launch):
        addresses, row, aligned = table.only_row(single)
        kernels.over_one_row[(single.chunks,)](
            *addresses, *row, partial, single.first_chunk, *scalars, aligned, **fixed
        )


def constants(operation: str, launch: Launch) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    wide = operation in _IN_FLOAT64 or torch.float64 in launch.dtypes
    dtypes = [DTYPES[dtype] for dtype in launch.dtypes]
    dtypes += dtypes[-1:] * (OPERANDS - len(dtypes))
    return {
        "OPERATION": operation,
        "COMPUTE": tl.float64 if wide else tl.float32,
        "VECTOR": launch.vector,
        "BLOCK": 512 if wide else 1024,  # 4 or 8 elements a thread
        **{f"D{i}": dtype for i, dtype in enumerate(dtypes)},
    }
