"""The overlap of two Fisher diagonals: closed forms, groups, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from ewc_fast.fisher import fisher_overlap


def drawn(seed, **shapes):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=draw) ** 4 for name, shape in shapes.items()}


def by_the_distance(first, second):
    """1 - d^2 from d^2 = 1/2 tr(F + G - 2 (F G)^(1/2)), by whole matrices in float64."""
    one, other = (torch.diag(f.double().flatten() / f.double().sum()) for f in (first, second))
    values, vectors = torch.linalg.eigh(one @ other)  # diagonal, hence symmetric
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return 1 - 0.5 * torch.trace(one + other - 2 * root).item()


def test_it_is_one_minus_the_squared_distance_of_the_paper():
    first, second = drawn(0, w=(4, 5), b=(4,)), drawn(1, w=(4, 5), b=(4,))
    overlap = fisher_overlap(first, second)
    assert list(overlap) == ["w", "b"]
    for name, value in overlap.items():
        assert value == pytest.approx(by_the_distance(first[name], second[name]), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 1.0, id="equal"),
        pytest.param([1.0, 2.0], [50.0, 100.0], 1.0, id="equal but for their size"),
        pytest.param([1.0, 0.0], [0.0, 3.0], 0.0, id="apart"),
        pytest.param([1.0, 1.0], [2.0, 0.0], math.sqrt(1 / 2), id="one of two"),
        pytest.param([1.0, 1.0, 2.0], [1.0, 3.0, 0.0], (1 + math.sqrt(3)) / 4, id="by hand"),
    ],
)
def test_closed_forms(first, second, expected):
    overlap = fisher_overlap({"w": torch.tensor(first)}, {"w": torch.tensor(second)})
    assert overlap["w"] == pytest.approx(expected, abs=1e-15)


def test_a_group_has_one_trace():
    first, second = drawn(2, **{"a.w": 6, "a.b": 2}), drawn(3, **{"a.w": 6, "a.b": 2})
    overlap = fisher_overlap(first, second, group=lambda name: name.partition(".")[0])
    joined = (torch.cat([*fisher.values()]) for fisher in (first, second))
    assert overlap == {"a": pytest.approx(by_the_distance(*joined), abs=1e-12)}


def test_it_is_symmetric_and_at_most_one():
    for seed in range(20):
        first, second = drawn(seed, w=300), drawn(seed + 100, w=300)
        there, back = fisher_overlap(first, second)["w"], fisher_overlap(second, first)["w"]
        assert there == pytest.approx(back, abs=1e-15)
        assert there <= 1
        assert fisher_overlap(first, first)["w"] == pytest.approx(1.0, abs=1e-15)
        assert fisher_overlap(first, first)["w"] <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_entries_are_not_lost(dtype):
    smallest = torch.full((8,), torch.finfo(dtype).tiny, dtype=dtype)
    assert fisher_overlap({"w": smallest}, {"w": smallest})["w"] == pytest.approx(1.0)


ONES = torch.ones(3)
REFUSED = {
    "a list": ([ONES], {"w": ONES}, TypeError, r"first: expected a mapping.*got list"),
    "nothing": ({}, {}, ValueError, r"first: expected the Fisher diagonal of at least one"),
    "another name": ({"w": ONES}, {"v": ONES}, ValueError, r"second: has no parameter 'w'"),
    "one more": ({"w": ONES}, {"w": ONES, "v": ONES}, ValueError, r"first: has no parameter 'v'"),
    "another shape": (
        *({"w": ONES}, {"w": torch.ones(4)}),
        *(ValueError, r"second\['w'\]: expected shape \(3,\) as in first, got \(4,\)"),
    ),
    "integers": ({"w": ONES}, {"w": ONES.int()}, TypeError, r"second\['w'\]: expected a floating"),
    "a number": ({"w": 1.0}, {"w": ONES}, TypeError, r"first\['w'\]: expected a"),
    "negative": ({"w": -ONES}, {"w": ONES}, ValueError, r"first\['w'\]: expected finite entries"),
    "not finite": (
        *({"w": ONES}, {"w": ONES * math.nan}),
        *(ValueError, r"second\['w'\]: expected finite entries"),
    ),
    "no trace": ({"w": ONES}, {"w": 0 * ONES}, ValueError, r"second: the trace of 'w' is 0"),
}


@pytest.mark.parametrize(("first", "second", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_compared_is_refused(first, second, error, message):
    with pytest.raises(error, match=message):
        fisher_overlap(first, second)
