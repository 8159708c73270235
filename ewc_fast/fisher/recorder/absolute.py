r"""Absolute values of per-sample gradients, added up on their way back: :math:`\sum_n |g_n|`.

:math:`|l r^\top| = |l| |r|^\top`, so that a linear layer at one position takes one product for the
whole batch, as its squares do. Other sums over positions have no such form: their samples'
gradients are made a few at a time, as many as a cache holds, at 12 bytes written or read a sample
and entry.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.per_sample import (
    Blocks,
    Dense,
    Outer,
    PerSample,
    Reshaped,
    Rows,
    Sums,
)
from ewc_fast.fisher.recorder.plan import Family, Use
from ewc_fast.fisher.recorder.recorder import BYTES_AT_ONCE, Recorder


class AbsoluteRecorder(Recorder):
    """Adds absolute values where :class:`Recorder` adds squares."""

    power = 1

    @staticmethod
    def add_formed(sums: list[Tensor], gradients: list[Tensor]) -> None:
        """Add the absolute values of gradients that are already there: of one sample, say."""
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient.abs())

    @staticmethod
    def subtract_formed(total: Tensor, gradient: Tensor) -> None:
        """Take off the absolute value of one sample's gradient."""
        total.sub_(gradient.abs())

    def _take_both(
        self, family: Family, use: Use, gradients: PerSample, other: Family, bias: Use
    ) -> bool:
        return False

    @torch.no_grad()
    def _take(self, family: Family, use: Use, gradients: PerSample) -> None:
        """Add one use's at once, where no other use's gradient meets it before."""
        stem = use.stem
        if family.way == "apart" and _add_whole_batch(
            stem.view(self._sums[stem.names[0]]), gradients
        ):
            return
        if family.way == "apart":
            self._add_in_chunks(family, {use: gradients})
        else:
            self._kept.setdefault(family, {})[use] = gradients

    @torch.no_grad()
    def _square_sums(self, family: Family, kept: Mapping[Use, PerSample]) -> None:
        self._add_in_chunks(family, kept)

    def _add_in_chunks(self, family: Family, kept: Mapping[Use, PerSample]) -> None:
        """Form the gradients of a few samples at a time, all uses added up."""
        size = sum(self._sums[name].numel() * self._sums[name].itemsize for name in family.names)
        step = max(1, BYTES_AT_ONCE // max(size, 1))
        for start in range(0, len(self._outputs), step):
            samples = min(step, len(self._outputs) - start)
            formed = {
                name: self._sums[name].new_zeros(samples, *self._sums[name].shape)
                for name in family.names
            }
            self._add_gradients(formed, kept, start)
            for name, gradients in formed.items():
                self._sums[name].add_(gradients.abs_().sum(0))


def _add_whole_batch(total: Tensor, gradients: PerSample) -> bool:
    """Add a batch's absolute values at once, if the form allows; return whether it did."""
    match gradients:
        case Outer(left, right) if gradients.positions == 1:
            rows, columns = left[:, 0].to(total.dtype).abs(), right[:, 0].to(total.dtype).abs()
            total.addmm_(rows.t(), columns)
        case Dense() | Sums():
            total.add_(gradients.values.to(total.dtype).abs().sum(0))
        case Reshaped(outer, shape):
            return _add_whole_batch(total.view(-1, shape[-1]), outer)
        case Blocks(blocks) if all(block.positions == 1 for block in blocks):
            for part, block in zip(total, blocks, strict=True):
                _add_whole_batch(part, block)
        case Rows():
            _add_rows(total, gradients)
        case _:
            return False
    return True


def _add_rows(total: Tensor, rows: Rows) -> None:
    """Add up rows that a sample repeats, and then their absolute values."""
    samples, positions = rows.indices.shape
    height, width = total.shape[0], total.shape[1:]
    values = rows.values.to(total.dtype).masked_fill(
        (rows.indices == rows.skipped_row).unsqueeze(-1), 0
    )
    first = torch.arange(samples, device=rows.indices.device).unsqueeze(1) * height
    chosen, place = (rows.indices + first).unique(return_inverse=True)
    each = values.new_zeros(len(chosen), *width)
    each.index_add_(0, place.flatten(), values.reshape(samples * positions, *width))
    total.index_add_(0, chosen % height, each.abs_())
