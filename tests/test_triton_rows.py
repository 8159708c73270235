"""The Triton kernel of embedding tables against one sample at a time in float64."""

from __future__ import annotations

import pytest
import torch
from cases import every_dtype
from numerics import assert_within, compute_dtype, smallest, u
from torch import Tensor

pytest.importorskip("triton")

from ewc_fast._triton.squared_rows import accumulate_squared_rows_
from ewc_fast.sums import add_squared_rows_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# samples, positions, rows of the table, columns, entries of a stretch
CASES = {
    "one_entry": (1, 1, 1, 1, 4),
    "one_position": (5, 1, 3, 2, 16),
    "in_one_stretch": (3, 5, 4, 7, 16),
    "stretches_cut_rows": (4, 9, 3, 5, 4),
    "stretches_cut_runs_often": (2, 17, 2, 3, 4),
    "one_row": (5, 6, 1, 3, 4),
    "one_run": (1, 19, 1, 3, 4),
    "stretches_end_with_rows": (2, 4, 1, 2, 4),
    "many_rows": (3, 8, 1000, 6, 8),
    "several_blocks_of_columns": (2, 2, 2, 1030, 4),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def one_sample_at_a_time(shape, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the oracle, and what rounding may cost: a sum of T numbers, squared, N times added."""
    unit, positions = u(compute_dtype(values.dtype)), values.shape[1]
    exact, budget = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for rows, of_sample in zip(indices, values.double(), strict=True):
        gradient = torch.zeros_like(exact).index_add_(0, rows, of_sample)
        error = (
            (positions + 1) * unit * torch.zeros_like(exact).index_add_(0, rows, of_sample.abs())
        )
        exact += gradient.square()
        budget += 2 * gradient.abs() * error + error.square()
    return exact, budget + (len(values) + 4) * unit * exact + smallest(torch.float32)


def operands(case, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    samples, positions, rows, columns, _ = case
    indices = torch.randint(rows, (samples, positions))
    values = torch.randn(samples, positions, columns).to(dtype)
    return torch.rand(rows, columns, dtype=compute_dtype(dtype)), indices, values


def assert_adds(total: Tensor, indices: Tensor, values: Tensor, stretch=4, skipped_row=-1) -> None:
    exact, budget = one_sample_at_a_time(total.shape, indices, values)
    if skipped_row >= 0:
        exact[skipped_row] = 0
    found = total.clone().to(DEVICE)
    accumulate_squared_rows_(
        found, indices.to(DEVICE), values.to(DEVICE), skipped_row, stretch=stretch
    )
    added = total.double() + exact
    assert_within(found.cpu(), added, budget + 2 * u(total.dtype) * added, "total")


@every_dtype
@every_case
def test_rows_add_the_squares_of_each_samples_sum(case, dtype):
    assert_adds(*operands(case, dtype), stretch=case[-1])


def test_a_skipped_row_gets_nothing():
    total, indices, values = operands(CASES["stretches_cut_rows"])
    assert_adds(total, indices, values, skipped_row=1)


def test_rows_that_a_row_of_runs_would_confuse():
    """Runs that end at a cut, begin at one, fill a stretch; sorted, so that places are known."""
    for lengths in ([4, 4], [3, 1, 4], [4, 1, 3], [2, 6, 4], [1, 11], [5, 2, 1, 4], [1] * 12):
        samples, most = len(lengths), max(lengths)
        indices = torch.ones(samples, most, dtype=torch.long)
        for sample, length in enumerate(lengths):
            indices[sample, :length] = 0
        assert_adds(torch.rand(2, 3), indices, torch.randn(samples, most, 3))


def test_operands_may_have_any_strides():
    total, indices, values = operands(CASES["stretches_cut_rows"])
    for laid_out in (
        values.transpose(0, 1).contiguous().transpose(0, 1),
        values.transpose(1, 2).contiguous().transpose(1, 2),
        values[:1, :1].expand_as(values),
        values.repeat_interleave(2, 2)[..., ::2],
    ):
        assert_adds(total, indices.t().contiguous().t(), laid_out)
    assert_adds(total.t().contiguous().t(), indices, values)


def test_repeated_runs_give_the_same_bits():
    total, indices, values = (t.to(DEVICE) for t in operands(CASES["stretches_cut_runs_often"]))
    found = []
    for _ in range(2):
        found.append(total.clone())
        accumulate_squared_rows_(found[-1], indices, values, -1, stretch=4)
    assert torch.equal(*found)


def test_nothing_adds_nothing():
    for samples, positions, columns in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        total = torch.ones(4, columns, device=DEVICE)
        indices = torch.zeros(samples, positions, dtype=torch.long, device=DEVICE)
        values = torch.ones(samples, positions, columns, device=DEVICE)
        accumulate_squared_rows_(total, indices, values, -1)
        assert torch.equal(total, torch.ones_like(total))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_both_ways_add_to_tables_of_any_rows(impl):
    total = torch.rand(3, 2, 4)
    _, indices, values = operands((2, 5, 3, 8, 4))
    exact, budget = one_sample_at_a_time((3, 8), indices, values)
    exact[2] = 0
    added = total.flatten(1).double() + exact
    total = total.to(DEVICE)
    add_squared_rows_(total, indices.to(DEVICE), values.to(DEVICE), 2, impl)
    assert_within(total.cpu().flatten(1), added, budget + 2 * u(torch.float32) * added, impl)
