"""The optimizers' steps with the springs inside, in one pass: twins of ``csrc/cuda/optimizer.cu``.

Chunks, whole blocks and tails are as in ``kernels.py``. Bytes of a float32 element: Adam 28, with
springs 36, with amsgrad 8 more; SGD 12, with momentum 20, with springs 8 more; a path 8 more. What
a step lacks is a constant of the kernel, so that nothing is loaded or branched for it. What all
elements of a row share was computed before: ``step_coefficients.py``.
"""

import triton
import triton.language as tl

from ewc_fast._triton import table
from ewc_fast._triton.formulas import (
    penalty_gradient,
    proximal,
    random_bits,
    round_stochastically,
)
from ewc_fast._triton.operations import load, store
from ewc_fast._triton.step_coefficients import COEFFICIENTS
from ewc_fast._triton.step_formulas import (
    adam_param,
    adam_second_moment,
    decayed_gradient,
    larger_or_nan,
    moved_towards,
    path_term,
    sgd_buffer,
    sgd_param,
)

_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
_STRENGTH = tl.constexpr(COEFFICIENTS - 1)
_NUMEL = tl.constexpr(table.NUMEL)
_ORDINAL = tl.constexpr(table.ORDINAL)
_ALIGNED = tl.constexpr(table.ALIGNED)
_FIRST_ADDRESS = tl.constexpr(table.FIRST_ADDRESS)
_COLUMNS = tl.constexpr(table.STEP_COLUMNS)
_CHUNK = tl.constexpr(table.CHUNK)


@triton.jit(do_not_specialize=["first_chunk", "seed"])
def over_rows(
    records,  # (rows, COLUMNS) int64
    chunks,  # int64: row << 32 | chunk of the row
    partial,  # float64, or None without springs
    coefficients,
    first_chunk: tl.int64,
    ewc_lambda: tl.float64,
    seed: tl.uint32,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PARAM: tl.constexpr,
    FISHER: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS: tl.constexpr,
):
    """Work on chunk ``first_chunk + program`` of a table of rows."""
    index = first_chunk + tl.program_id(0)
    chunk = tl.load(chunks + index)
    row = chunk >> 32
    record = records + row * _COLUMNS
    addresses = record + _FIRST_ADDRESS
    if STEP[0] == "adam":
        coefficients += row * _COEFFICIENTS
    total = _chunk(
        tl.load(addresses), tl.load(addresses + 1), tl.load(addresses + 2), tl.load(addresses + 3),
        tl.load(addresses + 4), tl.load(addresses + 5), tl.load(addresses + 6),
        tl.load(addresses + 7), tl.load(addresses + 8), coefficients, chunk & 0xFFFFFFFF,
        tl.load(record + _NUMEL), tl.load(record + _ORDINAL), tl.load(record + _ALIGNED),
        ewc_lambda, seed,
        STEP, COMPUTE, VECTOR, BLOCK, PARAM, FISHER, MOMENT, HAS,
    )  # fmt: skip
    if partial is not None:
        tl.store(partial + index, total)


@triton.jit(
    do_not_specialize=[
        *(f"address{i}" for i in range(table.STEP_OPERANDS - 1)),
        *("numel", "ordinal", "first_chunk", "seed"),
    ]
)
def over_one_row(
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    address5: tl.int64,
    address6: tl.int64,
    address7: tl.int64,
    address8: tl.int64,
    numel: tl.int64,
    ordinal: tl.int64,
    partial,
    coefficients,  # of this row
    first_chunk: tl.int64,
    ewc_lambda: tl.float64,
    seed: tl.uint32,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PARAM: tl.constexpr,
    FISHER: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS: tl.constexpr,
):
    """Work on chunk ``program`` of one row."""
    chunk = tl.program_id(0).to(tl.int64)
    total = _chunk(
        address0, address1, address2, address3, address4, address5, address6, address7,
        address8, coefficients, chunk, numel, ordinal, ALIGNED, ewc_lambda, seed,
        STEP, COMPUTE, VECTOR, BLOCK, PARAM, FISHER, MOMENT, HAS,
    )  # fmt: skip
    if partial is not None:
        tl.store(partial + first_chunk + chunk, total)


