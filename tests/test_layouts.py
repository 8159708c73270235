"""Which sample an entry belongs to is found out, wherever a gradient or a model puts samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ewc_fast.fisher.recorder.layouts import (
    LABELS_A_PASS,
    Ragged,
    Regular,
    digits,
    infer,
    labels,
    scaled_by_sample,
)

POWERS = torch.exp2(torch.arange(LABELS_A_PASS, dtype=torch.float64))


def owned(layout: Regular, shape: tuple[int, ...]) -> Tensor:
    """Return which sample each entry of a tensor belongs to, by the words of the definition."""
    before, samples, after = layout.lengths(shape[layout.dim])
    along = torch.tensor(
        [sample for _ in range(before) for sample in range(samples) for _ in range(after)]
    )
    behind = len(shape) - layout.dim - 1
    return along.view(-1, *[1] * behind).expand(shape)


REGULAR = {
    "one_entry_each": ((3, 4), Regular(0, 3, "major")),
    "major": ((6, 4), Regular(0, 3, "major")),
    "minor": ((6, 4), Regular(0, 3, "minor")),
    "between": ((12, 4), Regular(0, 3, (2, 2))),
    "between_unequal": ((18, 4), Regular(0, 3, (2, 3))),
    "second_dimension": ((4, 3), Regular(1, 3, "major")),
    "second_dimension_minor": ((4, 6, 2), Regular(1, 3, "minor")),
    "last_dimension_major": ((2, 4, 6), Regular(2, 3, "major")),
    "other_dimensions_as_long": ((3, 3, 3), Regular(2, 3, "major")),
    "one_dimension": ((6,), Regular(0, 3, "minor")),
}
each_layout = pytest.mark.parametrize(("shape", "layout"), REGULAR.values(), ids=REGULAR.keys())


@each_layout
def test_a_regular_layout_brings_each_samples_entries_to_the_front(shape, layout):
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    owner = owned(layout, shape)
    sorted_out = layout.by_sample(places)
    assert len(sorted_out) == 3
    assert sorted_out.dim() == len(shape) + 2
    for sample in range(3):
        expected = places[owner == sample].sort().values
        assert torch.equal(sorted_out[sample].flatten().sort().values, expected)
        assert torch.equal(layout.only(places, sample), places * (owner == sample))


@each_layout
def test_a_layout_is_inferred_from_a_gradient_and_itself_scaled(shape, layout):
    gradient, scales = torch.randn(shape), POWERS[:3]
    assert infer(gradient, [gradient * scales[owned(layout, shape)].float()], [scales]) == layout


@each_layout
def test_a_layout_holds_for_other_numbers_of_samples(shape, layout):
    rest = shape[layout.dim] // 3
    longer = (*shape[: layout.dim], 7 * rest, *shape[layout.dim + 1 :])
    again = layout.resized(7)
    assert again.fits(torch.Size(longer))
    assert again.by_sample(torch.zeros(longer)).shape[0] == 7
    assert not again.fits(torch.Size((*longer[: layout.dim], 7 * rest + 1)))


def test_a_layout_does_not_fit_where_the_lengths_differ_or_the_dimension_is_missing():
    assert not Regular(0, 4, (2, 3)).fits(torch.Size((12,)))
    assert not Regular(0, 4, (2, 3)).fits(torch.Size((48,)))
    assert not Regular(1, 4, "major").fits(torch.Size((4,)))


@pytest.mark.parametrize("samples", [16, 17, 40, 300])
@pytest.mark.parametrize("within", ["major", "minor", (2, 3)], ids=str)
def test_a_layout_of_many_samples_is_inferred_digit_by_digit(samples, within):
    layout = Regular(1, samples, within)
    vector = torch.ones(samples, dtype=torch.float64)
    each, scales = scaled_by_sample(vector)
    assert [torch.equal(scaled, scale) for scaled, scale in zip(each, scales, strict=True)]
    gradient = torch.randn(2, 6 * samples)
    owner = owned(layout, tuple(gradient.shape))
    assert infer(gradient, [gradient * s[owner].float() for s in scales], scales) == layout


def test_gradients_with_zeros_are_told_apart_by_what_is_not_zero():
    gradient = torch.randn(6, 4)
    gradient[1] = gradient[:, 2] = 0
    scales = POWERS[:3]
    scaled = gradient * scales[owned(Regular(0, 3, "minor"), (6, 4))].float()
    assert infer(gradient, [scaled], [scales]) == Regular(0, 3, "minor")


def test_a_gradient_of_zeros_tells_nothing():
    assert infer(torch.zeros(6, 4), [torch.zeros(6, 4)], [POWERS[:3]]) == "zero"


def test_rows_in_no_order_are_irregular_and_sums_over_samples_are_mixed():
    rows, owner = torch.randn(5, 4), torch.tensor([2, 0, 0, 1, 2])
    assert infer(rows, [rows * POWERS[owner, None].float()], [POWERS[:3]]) == "irregular"
    parts = torch.randn(3, 5, 4)
    total = (parts * POWERS[:3, None, None].float()).sum(0)
    assert infer(parts.sum(0), [total], [POWERS[:3]]) == "mixed"


def test_one_entry_of_two_samples_makes_a_gradient_mixed():
    rows, owner = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    scaled = rows * POWERS[owner, None].float()
    scaled[3, 1] = rows[3, 1] * 3  # between the powers of samples 1 and 2
    assert infer(rows, [scaled], [POWERS[:3]]) == "mixed"


def test_complex_gradients_have_layouts_too():
    gradient = torch.randn(6, 4, dtype=torch.complex64)
    scales = POWERS[:3]
    scaled = gradient * scales[owned(Regular(0, 3, "minor"), (6, 4))].float()
    assert infer(gradient, [scaled], [scales]) == Regular(0, 3, "minor")
    assert infer(gradient, [gradient[:, :1] + scaled], [scales]) == "mixed"


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17, 40, 256, 257, 5000])
def test_digits_spell_each_samples_number(samples):
    spelt = torch.zeros(samples, dtype=torch.long)
    for digit in digits(samples):
        assert ((digit >= 0) & (digit < LABELS_A_PASS)).all()
        spelt = spelt * LABELS_A_PASS + digit
    assert torch.equal(spelt, torch.arange(samples))


@pytest.mark.parametrize("samples", [2, 16, 17, 40, 300])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_labels_of_any_number_of_samples_in_any_order_and_dimension(samples, dim):
    owner = torch.randint(samples, (2 * samples + 3,))
    gradient = torch.randn(len(owner), 4, 5)
    each = digits(samples)
    scaled = [gradient * POWERS[digit[owner]].float()[:, None, None] for digit in each]
    moved = gradient.movedim(0, dim), [s.movedim(0, dim) for s in scaled]
    found, where = labels(*moved, POWERS)
    assert where == dim
    assert torch.equal(found, owner)


def test_labels_allow_for_roundings_and_not_for_another_sample():
    owner = torch.tensor([3, 1, 2, 0])
    gradient = torch.randn(4, 50)
    scaled = gradient * POWERS[owner, None].float()
    found, _ = labels(gradient, [scaled * (1 + 1e-4 * torch.rand(4, 50))], POWERS)
    assert torch.equal(found, owner)
    scaled[2, :25] *= 2
    assert labels(gradient, [scaled], POWERS) is None


def test_there_are_no_labels_without_entries():
    found, dim = labels(torch.zeros(0, 4), [torch.zeros(0, 4)], POWERS)
    assert (len(found), dim) == (0, 0)


RAGGED = {
    "in_order": [0, 0, 1, 2, 2, 2],
    "in_no_order": [2, 0, 2, 1, 0, 2],
    "a_sample_without_entries": [0, 2, 0, 2],
    "one_entry": [1],
    "no_entries": [],
}


@pytest.mark.parametrize("owner", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("dim", [0, 1])
def test_a_ragged_layout_fills_up_with_zeros(owner, dim):
    owner = torch.tensor(owner, dtype=torch.long)
    layout = Ragged(owner, 3, dim)
    values = torch.randn(len(owner), 4)
    sorted_out = layout.by_sample(values.movedim(0, dim))
    most = int(torch.bincount(owner, minlength=3).max())
    behind = (1, most, 4) if dim == 0 else (4, 1, most)
    assert sorted_out.shape == (3, *behind)
    for sample in range(3):
        mine = values[owner == sample]
        rows = sorted_out[sample].squeeze(dim).movedim(dim, 0)
        assert torch.equal(rows[: len(mine)], mine)
        assert not rows[len(mine) :].any()
        alone = layout.only(values.movedim(0, dim), sample).movedim(dim, 0)
        assert torch.equal(alone, values * (owner == sample)[:, None])
