"""One loop over chunks for all list operations, on one tensor or many, and the sum at its end.

A program works on one chunk of one row (a row is the i-th tensor of every list). Whole blocks of a
row whose tensors are aligned go without a mask, in accesses of 16 bytes an operand of 4 or 8 byte
elements (8 bytes for bfloat16 and float16: as many elements as beside them, since threads that hold
other elements for the store than for the load would have to exchange them). The tail, and rows that
are not aligned, go element by element under a mask. Offsets are 64 bits wide.

A program of an operation with a value leaves the sum of its terms, added in float64 after at most
32 in each register, and ``sum_partials`` adds those: no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from ewc_fast._triton import operations, table
from ewc_fast._triton.formulas import random_bits

_NUMEL = tl.constexpr(table.NUMEL)
_SAMPLES = tl.constexpr(table.SAMPLES)
_SAMPLE_STRIDE = tl.constexpr(table.SAMPLE_STRIDE)
_ORDINAL = tl.constexpr(table.ORDINAL)
_ALIGNED = tl.constexpr(table.ALIGNED)
_FIRST_ADDRESS = tl.constexpr(table.FIRST_ADDRESS)
_COLUMNS = tl.constexpr(table.COLUMNS)
_CHUNK = tl.constexpr(table.CHUNK)


@triton.jit(do_not_specialize=["first_chunk", "seed"])
def over_rows(
    records,  # (rows, COLUMNS) int64
    chunks,  # int64: row << 32 | chunk of the row
    partial,  # float64, or None where the operation has no value
    first_chunk: tl.int64,
    coefficient: tl.float64,
    seed: tl.uint32,
    OPERATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    D4: tl.constexpr,
):
    """Work on chunk ``first_chunk + program`` of a table of rows."""
    index = first_chunk + tl.program_id(0)
    chunk = tl.load(chunks + index)
    record = records + (chunk >> 32) * _COLUMNS
    addresses = record + _FIRST_ADDRESS
    total = _chunk(
        tl.load(addresses),
        tl.load(addresses + 1),
        tl.load(addresses + 2),
        tl.load(addresses + 3),
        tl.load(addresses + 4),
        chunk & 0xFFFFFFFF,
        tl.load(record + _NUMEL),
        tl.load(record + _SAMPLES),
        tl.load(record + _SAMPLE_STRIDE),
        tl.load(record + _ORDINAL),
        tl.load(record + _ALIGNED),
        coefficient,
        seed,
        OPERATION,
        COMPUTE,
        VECTOR,
        BLOCK,
        D0,
        D1,
        D2,
        D3,
        D4,
    )
    if partial is not None:
        tl.store(partial + index, total)


# The addresses are arguments and not a table's: then no memory has to be written first when one
# has changed, not even in a CUDA graph, and no load waits for another. A flat buffer is this case.
@triton.jit(
    do_not_specialize=[
        *(f"address{i}" for i in range(table.OPERANDS)),
        *("numel", "samples", "sample_stride", "ordinal", "first_chunk", "seed"),
    ]
)
def over_one_row(
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    numel: tl.int64,
    samples: tl.int64,
    sample_stride: tl.int64,
    ordinal: tl.int64,
    partial,
    first_chunk: tl.int64,
    coefficient: tl.float64,
    seed: tl.uint32,
    ALIGNED: tl.constexpr,
    OPERATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    D4: tl.constexpr,
):
    """Work on chunk ``program`` of one row."""
    chunk = tl.program_id(0).to(tl.int64)
    total = _chunk(
        address0,
        address1,
        address2,
        address3,
        address4,
        chunk,
        numel,
        samples,
        sample_stride,
        ordinal,
        ALIGNED,
        coefficient,
        seed,
        OPERATION,
        COMPUTE,
        VECTOR,
        BLOCK,
        D0,
        D1,
        D2,
        D3,
        D4,
    )
    if partial is not None:
        tl.store(partial + first_chunk + chunk, total)


@triton.jit(do_not_specialize=["count"])
def sum_partials(partial, value, count: tl.int64, factor: tl.float64, BLOCK: tl.constexpr):
    """``value = factor * (partial[0] + ... + partial[count - 1])``, in one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0)
    tl.store(value, tl.full((), factor, tl.float64) * tl.sum(total))


