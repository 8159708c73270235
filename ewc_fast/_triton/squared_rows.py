r"""Squared per-sample gradients of a table's rows, which samples read by index: embeddings.

.. math:: F_{vd} \mathrel{+}= \sum_n \Bigl(\sum_{t :\, i_{nt} = v} g_{ntd}\Bigr)^2

The entries (n, t) are sorted by row, then by sample; sorting keeps the order of t. What one sample
gives to a row then is a *run* of neighbours, and what all samples give is a run of runs. A program
walks along a *stretch*: the entries of one row, but never across a multiple of ``STRETCH``, so that
a row which nearly every position reads (padding, the most frequent token) is shared out among many
programs. It adds up each run and squares it where it ends. A run that goes on in the next stretch
cannot be squared yet: stretches cut at a multiple of STRETCH leave three vectors each, the sum of
their first run, the squares of those between, the sum of their last one, and a second kernel
stitches them together. All in a fixed order, without atomics.

Floor, for M entries of D numbers on R rows: M D numbers read, 8 R D bytes of the table read and
written, the sort of M keys besides. The cut stretches add 24 M D / STRETCH bytes, at most.

118 registers of a thread on sm_90, 38 of the stitching kernel, no spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ewc_fast._triton.device import current

_DENSE = torch.contiguous_format

STRETCH = 256
"""Entries that one program adds up: some 32 waits for memory, eight entries at a time."""

MOST_COLUMNS = 1024
"""Of a program: eight in each of 128 threads."""


@triton.jit(do_not_specialize=["entries", "samples", "positions", "rows", "skipped_row"])
def squared_rows_kernel(
    keys,  # (M), ascending: row * samples + sample
    order,  # (M): which entry, n * positions + t
    values,  # (N, T, D)
    total,  # (rows, D)
    cut,  # (stretches, 2, 3, D): of those that go on from before; that only go on behind
    cut_kinds,  # (stretches, 2): 1 for those of one run, plus 2 for those that go on behind
    entries,
    samples,
    positions,
    rows,
    columns,
    values_n,
    values_t,
    values_d,
    skipped_row,
    STRETCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add up and square the runs of the stretch that begins at this program's entry, if any."""
    SUM: tl.constexpr = total.dtype.element_ty
    start = tl.cast(tl.program_id(0), tl.int64)
    key = tl.load(keys + start)
    before = tl.load(keys + start - 1, mask=start > 0, other=-1)
    row = key.to(tl.int64) // samples
    from_before = (start > 0) & (before // samples == row)
    begins = (start % STRETCH == 0) | (from_before == 0)
    if begins & (row < rows) & (row != skipped_row):
        # Where the stretch must end, and how many of the entries up to there are this row's.
        end = tl.minimum((start // STRETCH + 1) * STRETCH, entries)
        lanes = start + tl.arange(0, STRETCH)
        ahead = tl.load(keys + lanes, mask=lanes < end, other=-1)
        count = tl.sum(((lanes < end) & (ahead // samples == row)).to(tl.int32), 0)
        stop = start + count
        after = tl.load(keys + stop, mask=stop < entries, other=-1)
        goes_on = (stop == end) & (stop < entries) & (after // samples == row)

        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < columns
        column_offset = tl.cast(column, tl.int64) * values_d
        run = tl.zeros([BLOCK_COLUMNS], SUM)
        first_run = tl.zeros([BLOCK_COLUMNS], SUM)
        squares = tl.zeros([BLOCK_COLUMNS], SUM)
        current, is_first = key, from_before
        for step in range(tl.cdiv(count, AT_ONCE)):
            for lane in tl.static_range(AT_ONCE):  # no entry waits for the one before it
                at = start + step * AT_ONCE + lane
                there = at < stop
                its_key = tl.load(keys + at, mask=there, other=-1)
                entry = tl.load(order + at, mask=there, other=0)
                place = entry // positions * values_n + entry % positions * values_t
                value = tl.load(
                    values + place + column_offset, mask=there & is_column, other=0.0
                ).to(SUM)
                ends_run = there & (its_key != current)
                first_run = tl.where(ends_run & is_first, run, first_run)
                squares += tl.where(ends_run & (is_first == 0), run * run, 0.0)
                is_first = is_first & (ends_run == 0)
                run = tl.where(ends_run, 0.0, run) + value
                current = tl.where(there, its_key, current)
        if from_before | goes_on:
            slot = start // STRETCH * 2 + tl.where(from_before, 0, 1)
            places = cut + slot * 3 * columns + column
            tl.store(places, tl.where(is_first, run, first_run), mask=is_column)
            tl.store(places + columns, squares, mask=is_column)
            tl.store(places + 2 * columns, run, mask=is_column)
            tl.store(cut_kinds + slot, is_first.to(tl.int32) + 2 * goes_on.to(tl.int32))
        else:
            places = total + row * columns + column
            squares += run * run + tl.load(places, mask=is_column, other=0.0)
            tl.store(places, squares, mask=is_column)


@triton.jit(do_not_specialize=["samples"])
def stitch_rows_kernel(
    keys,
    total,
    cut,
    cut_kinds,
    samples,
    columns,
    STRETCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Put the stretches of a row together that were cut, beginning with the first of them."""
    stretch = tl.cast(tl.program_id(0), tl.int64)
    if tl.load(cut_kinds + stretch * 2 + 1) & 2 != 0:
        behind = stretch + 1  # the row's last stretch
        while tl.load(cut_kinds + behind * 2) & 2 != 0:
            behind += 1
        row = tl.load(keys + stretch * STRETCH + STRETCH).to(tl.int64) // samples
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < columns
        places = cut + (stretch * 2 + 1) * 3 * columns + column
        squares = tl.load(places + columns, mask=is_column, other=0.0)
        run = tl.load(places + 2 * columns, mask=is_column, other=0.0)
        for at in range(stretch + 1, behind + 1):
            joins = tl.load(keys + at * STRETCH) == tl.load(keys + at * STRETCH - 1)
            is_one_run = (tl.load(cut_kinds + at * 2) & 1) != 0
            places = cut + at * 2 * 3 * columns + column
            squares += tl.where(joins, 0.0, run * run)
            run = tl.where(joins, run, 0.0) + tl.load(places, mask=is_column, other=0.0)
            inner = tl.load(places + columns, mask=is_column, other=0.0)
            last = tl.load(places + 2 * columns, mask=is_column, other=0.0)
            squares += tl.where(is_one_run, 0.0, run * run + inner)
            run = tl.where(is_one_run, run, last)
        places = total + row * columns + column
        squares += run * run + tl.load(places, mask=is_column, other=0.0)
        tl.store(places, squares, mask=is_column)


def accumulate_squared_rows_(
    total: Tensor, indices: Tensor, values: Tensor, skipped_row: int, stretch: int = STRETCH
) -> None:
    """Add to ``total`` (V, *row), given indices (N, T) and values (N, T, D); any strides.

    Entries of ``skipped_row`` are passed over. ``stretch`` is for tests.
    """
    samples, positions, columns = values.shape
    rows, entries = total.shape[0], samples * positions
    if entries == 0 or total.numel() == 0:
        return
    sample = torch.arange(samples, device=indices.device).unsqueeze(1)
    table = total if total.is_contiguous() else torch.zeros_like(total, memory_format=_DENSE)
    keys = (indices * samples + sample).flatten()
    if rows * samples < 2**31:  # half the work for the sort
        keys = keys.int()
    keys, order = keys.sort(stable=True)
    block = min(triton.next_power_of_2(columns), MOST_COLUMNS)
    blocks, stretches = triton.cdiv(columns, block), triton.cdiv(entries, stretch)
    cut = total.new_empty(stretches, 2, 3, columns)
    cut_kinds = keys.new_zeros(stretches, 2, dtype=torch.int32)
    with current(values.device):
        squared_rows_kernel[entries, blocks](
            keys,
            order,
            values,
            table,
            cut,
            cut_kinds,
            entries,
            samples,
            positions,
            rows,
            columns,
            *values.stride(),
            skipped_row,
            STRETCH=stretch,
            BLOCK_COLUMNS=block,
            AT_ONCE=min(8, stretch),
        )
    if stretches > 1:
        with current(values.device):
            stitch_rows_kernel[stretches - 1, blocks](
                keys,
                table,
                cut,
                cut_kinds,
                samples,
                columns,
                STRETCH=stretch,
                BLOCK_COLUMNS=block,
            )
    if table is not total:
        total.add_(table)
