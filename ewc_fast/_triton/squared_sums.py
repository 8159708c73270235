r"""Squared sums over positions: the per-sample gradients of scales and shifts, from one reading.

.. math::
    F_d \mathrel{+}= \sum_n \Bigl(\sum_t g_{ntd}\, x_{ntd}\Bigr)^2, \qquad
    F^{\text{bias}}_d \mathrel{+}= \sum_n \Bigl(\sum_t g_{ntd}\Bigr)^2

where x may be a normalised value :math:`(x - m)\, r` with means m and reciprocal deviations r of a
position (layer norm), a sample's channel (group norm) or a channel (batch norm): it is recomputed
while loading. Features may lie last, or in the middle (N, C, positions) as channels do: strides
say so, and neighbouring threads take what are neighbours in memory.

Floor, for N samples of T positions and D features: N T D numbers of g, as many of x, read once;
everything else is a T-th or a D-th of that. Sums are kept for every position of a block and added
up at each sample's end.

116 registers of a thread (72 with features in the middle) on sm_90, no spills.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ewc_fast._triton.device import current, programs_for
from ewc_fast._triton.shares import add_shares_, rooms_for, share_out

LANES = 2048
"""Positions times features at once: 16 numbers of each operand in each of 128 threads."""

RUN = 64
"""Neighbours in memory that a block takes: 128 bytes, a cache line, of 16-bit numbers."""


# Neither 1 nor a multiple of 16 is worth another compilation for these.
@triton.jit(do_not_specialize=["samples", "share_samples", "share_steps"])
def squared_sums_kernel(
    grads,  # (N, T, D), like all operands
    inputs,
    means,
    scales,
    out,  # (shares, D), or the total
    bias_out,  # (shares, D), or the bias's total
    samples,
    positions,
    features,
    g_n,
    g_t,
    g_d,
    x_n,
    x_t,
    x_d,
    m_n,
    m_t,
    m_d,
    r_n,
    r_t,
    r_d,
    share_samples,
    share_parts,
    share_steps,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    OF_POSITIONS: tl.constexpr,  # means and scales are one for each position, else for each feature
    SQUARES: tl.constexpr,  # shares are sums of squares, not parts of a sample's sum
    ADD: tl.constexpr,  # to what is there
):
    """F[d] += sum_n (sum_t g[n, t, d] (x[n, t, d] - m) r)^2; without x, m or r: 1, 0 or 1."""
    WITH_INPUTS: tl.constexpr = inputs is not None
    WITH_BIAS: tl.constexpr = bias_out is not None
    SUM: tl.constexpr = (out if WITH_INPUTS else bias_out).dtype.element_ty
    feature = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    d = tl.cast(feature[None, :], tl.int64)
    share = tl.program_id(1)
    sample = tl.cast(share // share_parts * share_samples, tl.int64)
    first = share % share_parts * share_steps
    sample_steps = tl.cdiv(positions, BLOCK_POSITIONS)
    last = tl.minimum(first + share_steps, sample_steps)
    count = tl.minimum(share_samples, samples - tl.cast(sample, tl.int32))

    squares = tl.zeros([BLOCK_FEATURES], SUM)
    bias_squares = tl.zeros([BLOCK_FEATURES], SUM)
    for _ in range(count):
        sums = tl.zeros([BLOCK_POSITIONS, BLOCK_FEATURES], SUM)
        bias_sums = tl.zeros([BLOCK_POSITIONS, BLOCK_FEATURES], SUM)
        for step in range(first, last):
            position = step * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[:, None]
            t = tl.cast(position, tl.int64)
            mask = (position < positions) & (feature[None, :] < features)
            g = tl.load(grads + sample * g_n + (t * g_t + d * g_d), mask=mask, other=0.0).to(SUM)
            if WITH_BIAS:
                bias_sums += g
            if WITH_INPUTS:
                x = tl.load(inputs + sample * x_n + (t * x_t + d * x_d), mask=mask, other=0.0)
                x = x.to(SUM)
                if OF_POSITIONS:
                    m_place, r_place, some = t * m_t, t * r_t, position < positions
                else:
                    m_place, r_place, some = d * m_d, d * r_d, feature[None, :] < features
                if means is not None:
                    x -= tl.load(means + sample * m_n + m_place, mask=some, other=0.0).to(SUM)
                if scales is not None:
                    x *= tl.load(scales + sample * r_n + r_place, mask=some, other=0.0).to(SUM)
                sums += g * x
        of_sample = tl.sum(sums, 0)
        squares += of_sample * of_sample if SQUARES else of_sample
        of_sample = tl.sum(bias_sums, 0)
        bias_squares += of_sample * of_sample if SQUARES else of_sample
        sample += 1

    place = tl.cast(share, tl.int64) * features + feature
    is_out = feature < features
    if WITH_INPUTS:
        if ADD:
            squares += tl.load(out + place, mask=is_out, other=0.0)
        tl.store(out + place, squares, mask=is_out)
    if WITH_BIAS:
        if ADD:
            bias_squares += tl.load(bias_out + place, mask=is_out, other=0.0)
        tl.store(bias_out + place, bias_squares, mask=is_out)


def block_for(positions: int, features: int, features_are_neighbours: bool) -> tuple[int, int]:
    """Return how many positions and features a program takes at once, powers of two."""
    if features_are_neighbours:
        block = min(RUN, triton.next_power_of_2(features))
        return min(LANES // block, triton.next_power_of_2(positions)), block
    # A channel's positions are one run, mostly long: a few channels for each program.
    block = min(LANES // 2, triton.next_power_of_2(positions))
    return block, min(LANES // block, triton.next_power_of_2(features), 16)


def accumulate_squared_sums_(
    total: Tensor | None,
    bias_total: Tensor | None,
    grads: Tensor,
    inputs: Tensor | None,
    means: Tensor | None = None,
    scales: Tensor | None = None,
    programs: int | None = None,
) -> None:
    """Add to ``total`` (D), where there are inputs, and to ``bias_total`` (D), if it is wanted.

    grads, inputs (N, T, D); means and scales (N or 1, T, 1) or (N or 1, 1, D); any strides.
    ``programs`` is for tests: another number gives the same up to rounding.
    """
    if grads.numel() == 0:
        return
    if total is None:
        inputs = means = scales = None
    samples, positions, features = grads.shape
    neighbours = inputs if inputs is not None else grads
    block = block_for(positions, features, neighbours.stride(2) == 1 and features > 1)
    tiles, steps = triton.cdiv(features, block[1]), triton.cdiv(positions, block[0])
    shares = share_out(samples, steps, tiles, programs or programs_for(grads.device))
    direct, rooms = rooms_for(shares, (total, bias_total))
    of_positions = any(t is not None and t.shape[2] == 1 for t in (means, scales))
    with current(grads.device):
        squared_sums_kernel[tiles, shares.count](
            grads,
            inputs,
            means,
            scales,
            *rooms,
            samples,
            positions,
            features,
            *grads.stride(),
            *_strides(inputs),
            *_strides(means),
            *_strides(scales),
            shares.samples,
            shares.parts,
            shares.steps,
            BLOCK_POSITIONS=block[0],
            BLOCK_FEATURES=block[1],
            OF_POSITIONS=of_positions,
            SQUARES=shares.are_squares,
            ADD=direct,
        )
    add_shares_((total, bias_total), rooms, shares)


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Return the steps in each dimension, 0 where all samples share what there is."""
    if tensor is None:
        return 0, 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    n, t, d = (step if size > 1 else 0 for size, step in steps)
    return n, t, d