@triton.jit
def _chunk(
    address0,
    address1,
    address2,
    address3,
    address4,
    chunk,
    numel,
    samples,
    sample_stride,
    ordinal,
    is_aligned,
    coefficient,
    seed,
    OPERATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    D4: tl.constexpr,
):
    """Run the operation on the chunk's elements; return the sum of their terms, in float64."""
    coefficient = tl.full((), coefficient, COMPUTE)
    row_seed = random_bits(tl.cast(seed, tl.uint32), tl.cast(ordinal, tl.int64))
    begin = chunk * _CHUNK
    end = tl.minimum(begin + _CHUNK, tl.cast(numel, tl.int64))
    whole = (end - begin) // BLOCK * is_aligned
    # The promise counts on the pointer, not on the integer, and not across a function's border.
    p0 = tl.multiple_of(tl.cast(address0, tl.pointer_type(D0)), VECTOR * D0.primitive_bitwidth // 8)
    p1 = tl.multiple_of(tl.cast(address1, tl.pointer_type(D1)), VECTOR * D1.primitive_bitwidth // 8)
    p2 = tl.multiple_of(tl.cast(address2, tl.pointer_type(D2)), VECTOR * D2.primitive_bitwidth // 8)
    p3 = tl.multiple_of(tl.cast(address3, tl.pointer_type(D3)), VECTOR * D3.primitive_bitwidth // 8)
    p4 = tl.multiple_of(tl.cast(address4, tl.pointer_type(D4)), VECTOR * D4.primitive_bitwidth // 8)
    total = tl.zeros([BLOCK], COMPUTE)
    for block in range(whole):
        at = begin + tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = _block(
            OPERATION, total, p0, p1, p2, p3, p4, at, None,
            coefficient, samples, sample_stride, row_seed, VECTOR,
        )  # fmt: skip

    q0 = tl.cast(address0, tl.pointer_type(D0))
    q1 = tl.cast(address1, tl.pointer_type(D1))
    q2 = tl.cast(address2, tl.pointer_type(D2))
    q3 = tl.cast(address3, tl.pointer_type(D3))
    q4 = tl.cast(address4, tl.pointer_type(D4))
    # Of another size than whole blocks: the compiler gives loads of one size one layout, and
    # neighbouring threads would not load neighbours here.
    TAIL: tl.constexpr = BLOCK // 2
    rest = tl.zeros([TAIL], COMPUTE)
    for first in range(begin + whole * BLOCK, end, TAIL):
        at = tl.cast(first, tl.int64) + tl.arange(0, TAIL)
        rest = _block(
            OPERATION, rest, q0, q1, q2, q3, q4, at, at < end,
            coefficient, samples, sample_stride, row_seed, VECTOR,
        )  # fmt: skip
    return tl.sum(total.to(tl.float64)) + tl.sum(rest.to(tl.float64))


@triton.jit
def _block(
    OPERATION: tl.constexpr,
    total,
    p0,
    p1,
    p2,
    p3,
    p4,
    at,
    mask,
    coefficient,
    samples,
    sample_stride,
    seed,
    VECTOR: tl.constexpr,
):
    """Run the operation on one block; return ``total`` with its terms, where it has any."""
    if OPERATION == "add_penalty_grad_":
        total = operations.add_penalty_grad(total, p0, p1, p2, p3, p4, at, mask, coefficient)
    elif OPERATION == "penalty":
        total = operations.penalty(total, p0, p1, p2, p3, at, mask, coefficient)
    elif OPERATION == "penalty_grad":
        operations.penalty_grad(total, p0, p1, p2, p3, p4, at, mask, coefficient)
    elif OPERATION == "accumulate_square_":
        operations.accumulate_square(
            total, p0, p1, at, mask, coefficient, samples, sample_stride, seed, VECTOR
        )
    elif OPERATION == "merge_":
        total = operations.merge_(total, p0, p1, p2, p3, p4, at, mask, coefficient, seed)
    elif OPERATION == "merge_online_":
        operations.merge_online(total, p0, p1, p2, p3, at, mask, coefficient, seed)
    else:
        tl.static_assert(OPERATION == "proximal_step_")
        operations.proximal_step(total, p0, p1, p2, p3, at, mask, coefficient)
    return total
