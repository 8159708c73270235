r"""Squared per-sample gradients of depthwise convolutions: one input channel for each group.

.. math::
    F_{ok} \mathrel{+}= \sum_n \Bigl(\sum_p g_{nop}\, a_{n,c(o),\,p s + k d - m}\Bigr)^2

There is no product of matrices in it, so it runs on the ordinary units: a program owns some outputs
and some kernel elements, and keeps a sum for each of them and each position of its block.

Floor, for N samples, O outputs, P positions and K kernel elements: 2 N O P K operations; both
operands read once. Programs take ``ELEMENTS`` kernel elements each, so that the gradients are read
K / ELEMENTS times, all but the first out of the caches; inputs met by neighbouring elements are
neighbours in memory and hit the L1 cache.

72 registers of a thread (64 with channels last) on sm_90, no spills.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from ewc_fast._triton.blocks import Geometry, blocks_of, needs_wide_offsets, next_block
from ewc_fast._triton.device import current, programs_for
from ewc_fast._triton.shares import add_shares_, rooms_for, share_out

ELEMENTS = 4
"""More would leave more of a 3 x 3 kernel's blocks empty, fewer read the gradients more often."""

LANES = 512
"""Outputs times positions at once; times ELEMENTS over 128 threads, sums in 16 registers."""


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
    ]
)
def squared_depthwise_kernel(
    grads,  # (N, O, z, y, x)
    inputs,  # (N, I, z, y, x)
    out,  # (shares, O, kernel), or the total
    bias_out,  # (shares, O), or the bias's total
    samples,
    rows,
    rows_a_channel,
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
    BLOCK_ELEMENTS: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # neighbouring threads take channels, not positions
    SQUARES: tl.constexpr,  # shares are sums of squares, not parts of a sample's sum
    ADD: tl.constexpr,  # to what is there
    WITH_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # a sample spans 2^31 elements
):
    """F[o, k] += sum_n (sum_p g[n, o, p] a[n, c(o), p stride + k dilation - padding])^2."""
    KERNEL: tl.constexpr = KERNEL_Z * KERNEL_Y * KERNEL_X
    POSITIONS: tl.constexpr = BLOCK_Z * BLOCK_Y * BLOCK_X
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    SUM: tl.constexpr = out.dtype.element_ty

    # Elements first: programs that run together read the same gradients.
    element_tiles = tl.cdiv(KERNEL, BLOCK_ELEMENTS)
    tile = tl.program_id(0)
    element = tile % element_tiles * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    row = tile // element_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = tl.arange(0, POSITIONS)
    ROW_AXIS: tl.constexpr = 2 if CHANNELS_LAST else 1
    POSITION_AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    k = tl.expand_dims(tl.expand_dims(element, 1), 2)
    o = tl.expand_dims(tl.expand_dims(row, 0), POSITION_AXIS)
    at = tl.expand_dims(tl.expand_dims(at, 0), ROW_AXIS)
    at_x = at % BLOCK_X
    at_y = at // BLOCK_X % BLOCK_Y
    at_z = at // (BLOCK_X * BLOCK_Y)
    shift_z = k // (KERNEL_Y * KERNEL_X) * DILATION_Z - PAD_Z
    shift_y = k // KERNEL_X % KERNEL_Y * DILATION_Y - PAD_Y
    shift_x = k % KERNEL_X * DILATION_X - PAD_X
    is_met = (o < rows) & (k < KERNEL)
    row_offset = o.to(OFFSET) * g_c
    met_offset = (o // rows_a_channel).to(OFFSET) * a_c
    met_offset += shift_z.to(OFFSET) * a_z + shift_y.to(OFFSET) * a_y + shift_x.to(OFFSET) * a_x

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

    if CHANNELS_LAST:
        sums = tl.zeros([BLOCK_ELEMENTS, POSITIONS, BLOCK_ROWS], SUM)
        bias_sums = tl.zeros([1, POSITIONS, BLOCK_ROWS], SUM)
    else:
        sums = tl.zeros([BLOCK_ELEMENTS, BLOCK_ROWS, POSITIONS], SUM)
        bias_sums = tl.zeros([1, BLOCK_ROWS, POSITIONS], SUM)
    squares = tl.zeros([BLOCK_ELEMENTS, BLOCK_ROWS], SUM)
    bias_squares = tl.zeros([1, BLOCK_ROWS], SUM)
    for _ in range(steps):
        z = tile_z * BLOCK_Z + at_z
        y = tile_y * BLOCK_Y + at_y
        x = tile_x * BLOCK_X + at_x
        is_position = (z < out_z) & (y < out_y) & (x < out_x)
        g_place = z.to(OFFSET) * g_z + y.to(OFFSET) * g_y + x.to(OFFSET) * g_x
        g = tl.load(
            grads + sample * g_n + (g_place + row_offset), mask=is_position & (o < rows), other=0.0
        ).to(SUM)
        z, y, x = z * STRIDE_Z, y * STRIDE_Y, x * STRIDE_X
        a_place = z.to(OFFSET) * a_z + y.to(OFFSET) * a_y + x.to(OFFSET) * a_x
        inside = is_position & is_met
        if PAD_Z > 0:
            inside = inside & (z + shift_z >= 0) & (z + shift_z < in_z)
        if PAD_Y > 0:
            inside = inside & (y + shift_y >= 0) & (y + shift_y < in_y)
        if PAD_X > 0:
            inside = inside & (x + shift_x >= 0) & (x + shift_x < in_x)
        a = tl.load(inputs + sample * a_n + (a_place + met_offset), mask=inside, other=0.0)
        sums += g * a.to(SUM)
        if WITH_BIAS:
            bias_sums += g
        tile_z, tile_y, tile_x = next_block(tile_z, tile_y, tile_x, tiles_y, tiles_x)
        if SQUARES:
            ends_sample = tile_z == tiles_z
            tile_z = tl.where(ends_sample, 0, tile_z)
            sample += ends_sample.to(tl.int64)
            if ends_sample:
                of_sample = tl.sum(sums, POSITION_AXIS)
                squares += of_sample * of_sample
                sums = tl.zeros_like(sums)
                if WITH_BIAS:
                    of_sample = tl.sum(bias_sums, POSITION_AXIS)
                    bias_squares += of_sample * of_sample
                    bias_sums = tl.zeros_like(bias_sums)
    if not SQUARES:
        squares, bias_squares = tl.sum(sums, POSITION_AXIS), tl.sum(bias_sums, POSITION_AXIS)

    place = (tl.cast(share, tl.int64) * rows + row[None, :]) * KERNEL + element[:, None]
    is_out = (row[None, :] < rows) & (element[:, None] < KERNEL)
    if ADD:
        squares += tl.load(out + place, mask=is_out, other=0.0)
    tl.store(out + place, squares, mask=is_out)
    if WITH_BIAS:
        bias_place = bias_out + (tl.cast(share, tl.int64) * rows + row[None, :])
        is_bias = (row[None, :] < rows) & (tile % element_tiles == 0)
        if ADD:
            bias_squares += tl.load(bias_place, mask=is_bias, other=0.0)
        tl.store(bias_place, bias_squares, mask=is_bias)


def accumulate_squared_depthwise_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    geometry: Geometry,
    lanes: int = LANES,
    programs: int | None = None,
) -> None:
    """Add to ``total`` (O, 1, z, y, x), contiguous, of operands (N, C, z, y, x) of any strides.

    ``lanes`` and ``programs`` are for tests: other numbers give the same up to rounding.
    """
    if total.numel() == 0 or grads.numel() == 0:
        return
    samples, rows, *out_size = grads.shape
    kernel = prod(total.shape[2:])
    channels_last = inputs.stride(1) == 1 and inputs.shape[1] > 1
    positions = min(triton.next_power_of_2(prod(out_size)), lanes // 64 if channels_last else 128)
    positions = max(1, min(positions, lanes))
    block_rows = min(triton.next_power_of_2(rows), lanes // positions)
    block = blocks_of(out_size, positions)
    steps = prod(triton.cdiv(size, b) for size, b in zip(out_size, block, strict=True))
    elements = min(ELEMENTS, triton.next_power_of_2(kernel))
    tiles = triton.cdiv(kernel, elements) * triton.cdiv(rows, block_rows)
    shares = share_out(samples, steps, tiles, programs or programs_for(total.device))
    direct, rooms = rooms_for(shares, (total, bias_total))
    with current(grads.device):
        squared_depthwise_kernel[tiles, shares.count](
            grads,
            inputs,
            *rooms,
            samples,
            rows,
            rows // inputs.shape[1],
            *out_size,
            *inputs.shape[2:],
            *grads.stride(),
            *inputs.stride(),
            shares.samples,
            shares.parts,
            shares.steps,
            *total.shape[2:],
            *geometry.stride,
            *geometry.padding,
            *geometry.dilation,
            block_rows,
            elements,
            *block,
            CHANNELS_LAST=channels_last,
            SQUARES=shares.are_squares,
            ADD=direct,
            WITH_BIAS=bias_total is not None,
            WIDE=needs_wide_offsets(grads, inputs),
        )
    add_shares_((total, bias_total), rooms, shares)
