"""Positions of a convolution, taken in blocks whose sides are powers of two.

Inside a block a position's place follows from its number by shifts; dividing by an image's size at
every step would cost a kernel as much as its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

Three = tuple[int, int, int]


class Geometry(NamedTuple):
    """Of a convolution, in three dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def blocks_of(size: Sequence[int], positions: int) -> Three:
    """Return the sides of a block of so many positions, a power of two.

    Those that cover an image with the fewest blocks; of these the longest in x, then in y, where
    neighbours mostly are neighbours in memory.
    """
    sides = [
        (positions // y // x, y, x)
        for x in _powers_of_two(positions)
        for y in _powers_of_two(positions // x)
    ]

    def cost(block: Three) -> tuple[int, int, int]:
        count = 1
        for length, side in zip(size, block, strict=True):
            count *= -(-length // side)
        return count, -block[2], -block[1]

    return min(sides, key=cost)


def needs_wide_offsets(*operands: Tensor) -> bool:
    """Whether one sample of an operand spans more than 32-bit offsets reach.

    Half of it, for offsets may also be outside: left of the padded input, right of the last block.
    """
    return any(
        sum((size - 1) * abs(step) for size, step in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= 2**30
        for t in operands
    )


def _powers_of_two(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


@triton.jit
def next_block(z, y, x, count_y, count_x):
    """Count on to the next block of an image; counting costs less than dividing."""
    x += 1
    ends_row = x == count_x
    x = tl.where(ends_row, 0, x)
    y += ends_row.to(tl.int32)
    ends_plane = y == count_y
    y = tl.where(ends_plane, 0, y)
    z += ends_plane.to(tl.int32)
    return z, y, x
