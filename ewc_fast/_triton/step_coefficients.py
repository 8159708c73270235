"""What all elements of a row share in an optimizer's step, computed once on the device.

Float64, rounded once where it is used (``step_kernels.py``). Learning rate and counts of steps are
read here from the device, so that a CUDA graph follows them.
"""

import triton
import triton.language as tl

from ewc_fast._triton import table
from ewc_fast._triton.step_formulas import power, square_root

COEFFICIENTS = 9
"""Columns of a row of coefficients: the optimizer's, up to eight, and eta lambda."""

_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
_STRENGTH = tl.constexpr(COEFFICIENTS - 1)
_FIRST_ADDRESS = tl.constexpr(table.FIRST_ADDRESS)
_COLUMNS = tl.constexpr(table.STEP_COLUMNS)
_COUNT = tl.constexpr(table.STEP_OPERANDS - 1)


@triton.jit
def adam_coefficients(
    coefficients,  # (rows, COEFFICIENTS) float64
    records,  # (rows, COLUMNS) int64, or None: then there is one row
    address: tl.int64,  # of that row's count
    rows,
    lr,  # on the device, or None
    lr_number: tl.float64,
    weight_decay: tl.float64,
    ewc_lambda: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a step to the rows' counts; write the coefficients that follow (csrc/optimizer.h)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    if records is None:
        addresses = tl.zeros([BLOCK], tl.int64) + address
    else:
        addresses = tl.load(records + row * _COLUMNS + _FIRST_ADDRESS + _COUNT, mask=mask, other=0)
    counts = addresses.to(tl.pointer_type(tl.float32))
    count = tl.load(counts, mask=mask, other=0.0) + 1.0
    tl.store(counts, count, mask=mask)
    rate = _rate(lr, lr_number)
    zeros = tl.zeros([BLOCK], tl.float64)
    decay = zeros + weight_decay
    taken = count.to(tl.int32)
    to = coefficients + row * _COEFFICIENTS
    if DECOUPLED:
        tl.store(to, zeros, mask=mask)
        tl.store(to + 1, 1.0 - rate * decay, mask=mask)
    else:
        tl.store(to, decay, mask=mask)
        tl.store(to + 1, zeros + 1.0, mask=mask)
    tl.store(to + 2, 1.0 - (zeros + beta1), mask=mask)
    tl.store(to + 3, zeros + beta2, mask=mask)
    tl.store(to + 4, 1.0 - (zeros + beta2), mask=mask)
    tl.store(to + 5, rate / (1.0 - power(zeros + beta1, taken)), mask=mask)
    tl.store(to + 6, square_root(1.0 - power(zeros + beta2, taken)), mask=mask)
    tl.store(to + 7, zeros + eps, mask=mask)
    tl.store(to + _STRENGTH, rate * (zeros + ewc_lambda), mask=mask)


@triton.jit
def sgd_coefficients(
    coefficients,  # one row, for all
    lr,
    lr_number: tl.float64,
    weight_decay: tl.float64,
    ewc_lambda: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
):
    """Write what all elements share."""
    rate = _rate(lr, lr_number)
    tl.store(coefficients, tl.full((), weight_decay, tl.float64))
    tl.store(coefficients + 1, tl.full((), momentum, tl.float64))
    tl.store(coefficients + 2, 1.0 - tl.full((), dampening, tl.float64))
    tl.store(coefficients + 3, rate)
    tl.store(coefficients + _STRENGTH, rate * tl.full((), ewc_lambda, tl.float64))


@triton.jit
def _rate(lr, number):
    if lr is None:
        rate = tl.full((), number, tl.float64)
    else:
        rate = tl.load(lr).to(tl.float64)
    return rate
