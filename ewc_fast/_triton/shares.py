"""How a sum over samples is shared out among programs, and put together in a fixed order.

A weight may have too few tiles for all multiprocessors. Its samples are then shared out: each
program writes what its samples give to memory of its own, and the shares are added up afterwards,
in the same order every time, without atomics. Where there are too few samples, each is cut into
parts; the parts of a sample are added up before they are squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """Which samples and which of their steps each share has: contiguous runs of equal length."""

    samples: int  # of one share
    parts: int  # of one sample: with more than one, a share has one sample
    steps: int  # of one part
    count: int

    @property
    def are_squares(self) -> bool:
        """Whether shares are sums of squares, not parts of what is yet to be squared."""
        return self.parts == 1


def share_out(samples: int, steps: int, tiles: int, programs: int) -> Shares:
    """Share out ``samples`` of ``steps`` each so that ``tiles`` programs become ``programs``."""
    wanted = max(1, programs // max(1, tiles))
    if wanted <= samples:
        each = -(-samples // wanted)
        return Shares(each, 1, steps, -(-samples // each))
    each = -(-steps // min(steps, -(-wanted // samples)))
    parts = -(-steps // each)
    return Shares(1, parts, each, samples * parts)


def rooms_for(shares: Shares, totals: Sequence[Tensor | None]) -> tuple[bool, list[Tensor | None]]:
    """Return where programs write, contiguous, and whether that is the totals themselves.

    It is where there is but one share; otherwise there is room for each share.
    """
    wanted = [total for total in totals if total is not None]
    direct = shares.count == 1 and shares.are_squares and all(t.is_contiguous() for t in wanted)
    return direct, [
        t if t is None or direct else t.new_empty(shares.count, *t.shape) for t in totals
    ]


def add_shares_(
    totals: Sequence[Tensor | None], rooms: Sequence[Tensor | None], shares: Shares
) -> None:
    """Add the shares to the totals, unless they were written there."""
    for total, room in zip(totals, rooms, strict=True):
        if total is None or room is None or room is total:
            continue
        if shares.are_squares:
            total.add_(room.sum(0))
        else:
            total.add_(room.unflatten(0, (-1, shares.parts)).sum(1).square_().sum(0))
