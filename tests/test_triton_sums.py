"""The Triton kernel of scales and shifts against one sample at a time in float64."""

from __future__ import annotations

import pytest
import torch
from cases import every_dtype
from numerics import assert_within, compute_dtype, smallest, u
from torch import Tensor

pytest.importorskip("triton")

from ewc_fast._triton.squared_sums import accumulate_squared_sums_
from ewc_fast.sums import Factor, add_squared_sums_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEATURES_LAST = {"features_last": lambda t: t, "features_in_the_middle": lambda t: in_middle(t)}
every_layout = pytest.mark.parametrize("lay_out", FEATURES_LAST.values(), ids=FEATURES_LAST)

# samples, positions, features; blocks have 64 features and 64 positions, or 1024 and few features
SIZES = [(1, 1, 1), (3, 1, 5), (2, 70, 9), (2, 5, 130), (1, 1030, 3), (5, 7, 1)]


def in_middle(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def one_sample_at_a_time(
    grads: Tensor, inputs: Tensor | None, means: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the oracle and what rounding may cost.

    A factor takes two roundings, of the difference and the product; the products one, their sum
    over T positions T. The difference's is one of its own size, for the operands are exact.
    """
    unit, positions = u(compute_dtype(grads.dtype)), grads.shape[1]
    factor = torch.ones_like(grads, dtype=torch.float64)
    if inputs is not None:
        factor = inputs.double() if means is None else inputs.double() - means.double()
        factor = factor if scales is None else factor * scales.double()
    exact = torch.zeros(grads.shape[2], dtype=torch.float64)
    budget = torch.zeros_like(exact)
    for product in (grads.double() * factor).unbind(0):
        gradient, error = product.sum(0), (positions + 4) * unit * product.abs().sum(0)
        exact += gradient.square()
        budget += 2 * gradient.abs() * error + error.square()
    return exact, budget + (len(grads) + 4) * unit * exact + smallest(torch.float32)


def operands(size, kind: str, dtype=torch.float32) -> list[Tensor | None]:
    """Return grads, inputs, means and scales."""
    samples, positions, features = size
    grads, inputs = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    wide = compute_dtype(dtype)
    shape = {"layer": (samples, positions, 1), "group": (samples, 1, features)}.get(kind)
    if kind == "plain":
        return [grads, inputs, None, None]
    if kind == "batch":  # one for all samples
        return [grads, inputs, *(torch.rand(1, 1, features, dtype=wide) for _ in range(2))]
    if kind == "rms":
        return [grads, inputs, None, torch.rand(samples, positions, 1, dtype=wide)]
    return [grads, inputs, *(torch.rand(shape, dtype=wide) for _ in range(2))]


def run(given: list[Tensor | None], programs=1) -> tuple[list[Tensor], list[Tensor]]:
    """Return totals before and after."""
    dtype = compute_dtype(given[0].dtype)
    before = [torch.rand(given[0].shape[2], dtype=dtype) for _ in range(2)]
    after = [t.clone().to(DEVICE) for t in before]
    on_device = [None if t is None else t.to(DEVICE) for t in given]
    accumulate_squared_sums_(*after, *on_device, programs=programs)
    return before, [t.cpu() for t in after]


def assert_right(before, after, given) -> None:
    plain = [given[0], None, None, None]
    for what, old, new, of in zip(("total", "bias"), before, after, (given, plain), strict=True):
        exact, budget = one_sample_at_a_time(*of)
        added = old.double() + exact
        budget = budget + (len(given[0]) + 2) * u(old.dtype) * added
        assert_within(new, added, budget, what)


@every_layout
@pytest.mark.parametrize("kind", ["plain", "layer", "group", "batch", "rms"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scales_and_shifts_come_from_one_reading(size, kind, lay_out):
    given = operands(size, kind)
    given[:2] = (lay_out(t) for t in given[:2])
    assert_right(*run(given), given)


@every_dtype
def test_every_dtype_is_added_up_in_that_of_the_total(dtype):
    given = operands((2, 9, 20), "layer", dtype)
    assert_right(*run(given), given)


@every_layout
@pytest.mark.parametrize("programs", [3, 8, 40])
def test_samples_and_parts_of_samples_are_shared_out(programs, lay_out):
    given = operands((3, 2100, 2), "group")
    given[:2] = (lay_out(t) for t in given[:2])
    assert_right(*run(given, programs), given)


def test_repeated_runs_give_the_same_bits():
    given = operands((3, 200, 5), "layer")
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        results.append(run(given, 8)[1])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_totals_may_have_gaps():
    given = operands((2, 5, 6), "layer")
    room = torch.full((2, 12), 7.0, device=DEVICE)
    totals = [row[::2].zero_() for row in room]
    accumulate_squared_sums_(*totals, *(t.to(DEVICE) for t in given))
    zeros = [torch.zeros(6)] * 2
    assert_right(zeros, [t.cpu() for t in totals], given)
    assert torch.equal(room[:, 1::2].cpu(), torch.full((2, 6), 7.0))


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_adds_nothing(size):
    before, after = run(operands(size, "layer"))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_both_ways_add_the_same(impl):
    given = operands((2, 9, 20), "layer")
    grads, *factor = (t.to(DEVICE) for t in given)
    totals = [torch.zeros(20, device=DEVICE) for _ in range(3)]
    add_squared_sums_(totals[0], grads, Factor(*factor), totals[1], impl)
    add_squared_sums_(totals[2], grads, None, impl=impl)
    assert_right([torch.zeros(20)] * 2, [t.cpu() for t in totals[:2]], given)
    assert_right([torch.zeros(20)] * 2, [totals[0].cpu(), totals[2].cpu()], given)
