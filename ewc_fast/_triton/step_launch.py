"""Launches the optimizers' steps over a table."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ewc_fast._triton import kernels, launch, step_coefficients, step_kernels
from ewc_fast._triton.device import current
from ewc_fast._triton.step_coefficients import COEFFICIENTS
from ewc_fast._triton.table import STEP_OPERANDS, Launch, Table
from ewc_fast.reference_steps import AdamOptions, SgdOptions

_ROWS = 128  # whose coefficients one program computes


def run(
    table: Table, names: tuple[str, ...], options: AdamOptions | SgdOptions, lr: Tensor | None
) -> Tensor | None:
    """Take a step on the current stream; return the penalty before it, where there are springs.

    ``names`` are the operands that are there; ``lr`` counts instead of the options' where it is
    given, a scalar on the device. The value is a float64 scalar on the device.
    """
    partial = value = None
    if "fisher" in names:
        partial, value = _empty(table, table.chunks), _empty(table)
    rows = len(table.rows) if isinstance(options, AdamOptions) else 1
    coefficients = _empty(table, rows, COEFFICIENTS)
    with current(table.device):
        if isinstance(options, AdamOptions):
            _count_step(table, coefficients, options, lr)
        else:
            step_coefficients.sgd_coefficients[(1,)](
                coefficients, lr, options.lr, options.weight_decay, options.ewc_lambda,
                options.momentum, options.dampening, num_warps=1,
            )  # fmt: skip
        for part in table.launches:
            _start(table, part, names, options, partial, coefficients)
        if value is not None:
            kernels.sum_partials[(1,)](
                partial, value, table.chunks, 0.5, BLOCK=launch.SUM_BLOCK, num_warps=8
            )
    return value


def _empty(table: Table, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=table.device)


def _count_step(
    table: Table, coefficients: Tensor, options: AdamOptions, lr: Tensor | None
) -> None:
    """Add a step to every row's count, of empty tensors too."""
    numbers = (
        lr, options.lr, options.weight_decay, options.ewc_lambda, options.beta1, options.beta2,
        options.eps,
    )  # fmt: skip
    fixed = {"DECOUPLED": options.decoupled, "num_warps": 4, "enable_fp_fusion": False}
    rows = len(table.rows)
    on_device = table.on_device() if rows > 1 else None
    if on_device is not None:
        step_coefficients.adam_coefficients[(-(-rows // _ROWS),)](
            coefficients, on_device[0], 0, rows, *numbers, BLOCK=_ROWS, **fixed
        )
        return
    for row in range(rows):
        step_coefficients.adam_coefficients[(1,)](
            coefficients[row], None, table.placed(row)[-1], 1, *numbers, BLOCK=1, **fixed
        )


def _start(
    table: Table,
    part: Launch,
    names: tuple[str, ...],
    options: AdamOptions | SgdOptions,
    partial: Tensor | None,
    coefficients: Tensor,
) -> None:
    fixed = constants(part, names, options) | launch.OPTIONS
    numbers = options.ewc_lambda, options.rounding_seed or 0
    on_device = table.on_device() if len(part.rows) > 1 else None
    if on_device is not None:
        step_kernels.over_rows[(part.chunks,)](
            *on_device, partial, coefficients, part.first_chunk, *numbers, **fixed
        )
        return
    for single in table.one_by_one(part):
        addresses, row, aligned = table.only_row(single)
        own = coefficients[single.rows[0] if isinstance(options, AdamOptions) else 0]
        step_kernels.over_one_row[(single.chunks,)](
            *addresses[: STEP_OPERANDS - 1], row.numel, row.ordinal, partial, own,
            single.first_chunk, *numbers, aligned, **fixed,
        )  # fmt: skip


def constants(
    part: Launch, names: tuple[str, ...], options: AdamOptions | SgdOptions
) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    dtypes = dict(zip(names, part.dtypes, strict=True))
    param = dtypes["params"]
    moment = dtypes.get("exp_avgs", dtypes.get("momentum_buffers", param))
    wide = param == torch.float64
    sgd = options if isinstance(options, SgdOptions) else None
    return {
        "STEP": (
            "adam" if sgd is None else "sgd",
            -1.0 if options.maximize else 1.0,
            options.proximal,
            options.rounding_seed is not None,
            sgd is not None and sgd.first,
            sgd is not None and sgd.nesterov,
        ),
        "HAS": (
            "fisher" in names,
            "master" in names,
            "exp_avgs" in names or "momentum_buffers" in names,
            "max_exp_avg_sqs" in names,
            "path" in names,
        ),
        "COMPUTE": tl.float64 if wide else tl.float32,
        "VECTOR": part.vector,
        "BLOCK": 512 if wide else 1024,  # 4 or 8 elements a thread
        "PARAM": launch.DTYPES[param],
        "FISHER": launch.DTYPES[dtypes.get("fisher", param)],
        "MOMENT": launch.DTYPES[moment],
    }
