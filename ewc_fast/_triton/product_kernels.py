r"""The squared product's kernels.

.. math:: F_{oi} \mathrel{+}= \sum_n \Bigl(\sum_t g_{nto}\, a_{nti}\Bigr)^2

A program owns a tile of F and a share of the samples. It walks over their positions in steps, in
one loop without a gap between samples: tensor cores add a step's products to the sums over t, in
float32; at a sample's last step the sums are squared, added to the squares and set to 0. Both stay
in registers: [N, O, I] is never stored, and F is read and written once. The squaring stands behind
a branch, so that the other steps don't wait for the tensor cores: on sm_90 one step's products are
still under way while the next one's are issued.

Operations: 2 N T O I on tensor cores (tf32x3: three times as many), 3 N O I on the others.
Bytes: N T O I (1 / COLUMNS + 1 / ROWS) elements, nearly all from L2, since programs that run at a
time have neighbouring tiles; from memory at least N T (O + I) elements and 8 O I.
At O = I = 4096, T = 2048, N = 8 in bfloat16: 0.55 Pflop, 0.56 ms at an H200's 989 Tflop/s, against
0.4 GB, 0.08 ms at its 4.8 TB/s: bound by tensor cores. Shared memory is close behind: of a tile of
128 x 128, a step of 64 positions takes 512 cycles of tensor cores, and moves 80 KB in and out of
shared memory, 640 cycles at 128 bytes each. At T = 1, a byte of F allows N / 4 flop where the chip
has 206: memory bounds it up to N = 800, with tf32x3 up to 140.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "positions", "rows", "columns", "steps", "chunks", "group_steps", "out_row",
        "grads_sample", "inputs_sample",
    ]
)  # fmt: skip
def squared_product_kernel(
    out,  # F, or room for one [rows, columns] from each split
    bias_out,  # the same of the bias, or None
    grads,  # [samples, positions, rows]
    inputs,  # [samples, positions, columns]
    step_rows,  # ragged: each step's first row, and how many the sample has from there; or None
    split_steps,  # ragged: each split's first step, and the end
    positions,
    rows,
    columns,
    steps,  # of one split
    chunks,  # splits that share a group of steps: one sample's, or all
    group_steps,
    out_split,
    out_row,
    bias_row,
    grads_sample,
    grads_position,
    grads_row,
    inputs_sample,
    inputs_position,
    inputs_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to float32 before anything is done with them
    SQUARED_OPERANDS: tl.constexpr,  # sum_n g^2 a^2: samples of one position each, as one of many
    SQUARED_SUMS: tl.constexpr,  # at each sample's end; otherwise a split leaves one sum
    ADD: tl.constexpr,
    GRADS_ALONG: tl.constexpr,  # the axis that vectors lie on: 0 positions, 1 features
    GRADS_VECTOR: tl.constexpr,
    INPUTS_ALONG: tl.constexpr,
    INPUTS_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
):
    """Add to one tile of F, or of the bias's, what one split of the steps gives.

    Strides are divided by the vector of what they belong to, but for that of the axis the vectors
    lie on, which is 1 where a vector is more than one element: multiplied here, they show the
    compiler what addresses are multiples of.
    """
    SUM: tl.constexpr = out.dtype.element_ty
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program, split = tl.program_id(0), tl.program_id(1)
    if step_rows is not None:
        begin, end = tl.load(split_steps + split), tl.load(split_steps + split + 1)
    else:
        first_of_group = split // chunks * group_steps
        begin = first_of_group + split % chunks * steps
        end = tl.minimum(begin + steps, first_of_group + group_steps)
    place = split.to(tl.int64) * out_split
    if program < row_tiles * column_tiles:
        # Bands of GROUP tiles, column by column: programs that run at a time share operands.
        band = GROUP * column_tiles
        above = program // band * GROUP
        high = tl.minimum(row_tiles - above, GROUP)
        row_tile = above + program % band % high
        column_tile = program % band // high
        grads_tile = _tile(
            row_tile, rows, grads_row, grads_position, POSITIONS, ROWS, GRADS_ALONG, GRADS_VECTOR
        )
        inputs_tile = _tile(
            column_tile, columns, inputs_column, inputs_position,
            POSITIONS, COLUMNS, INPUTS_ALONG, INPUTS_VECTOR,
        )  # fmt: skip
        sums = tl.zeros((ROWS, COLUMNS), SUM)
        squares = tl.zeros((ROWS, COLUMNS), SUM)
        for step in range(begin, end):
            sample, first, left = _place(step, step_rows, positions, POSITIONS)
            g = _load(
                grads, grads_tile, sample, first, left, grads_sample, grads_position,
                POSITIONS, GRADS_ALONG, GRADS_VECTOR, WIDEN, SQUARED_OPERANDS,
            )  # fmt: skip
            a = _load(
                inputs, inputs_tile, sample, first, left, inputs_sample, inputs_position,
                POSITIONS, INPUTS_ALONG, INPUTS_VECTOR, WIDEN, SQUARED_OPERANDS,
            )  # fmt: skip
            sums = tl.dot(tl.trans(g), a, sums, input_precision=PRECISION, out_dtype=SUM)
            if SQUARED_SUMS:  # noqa: SIM102 (a constant, and a value of the loop)
                if left <= POSITIONS:
                    squares += sums * sums
                    sums = tl.zeros((ROWS, COLUMNS), SUM)
        added = squares if SQUARED_SUMS else sums
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        at = out + place + row.to(tl.int64)[:, None] * out_row * OUT_VECTOR + column[None, :]
        inside = tl.max_constancy(column < columns, OUT_VECTOR)[None, :] & (row < rows)[:, None]
        if ADD:
            added += tl.load(at, inside)
        tl.store(at, added, inside)
    elif bias_out is not None:
        # In programs of its own, which read grads while those above hold them in L2: the sum over t
        # would cost the loop above its registers.
        bias_tile = program - row_tiles * column_tiles
        bias_grads_tile = _tile(
            bias_tile, rows, grads_row, grads_position, POSITIONS, ROWS, GRADS_ALONG, GRADS_VECTOR
        )
        bias_sums = tl.zeros((POSITIONS, ROWS), SUM)
        bias = tl.zeros((ROWS,), SUM)
        for step in range(begin, end):
            sample, first, left = _place(step, step_rows, positions, POSITIONS)
            g = _load(
                grads, bias_grads_tile, sample, first, left, grads_sample, grads_position,
                POSITIONS, GRADS_ALONG, GRADS_VECTOR, WIDEN, SQUARED_OPERANDS,
            )  # fmt: skip
            bias_sums += g.to(SUM)
            if SQUARED_SUMS:  # noqa: SIM102 (a constant, and a value of the loop)
                if left <= POSITIONS:
                    sums_of_sample = tl.sum(bias_sums, 0)
                    bias += sums_of_sample * sums_of_sample
                    bias_sums = tl.zeros((POSITIONS, ROWS), SUM)
        if not SQUARED_SUMS:
            bias = tl.sum(bias_sums, 0)
        bias_rows = bias_tile * ROWS + tl.arange(0, ROWS)
        bias_at = bias_out + place + bias_rows.to(tl.int64) * bias_row
        if ADD:
            bias += tl.load(bias_at, bias_rows < rows)
        tl.store(bias_at, bias, bias_rows < rows)


@triton.jit
def _place(step, step_rows, positions, POSITIONS: tl.constexpr):
    """Return a step's sample, its first position, and how many the sample has from there on."""
    if step_rows is not None:
        return (
            tl.cast(0, tl.int64),
            tl.load(step_rows + 2 * step),
            tl.load(step_rows + 2 * step + 1).to(tl.int32),
        )
    sample_steps = tl.cdiv(positions, POSITIONS)
    first = step % sample_steps * POSITIONS
    return tl.cast(step // sample_steps, tl.int64), tl.cast(first, tl.int64), positions - first


@triton.jit
def _tile(
    tile, features, feature_stride, position_stride,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr, ALONG: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the offsets [POSITIONS, FEATURES] of a tile's elements, from position 0.

    Features that are not there take the place of the first: what comes of them is never written.
    """
    position = tl.arange(0, POSITIONS).to(tl.int64)[:, None]
    feature = tile * FEATURES + tl.arange(0, FEATURES)
    feature = tl.where(feature < features, feature, 0)
    if ALONG == 1:
        feature = tl.max_contiguous(tl.multiple_of(feature, VECTOR), VECTOR)
    feature = feature.to(tl.int64)[None, :]
    if VECTOR == 1:
        return position * position_stride + feature * feature_stride
    elif ALONG == 0:
        return position + feature * feature_stride * VECTOR
    else:
        return position * position_stride * VECTOR + feature


@triton.jit
def _load(
    operand, tile, sample, first, left, sample_stride, position_stride,
    POSITIONS: tl.constexpr, ALONG: tl.constexpr, VECTOR: tl.constexpr,
    WIDEN: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Load a sample's positions from ``first`` on; behind its end are zeros."""
    start = operand + sample * sample_stride * VECTOR
    start += first * position_stride * (1 if ALONG == 0 else VECTOR)
    inside = tl.arange(0, POSITIONS) < left
    if ALONG == 0:
        inside = tl.max_constancy(inside, VECTOR)
    loaded = tl.load(start + tile, inside[:, None], other=0.0)
    if WIDEN:
        loaded = loaded.to(tl.float32)
    return loaded * loaded if SQUARED else loaded


@triton.jit(do_not_specialize=["groups", "chunks", "rows", "columns"])
def add_splits_kernel(
    total,
    bias_total,  # or None
    partials,  # of each split: [rows, columns] without gaps, then the bias's [rows]
    groups,
    chunks,
    split_length,
    rows,
    columns,
    total_row,
    bias_row,
    BLOCK: tl.constexpr,
    SQUARED_SUMS: tl.constexpr,
):
    """Add up what splits left, always in the same order; square the sum of each group if asked.

    Reads 4 O I bytes a split, mostly from L2, where they have just been written; and F.
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    added = tl.zeros((BLOCK,), total.dtype.element_ty)
    for group in range(groups):
        sums = tl.zeros((BLOCK,), total.dtype.element_ty)
        for chunk in range(chunks):
            split = tl.cast(group * chunks + chunk, tl.int64)
            sums += tl.load(
                partials + split * split_length + entry, entry < split_length, other=0.0
            )
        added += sums * sums if SQUARED_SUMS else sums
    weights = tl.cast(rows, tl.int64) * columns
    at = total + (entry // columns * total_row + entry % columns)
    tl.store(at, tl.load(at, entry < weights) + added, entry < weights)
    if bias_total is not None:
        row = entry - weights
        inside = (row >= 0) & (row < rows)
        bias_at = bias_total + row * bias_row
        tl.store(bias_at, tl.load(bias_at, inside) + added, inside)
