"""How the squared product is laid out: tiles, splits, vectors, precision. Pure functions.

They depend on shapes, strides, dtypes, addresses modulo 16 and the number of multiprocessors, on
nothing that is measured while a program runs: nothing is tuned then, and equal calls on equal chips
give equal bits. The tiles were chosen by registers, spills and instructions of the compiled kernel;
a benchmark on a GPU has yet to confirm or replace them, here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"]
"""How tensor cores multiply float32, with the error of one product g a.

``tf32x3`` splits each factor into two parts of 11 bits and leaves out the product of the second
ones: 3 * 2^-22 |g a|, twelve roundings of float32. ``bf16x3`` does so with 8 bits: 3 * 2^-18;
``bf16x6`` with three parts: less than one rounding. ``tf32`` rounds each factor to 11 bits: 2^-10.
``ieee`` is exact float32, without tensor cores.
"""


@dataclass(frozen=True)
class Tile:
    """What a program holds, and how it runs."""

    rows: int
    columns: int
    positions: int  # of a step
    warps: int
    stages: int = 3

    def count(self, rows: int, columns: int) -> int:
        """Return how many cover a weight."""
        return -(-rows // self.rows) * -(-columns // self.columns)


# Of each kind from large to small. What triton 3.6 makes of them; nothing spills (255 registers are
# all there are). Shared memory and a step's instructions are those of sm_90:
#
#                             registers of a thread    shared
#                             sm_80   sm_90   sm_100   memory   a step on sm_90
#   native  128 x 128 x 64     247     208     184     96 KB    4 HGMMA 64x128x16, 8 LDGSTS.128
#            64 x 128 x 64     171     122     124     72 KB    4 HGMMA 64x64x16, 6 LDGSTS.128
#            64 x  64 x 64     168     124     116     48 KB    4 HGMMA 64x64x16, 8 LDGSTS.128
#   tf32    128 x 128 x 32     250     236     242     96 KB    4 HGMMA 64x128x8, 32 LDGSTS
#   split    64 x 128 x 32     255     254     164     80 KB    20 HGMMA 64x64x8, 4 + 8 LDGSTS
#            64 x  64 x 32     230     179     105     48 KB    20 HGMMA 64x32x8, 2 + 8 LDGSTS
#     squares of bfloat16      222     182     112     48 KB    20 HGMMA 64x64x8, 2 LDGSTS.128
#   scalar   64 x  64 x 32     156     128     128     16 KB    2 HGMMA 64x32x16, 16 LDG
#   double   64 x  64 x 16     144     167     128     32 KB    4 DMMA, 2 + 4 LDGSTS
#
# So one block of the largest fits a multiprocessor of sm_90, two of the next, four of the third.
# sm_90's tensor cores want float32 with positions contiguous: operands whose features are, Triton
# copies by 4 bytes (split: one of the two; 4 + 8 LDGSTS are four of 16 bytes, eight of 4).
# Not taken, since they spill: 128 x 128 x 64 with 4 warps, 128 x 256, 128 x 128 of split.
_TILES: dict[str, tuple[Tile, ...]] = {
    "native": (Tile(128, 128, 64, 8), Tile(64, 128, 64, 8), Tile(64, 64, 64, 4)),
    "tf32": (Tile(128, 128, 32, 8), Tile(64, 128, 32, 8), Tile(64, 64, 32, 8)),
    "split": (Tile(64, 128, 32, 8), Tile(64, 64, 32, 8)),
    "scalar": (Tile(64, 64, 32, 8),),
    "double": (Tile(64, 64, 16, 8),),
}

LEAST_STEPS = 8
"""Of a split, whose result takes as long to write and read again as several steps to compute."""

STEP_COST = 8
"""Of a step beside its positions, in positions: issuing loads, waiting at barriers. An estimate."""


@dataclass(frozen=True)
class Operand:
    """How the elements of (samples, positions, features) lie in memory."""

    along: int  # the axis of vectors: 0 positions, 1 features
    vector: int  # elements
    strides: tuple[int, int, int]  # of sample, position, feature, as the kernel takes them

    @classmethod
    def of(cls, tensor: Tensor, ragged: bool = False) -> Operand:
        """Return the widest vectors, to 16 bytes, whose addresses are multiples of their size."""
        strides = [s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
        along = 0 if strides[1] == 1 and strides[2] != 1 and not ragged else 1
        axis = along + 1
        if strides[axis] != 1 or tensor.data_ptr() % 16:
            return cls(along, 1, (strides[0], strides[1], strides[2]))
        vector = 16 // tensor.element_size()
        others = [s for d, s in enumerate(strides) if d != axis]
        while any(size % vector for size in (tensor.shape[axis], *others)):
            vector //= 2
        n, t, f = (s if d == axis else s // vector for d, s in enumerate(strides))
        return cls(along, vector, (n, t, f))


def dot(
    grads: torch.dtype, inputs: torch.dtype, one_position: bool, float32: Precision
) -> tuple[Precision, bool]:
    """Return how a product's factors are multiplied, and whether they become float32 before.

    bfloat16 with bfloat16 and float16 with float16 are multiplied as they are, exactly; one with
    the other as TF32, which holds both, exactly. Their squares need 16 and 22 bits: rounded back
    they would lose half of them, while the two parts of ``tf32x3`` hold them, and only the product
    of the small parts is left out, at most 2^-22 of the whole. With a float32 operand the caller's
    choice holds. float64 is multiplied in float64.
    """
    if torch.float64 in (grads, inputs):
        return "ieee", False
    if torch.float32 in (grads, inputs):
        return float32, True
    if one_position:
        return "tf32x3", True
    return "tf32", grads != inputs


def tiles_of(
    dtype: torch.dtype, precision: Precision, widened: bool, least_bytes: int
) -> tuple[Tile, ...]:
    """Return the tiles a product can take; ``least_bytes`` is the narrower operand's vector.

    Vectors of less than 4 bytes can't be copied to shared memory behind the loop's back.
    """
    if dtype == torch.float64:
        return _TILES["double"]
    if least_bytes < 4 or (precision == "ieee" and widened):
        return _TILES["scalar"]
    if not widened:
        return _TILES["native"]
    return _TILES["tf32" if precision == "tf32" else "split"]


@dataclass(frozen=True)
class Split:
    """How the steps of a tile are shared out among programs."""

    count: int
    steps: int  # of each
    chunks: int  # splits of one group of steps: of one sample, or of all
    group_steps: int
    cuts_samples: bool  # a sample's sum is complete only when its chunks are added


@dataclass(frozen=True)
class Plan:
    """A tile and a split."""

    tile: Tile
    split: Split


def plan(
    tiles: tuple[Tile, ...],
    samples: int,
    positions: int,
    rows: int,
    columns: int,
    multiprocessors: int,
) -> Plan:
    """Return the largest tile that gives half the multiprocessors work, else the smallest."""
    for tile in tiles:
        if (tile.rows > 64 and rows <= 64) or (tile.columns > 64 and columns <= 64):
            continue
        tile = with_fewest_steps(tile, positions)
        count = tile.count(rows, columns)
        found = Plan(tile, split(samples, -(-positions // tile.positions), count, multiprocessors))
        if count * found.split.count >= multiprocessors // 2:
            break
    return found


def with_fewest_steps(tile: Tile, positions: int) -> Tile:
    """Return the tile with steps of 64, 32 or 16 positions, by what a sample then costs."""
    sizes = [size for size in (64, 32, 16) if size <= tile.positions]
    best = min(sizes, key=lambda size: -(-positions // size) * (size + STEP_COST))
    return Tile(tile.rows, tile.columns, best, tile.warps, tile.stages)


def split(samples: int, sample_steps: int, tiles: int, multiprocessors: int) -> Split:
    """Share out samples where a weight has fewer tiles than there are multiprocessors.

    Splits have whole samples, or, where there are fewer samples than splits, equal parts of one.
    """
    steps = samples * sample_steps
    wanted = max(1, min(multiprocessors // max(1, tiles), steps // LEAST_STEPS))
    if wanted > samples:
        each = -(-sample_steps // -(-wanted // samples))
        chunks = -(-sample_steps // each)
        if chunks > 1:
            return Split(samples * chunks, each, chunks, sample_steps, cuts_samples=True)
    each = -(-samples // min(wanted, samples)) * sample_steps
    count = -(-steps // each)
    return Split(count, each, count, steps, cuts_samples=False)


def whole_samples(given: Split, samples: int) -> Split:
    """Return a split of about as many shares that cuts no sample, for samples of any length."""
    count = min(given.count, samples)
    return Split(count, 0, count, 0, cuts_samples=False)  # a table says where shares begin
