r"""Squared per-sample gradients of convolutions, on tensor cores.

.. math::
    F_{ock} \mathrel{+}= \sum_n \Bigl(\sum_p g_{nop}\, a_{n,c,\,p s + k d - m}\Bigr)^2

with stride s, dilation d, padding m, one such formula for each group of channels. A program owns a
tile of outputs o and columns (c, k). It goes through positions p of one sample after the other,
gathers what of the input meets them while it loads, and squares and adds at each sample's end:
neither patches nor per-sample gradients are ever in memory.

Floor, for N samples of P positions, O rows and J = I / groups * kernel columns: 2 N P O J
operations (tf32x3: three times as many); 4 O J bytes read and written, and the operands at least
once. A tile of BO x BJ reads N P (BO + BJ) operands, the total of which is N P O J (1/BO + 1/BJ),
nearly all out of the L2 cache, where all tiles of a share read the same samples at the same time.
"""

import triton
import triton.language as tl

from ewc_fast._triton.blocks import next_block


# Neither 1 nor a multiple of 16 is worth another compilation for these.
@triton.jit(
    do_not_specialize=[
        "samples",
        "out_y",
        "out_x",
        "in_y",
        "in_x",
        "share_samples",
        "share_steps",
        "numel",
        "all_rows",
    ]
)
def squared_convolution_kernel(
    grads,  # (N, O, z, y, x)
    inputs,  # (N, I, z, y, x)
    out,  # (shares, O, channels, kernel), or the total
    bias_out,  # (shares, O), or the bias's total
    samples,
    rows,  # outputs of a group
    channels,  # inputs of a group
    out_z,
    out_y,
    out_x,
    in_z,
    in_y,
    in_x,
    g_n,
    g_c,
    g_z,
    g_y,
    g_x,
    a_n,
    a_c,
    a_z,
    a_y,
    a_x,
    share_samples,
    share_parts,
    share_steps,
    numel,  # of the total
    all_rows,
    KERNEL_Z: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Z: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Z: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Z: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_Z: tl.constexpr,  # positions taken at once, powers of two
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    ONE_ELEMENT: tl.constexpr,  # a tile's columns are channels of one kernel element
    SQUARES: tl.constexpr,  # shares are sums of squares, not parts of a sample's sum
    ADD: tl.constexpr,  # to what is there
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter has no bfloat16 products
    WIDE: tl.constexpr,  # a sample spans 2^31 elements
):
    """F[o, c, k] += sum_n (sum_p g[n, o, p] a[n, c, p stride + k dilation - padding])^2."""
    KERNEL: tl.constexpr = KERNEL_Z * KERNEL_Y * KERNEL_X
    POSITIONS: tl.constexpr = BLOCK_Z * BLOCK_Y * BLOCK_X
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    SUM: tl.constexpr = out.dtype.element_ty

    # Row tiles first: programs that run together gather the same inputs.
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    if ONE_ELEMENT:
        channel_tiles = tl.cdiv(channels, BLOCK_COLUMNS)
        column_tiles = channel_tiles * KERNEL
    else:
        column_tiles = tl.cdiv(channels * KERNEL, BLOCK_COLUMNS)
    tile = tl.program_id(0)
    row_tile = tile % row_tiles
    column_tile = tile // row_tiles % column_tiles
    group = tile // row_tiles // column_tiles

    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    is_row = row < rows
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if ONE_ELEMENT:  # what depends on the element and the position alone is then one column
        channel = column_tile % channel_tiles * BLOCK_COLUMNS + lane
        element = tl.full([1, 1], 0, tl.int32) + column_tile // channel_tiles
    else:
        channel = (column_tile * BLOCK_COLUMNS + lane) // KERNEL
        element = (column_tile * BLOCK_COLUMNS + lane) % KERNEL
    is_column = channel < channels
    shift_z = element // (KERNEL_Y * KERNEL_X) * DILATION_Z - PAD_Z
    shift_y = element // KERNEL_X % KERNEL_Y * DILATION_Y - PAD_Y
    shift_x = element % KERNEL_X * DILATION_X - PAD_X
    row_offset = (group * rows + row).to(OFFSET) * g_c
    column_offset = (group * channels + channel).to(OFFSET) * a_c
    column_offset += shift_z.to(OFFSET) * a_z + shift_y.to(OFFSET) * a_y + shift_x.to(OFFSET) * a_x

    # A share: all steps of some samples, or some steps of one.
    share = tl.program_id(1)
    tiles_y, tiles_x = tl.cdiv(out_y, BLOCK_Y), tl.cdiv(out_x, BLOCK_X)
    tiles_z = tl.cdiv(out_z, BLOCK_Z)
    sample = tl.cast(share // share_parts * share_samples, tl.int64)
    first = share % share_parts * share_steps
    tile_x = first % tiles_x
    tile_y = first // tiles_x % tiles_y
    tile_z = first // tiles_x // tiles_y
    steps = tl.minimum(share_steps, tiles_z * tiles_y * tiles_x - first)
    steps *= tl.minimum(share_samples, samples - tl.cast(sample, tl.int32))

    at = tl.arange(0, POSITIONS)[:, None]
    at_x = at % BLOCK_X
    at_y = at // BLOCK_X % BLOCK_Y
    at_z = at // (BLOCK_X * BLOCK_Y)

    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
    takes_bias = column_tile == 0
    bias_sums = tl.zeros([BLOCK_ROWS], SUM)
    bias_squares = tl.zeros([BLOCK_ROWS], SUM)
    for _ in range(steps):
        z = tile_z * BLOCK_Z + at_z
        y = tile_y * BLOCK_Y + at_y
        x = tile_x * BLOCK_X + at_x
        is_position = (z < out_z) & (y < out_y) & (x < out_x)
        g_place = z.to(OFFSET) * g_z + y.to(OFFSET) * g_y + x.to(OFFSET) * g_x
        g = tl.load(
            grads + sample * g_n + (g_place + row_offset), mask=is_position & is_row, other=0.0
        )
        z, y, x = z * STRIDE_Z, y * STRIDE_Y, x * STRIDE_X
        a_place = z.to(OFFSET) * a_z + y.to(OFFSET) * a_y + x.to(OFFSET) * a_x
        # Without padding all that positions meet is inside.
        inside = is_position
        if PAD_Z > 0:
            inside = inside & (z + shift_z >= 0) & (z + shift_z < in_z)
        if PAD_Y > 0:
            inside = inside & (y + shift_y >= 0) & (y + shift_y < in_y)
        if PAD_X > 0:
            inside = inside & (x + shift_x >= 0) & (x + shift_x < in_x)
        a = tl.load(
            inputs + sample * a_n + (a_place + column_offset), mask=inside & is_column, other=0.0
        )
        if UPCAST:
            g, a = g.to(tl.float32), a.to(tl.float32)
        sums = tl.dot(tl.trans(g), a, sums, input_precision=PRECISION, out_dtype=SUM)
        if WITH_BIAS:  # noqa: SIM102 (a constant, and no constant)
            if takes_bias:
                bias_sums += tl.sum(g.to(SUM), 0)

        tile_z, tile_y, tile_x = next_block(tile_z, tile_y, tile_x, tiles_y, tiles_x)
        if SQUARES:
            ends_sample = tile_z == tiles_z
            tile_z = tl.where(ends_sample, 0, tile_z)
            sample += ends_sample.to(tl.int64)
            if ends_sample:
                squares += sums * sums
                sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], SUM)
                if WITH_BIAS:
                    bias_squares += bias_sums * bias_sums
                    bias_sums = tl.zeros([BLOCK_ROWS], SUM)
    if not SQUARES:
        squares, bias_squares = sums, bias_sums

    out_row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = (group * rows + out_row[:, None]).to(tl.int64) * channels + channel
    place = out + tl.cast(share, tl.int64) * numel + place * KERNEL + element
    is_out = (out_row[:, None] < rows) & is_column
    if ADD:
        squares += tl.load(place, mask=is_out, other=0.0)
    tl.store(place, squares, mask=is_out)
    if WITH_BIAS:
        bias_place = bias_out + tl.cast(share, tl.int64) * all_rows + group * rows + out_row
        is_bias = (out_row < rows) & takes_bias
        if ADD:
            bias_squares += tl.load(bias_place, mask=is_bias, other=0.0)
        tl.store(bias_place, bias_squares, mask=is_bias)
