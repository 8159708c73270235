"""Prepares and launches :mod:`.convolution_kernels`: tiles, shares of samples, copies that pay.

Registers of a thread of sm_80, sm_90, sm_100 (triton 3.6; nothing spills), shared memory on sm_90
and what multiplies there; tests/test_triton_fisher_compiled.py compiles and prints them:

    runs,      64 x 128 x 64, bf16    188, 182, 128    66 KB   HGMMA, LDGSTS.128
    gathered,  64 x  32 x 32, bf16    203, 156, 128     6 KB   HGMMA, LDG.U16
    gathered,  64 x  64 x 32, bf16    174, 125, 114    16 KB   HGMMA, LDG.U16
    gathered,  64 x  64 x 32, tf32x3  255, 200, 149    48 KB   HGMMA, LDGSTS of 4 bytes
    double,    32 x  64 x 16           80, 128         24 KB   DMMA

Not: 128 x 128 x 64 (184 bytes of stack); 64 x 64 x 32 gathered with 4 warps (spills on sm_80).
The choice was made by registers and instructions; no GPU has measured it yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import triton
from torch import Tensor

from ewc_fast._triton import interpreted
from ewc_fast._triton.blocks import Geometry, blocks_of, needs_wide_offsets
from ewc_fast._triton.convolution_kernels import squared_convolution_kernel
from ewc_fast._triton.device import current, programs_for
from ewc_fast._triton.precision import float32_precision
from ewc_fast._triton.shares import add_shares_, rooms_for, share_out

LEAST = 16
"""Of rows, columns and positions in a product on tensor cores; and of 16-bit numbers in a run."""

STAGES = 3
"""Of the pipeline of loads: two steps' are on their way while one is multiplied."""


@dataclass(frozen=True)
class Tile:
    """What one program has at once."""

    rows: int
    columns: int
    positions: int
    warps: int


Loads = Literal["runs", "gathered", "double"]
"""Of 16-bit channels that lie side by side, 16 bytes at a time; one by one; of float64."""

TILES: dict[Loads, Tile] = {
    "runs": Tile(64, 128, 64, warps=8),
    "gathered": Tile(64, 64, 32, warps=8),
    "double": Tile(32, 64, 16, warps=8),
}


def tile_for(loads: Loads, rows: int, channels: int, kernel: int, positions: int) -> Tile:
    """Return the tile for a group's O rows, I channels, kernel elements and positions.

    The largest that does not spill, less where there is less, but 16 of everything: so much a
    tensor core takes.
    """
    most = TILES[loads]
    columns = channels * kernel if channels < LEAST else channels
    sides = [
        min(limit, max(LEAST, triton.next_power_of_2(size)))
        for limit, size in ((most.rows, rows), (most.columns, columns), (most.positions, positions))
    ]
    warps = most.warps if sides[0] * sides[1] == most.rows * most.columns else 4
    return Tile(sides[0], sides[1], sides[2], warps)


def accumulate_squared_convolution_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    geometry: Geometry,
    groups: int,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """Add to ``total`` (O, I / groups, z, y, x), contiguous, of operands of any strides.

    ``tile`` and ``programs`` are for tests: other numbers give the same up to rounding.
    """
    if total.numel() == 0 or grads.numel() == 0:
        return
    samples, all_rows, *out_size = grads.shape
    rows, channels, kernel = all_rows // groups, total.shape[1], prod(total.shape[2:])
    dtype = torch.promote_types(grads.dtype, inputs.dtype)
    loads, grads, inputs = _readable(grads.to(dtype), inputs.to(dtype), groups, kernel)
    tile = tile or tile_for(loads, rows, channels, kernel, prod(out_size))
    row_tiles = triton.cdiv(rows, tile.rows)
    one_element = channels >= tile.columns
    column_tiles = (
        kernel * triton.cdiv(channels, tile.columns)
        if one_element
        else triton.cdiv(channels * kernel, tile.columns)
    )
    block = blocks_of(out_size, tile.positions)
    steps = prod(triton.cdiv(size, b) for size, b in zip(out_size, block, strict=True))
    tiles = row_tiles * column_tiles * groups
    shares = share_out(samples, steps, tiles, programs or programs_for(total.device))
    direct, rooms = rooms_for(shares, (total, bias_total))
    with current(grads.device):
        squared_convolution_kernel[tiles, shares.count](
            grads,
            inputs,
            *rooms,
            samples,
            rows,
            channels,
            *out_size,
            *inputs.shape[2:],
            *grads.stride(),
            *inputs.stride(),
            shares.samples,
            shares.parts,
            shares.steps,
            total.numel(),
            all_rows,
            *total.shape[2:],
            *geometry.stride,
            *geometry.padding,
            *geometry.dilation,
            tile.rows,
            tile.columns,
            *block,
            ONE_ELEMENT=one_element,
            SQUARES=shares.are_squares,
            ADD=direct,
            WITH_BIAS=bias_total is not None,
            PRECISION=float32_precision() if dtype == torch.float32 else "ieee",
            UPCAST=interpreted() and dtype == torch.bfloat16,
            WIDE=needs_wide_offsets(grads, inputs),
            num_warps=tile.warps,
            num_stages=STAGES,
        )
    add_shares_((total, bias_total), rooms, shares)


def _readable(
    grads: Tensor, inputs: Tensor, groups: int, kernel: int
) -> tuple[Loads, Tensor, Tensor]:
    """Return operands that load fast, and how they do: copied, channels last, where that pays.

    Only 16-bit channels that lie side by side are loaded 16 bytes at a time and asynchronously;
    runs of positions begin anywhere. A copy is one reading and one writing: less than the loss of
    reading inputs four times in small pieces, once for each kernel element and tile of rows.
    """
    if grads.dtype == torch.float64:
        return "double", grads, inputs
    rows, channels = grads.shape[1] // groups, inputs.shape[1] // groups
    runs = grads.dtype.itemsize == 2 and rows % LEAST == 0 and channels % LEAST == 0
    if not runs or kernel * triton.cdiv(rows, TILES["runs"].rows) < 4:
        return "gathered", grads, inputs
    last = torch.channels_last_3d
    return "runs", grads.contiguous(memory_format=last), inputs.contiguous(memory_format=last)