@triton.jit
def _chunk(
    param,
    grad,
    fisher,
    anchor,
    master,
    first,
    second,
    largest,
    path,
    coefficients,
    chunk,
    numel,
    ordinal,
    is_aligned,
    ewc_lambda,
    seed,
    STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PARAM: tl.constexpr,
    FISHER: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS: tl.constexpr,
):
    """Take the step on the chunk's elements; return the sum of the springs' terms, in float64."""
    ewc_lambda = tl.full((), ewc_lambda, COMPUTE)
    row_seed = random_bits(tl.cast(seed, tl.uint32), tl.cast(ordinal, tl.int64))
    begin = chunk * _CHUNK
    end = tl.minimum(begin + _CHUNK, tl.cast(numel, tl.int64))
    whole = (end - begin) // BLOCK * is_aligned
    WIDE: tl.constexpr = VECTOR * COMPUTE.primitive_bitwidth // 8
    OF_PARAM: tl.constexpr = VECTOR * PARAM.primitive_bitwidth // 8
    OF_MOMENT: tl.constexpr = VECTOR * MOMENT.primitive_bitwidth // 8
    # The promise counts on the pointer, not on the integer, and not across a function's border.
    p0 = tl.multiple_of(tl.cast(param, tl.pointer_type(PARAM)), OF_PARAM)
    p1 = tl.multiple_of(tl.cast(grad, tl.pointer_type(PARAM)), OF_PARAM)
    p2 = tl.multiple_of(
        tl.cast(fisher, tl.pointer_type(FISHER)), VECTOR * FISHER.primitive_bitwidth // 8
    )
    p3 = tl.multiple_of(tl.cast(anchor, tl.pointer_type(COMPUTE)), WIDE)
    p4 = tl.multiple_of(tl.cast(master, tl.pointer_type(COMPUTE)), WIDE)
    p5 = tl.multiple_of(tl.cast(first, tl.pointer_type(MOMENT)), OF_MOMENT)
    p6 = tl.multiple_of(tl.cast(second, tl.pointer_type(MOMENT)), OF_MOMENT)
    p7 = tl.multiple_of(tl.cast(largest, tl.pointer_type(MOMENT)), OF_MOMENT)
    p8 = tl.multiple_of(tl.cast(path, tl.pointer_type(COMPUTE)), WIDE)
    # Once a chunk: what follows a store is not loaded before it.
    c0 = tl.load(coefficients).to(COMPUTE)
    c1 = tl.load(coefficients + 1).to(COMPUTE)
    c2 = tl.load(coefficients + 2).to(COMPUTE)
    c3 = tl.load(coefficients + 3).to(COMPUTE)
    c4 = tl.load(coefficients + 4).to(COMPUTE)
    c5 = tl.load(coefficients + 5).to(COMPUTE)
    c6 = tl.load(coefficients + 6).to(COMPUTE)
    c7 = tl.load(coefficients + 7).to(COMPUTE)
    strength = tl.load(coefficients + _STRENGTH).to(COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    for block in range(whole):
        at = begin + tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = _block(
            total, p0, p1, p2, p3, p4, p5, p6, p7, p8, at, None, c0, c1, c2, c3, c4, c5, c6,
            c7, strength, ewc_lambda, row_seed, STEP, HAS,
        )  # fmt: skip

    q0 = tl.cast(param, tl.pointer_type(PARAM))
    q1 = tl.cast(grad, tl.pointer_type(PARAM))
    q2 = tl.cast(fisher, tl.pointer_type(FISHER))
    q3 = tl.cast(anchor, tl.pointer_type(COMPUTE))
    q4 = tl.cast(master, tl.pointer_type(COMPUTE))
    q5 = tl.cast(first, tl.pointer_type(MOMENT))
    q6 = tl.cast(second, tl.pointer_type(MOMENT))
    q7 = tl.cast(largest, tl.pointer_type(MOMENT))
    q8 = tl.cast(path, tl.pointer_type(COMPUTE))
    # Of another size than whole blocks: see kernels.py.
    TAIL: tl.constexpr = BLOCK // 2
    rest = tl.zeros([TAIL], COMPUTE)
    for at_first in range(begin + whole * BLOCK, end, TAIL):
        at = tl.cast(at_first, tl.int64) + tl.arange(0, TAIL)
        rest = _block(
            rest, q0, q1, q2, q3, q4, q5, q6, q7, q8, at, at < end, c0, c1, c2, c3, c4, c5, c6,
            c7, strength, ewc_lambda, row_seed, STEP, HAS,
        )  # fmt: skip
    return tl.sum(total.to(tl.float64)) + tl.sum(rest.to(tl.float64))


@triton.jit
def _block(
    total,
    param,
    grad,
    fisher,
    anchor,
    master,
    first,
    second,
    largest,
    path,
    at,
    mask,
    c0,  # the optimizer's coefficients, in the order of csrc/math.h
    c1,
    c2,
    c3,
    c4,
    c5,
    c6,
    c7,
    strength,
    ewc_lambda,
    seed,
    STEP: tl.constexpr,
    HAS: tl.constexpr,
):
    """Take the step on one block; return ``total`` with the springs' terms."""
    OPTIMIZER: tl.constexpr = STEP[0]
    SIGN: tl.constexpr = STEP[1]
    PROXIMAL: tl.constexpr = STEP[2]
    BY_CHANCE: tl.constexpr = STEP[3]
    BEGINS: tl.constexpr = STEP[4]
    NESTEROV: tl.constexpr = STEP[5]
    SPRINGS: tl.constexpr = HAS[0]
    MASTER: tl.constexpr = HAS[1]
    MOMENTS: tl.constexpr = HAS[2]
    AMSGRAD: tl.constexpr = HAS[3]
    PATH: tl.constexpr = HAS[4]

    if MASTER:
        theta = load(master, at, mask, total)
    else:
        theta = load(param, at, mask, total)
    given = load(grad, at, mask, total)
    if PATH:
        explained = load(path, at, mask, total)
        if MASTER:
            before = load(param, at, mask, total)
        else:
            before = theta
    gradient = SIGN * given
    if SPRINGS:
        stiffness = load(fisher, at, mask, total)
        rest = load(anchor, at, mask, total)
        distance = theta - rest
        pull = penalty_gradient(ewc_lambda, stiffness, distance)
        total += pull * distance
        if not PROXIMAL:
            gradient += pull
    gradient = decayed_gradient(c0, gradient, theta)
    if OPTIMIZER == "adam":
        mean = moved_towards(c2, load(first, at, mask, total), gradient)
        square = adam_second_moment(c3, c4, load(second, at, mask, total), gradient)
        store(first, at, mask, mean)
        store(second, at, mask, square)
        if AMSGRAD:
            square = larger_or_nan(load(largest, at, mask, total), square)
            store(largest, at, mask, square)
        theta = adam_param(c1, c5, c6, c7, theta, mean, square)
    else:
        tl.static_assert(OPTIMIZER == "sgd")
        buffer = gradient
        if MOMENTS:
            buffer = sgd_buffer(c1, c2, load(first, at, mask, total), gradient, BEGINS)
            store(first, at, mask, buffer)
        theta = sgd_param(c3, c1, theta, gradient, buffer, NESTEROV)
    if SPRINGS and PROXIMAL:
        theta = proximal(strength * stiffness, theta, rest)
    if MASTER:
        store(master, at, mask, theta)
    if BY_CHANCE and param.dtype.element_ty == tl.bfloat16:
        kept = round_stochastically(theta, random_bits(seed, at))
    else:
        kept = theta.to(param.dtype.element_ty)
    store(param, at, mask, kept)
    if PATH:
        store(path, at, mask, explained + path_term(given, before, kept.to(total.dtype)))
    return total
