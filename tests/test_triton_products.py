"""The squared product in Triton's interpreter: against one sample at a time in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import every_dtype
from numerics import assert_within, compute_dtype
from test_squared_product import STRIDES, assert_adds, one_sample_at_a_time, random
from torch import Tensor

from ewc_fast import functional

pytest.importorskip("triton")

from ewc_fast._triton.product_plan import Plan, Split, Tile
from ewc_fast._triton.squared_product import (
    add_ragged_squared_product_,
    add_squared_product_,
)

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(rows=16, columns=32, positions=16, warps=4)  # smaller than what it is tested on


def on_device(run):
    """Let ``run(total, bias_total)`` work on the device of the tests."""

    def wrapped(total: Tensor, bias_total: Tensor) -> None:
        there = total.to(DEVICE), bias_total.to(DEVICE)
        run(*there)
        total.copy_(there[0])
        bias_total.copy_(there[1])

    return wrapped


def tensor_core_roundings(grads: Tensor) -> int:
    """Return how many roundings of float32 tensor cores take more than a sum in float32.

    They cut sums off, an error of up to two roundings; three passes of TF32 lose up to 12, and one
    position's squares are rounded. The interpreter, and float64, do without.
    """
    if DEVICE == "cpu" or grads.dtype == torch.float64:
        return 0
    samples, positions = grads.shape[:2]
    return 14 + (samples if positions == 1 else positions)


def assert_triton_adds(grads: Tensor, inputs: Tensor, layout: Plan):
    far = keeping_strides(grads), keeping_strides(inputs)
    run = on_device(lambda total, bias: add_squared_product_(total, *far, bias, layout=layout))
    assert_adds(run, grads, inputs, more_roundings=tensor_core_roundings(grads))


def keeping_strides(tensor: Tensor) -> Tensor:
    """Return a tensor of equal strides on the device of the tests."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.as_strided(tensor, (reach + 1,), (1,)).to(DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride())


def small_plan(samples: int, positions: int, splits: int = 1) -> Plan:
    """Return a plan of small tiles, and of about so many splits."""
    if positions == 1:
        samples, positions = 1, samples
    steps = -(-positions // TILE.positions)
    if splits <= samples:
        each = -(-samples // splits) * steps
        count = -(-samples * steps // each)
        return Plan(TILE, Split(count, each, count, samples * steps, cuts_samples=False))
    each = -(-steps // -(-splits // samples))
    chunks = -(-steps // each)
    return Plan(TILE, Split(samples * chunks, each, chunks, steps, cuts_samples=True))


# samples, positions, rows, columns: less and more than tiles of 16 x 32 and steps of 16
SIZES = [
    (1, 1, 1, 1),
    (3, 1, 2, 3),
    (17, 1, 17, 31),
    (40, 1, 33, 5),
    (5, 2, 3, 17),
    (2, 3, 1, 33),
    (3, 16, 16, 32),
    (2, 17, 48, 64),
    (1, 50, 7, 70),
    (4, 33, 13, 1),
]


@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squares_of_sums_over_positions_are_added(size, dtype):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows, dtype=dtype)
    inputs = random(samples, positions, columns, dtype=dtype)
    assert_triton_adds(grads, inputs, small_plan(samples, positions))


@every_dtype
@pytest.mark.parametrize("size", [(5, 1, 20, 36), (3, 40, 20, 36)], ids=str)
def test_the_layout_of_the_rules_adds_the_same(size, dtype):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows, dtype=dtype)
    inputs = random(samples, positions, columns, dtype=dtype)

    def run(total: Tensor, bias_total: Tensor) -> None:
        functional.accumulate_squared_product_(
            total, grads.to(DEVICE), inputs.to(DEVICE), bias_total=bias_total, impl="triton"
        )

    more = tensor_core_roundings(grads)
    assert_adds(on_device(run), grads, inputs, more_roundings=more)


SPLIT = {
    "whole_samples": (7, 20, 3),
    "one_sample_each": (3, 33, 3),
    "parts_of_samples": (2, 70, 6),
    "parts_of_one_sample": (1, 100, 4),
    "one_position": (100, 1, 5),
}


@every_dtype
@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
def test_splits_add_up(case, dtype):
    samples, positions, splits = case
    layout = small_plan(samples, positions, splits)
    assert layout.split.count > 1
    grads = random(samples, positions, 19, dtype=dtype)
    inputs = random(samples, positions, 35, dtype=dtype)
    assert_triton_adds(grads, inputs, layout)


@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
def test_results_repeat_bit_for_bit(case):
    samples, positions, splits = case
    grads, inputs = random(samples, positions, 19).to(DEVICE), random(samples, positions, 35)
    results = []
    for _ in range(2):
        total, bias_total = torch.ones(19, 35).to(DEVICE), torch.ones(19).to(DEVICE)
        layout = small_plan(samples, positions, splits)
        add_squared_product_(total, grads, inputs.to(DEVICE), bias_total, layout=layout)
        results.append((total, bias_total))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@every_dtype
@pytest.mark.parametrize("positions", [1, 24])
@pytest.mark.parametrize("lay_out", STRIDES.values(), ids=STRIDES)
def test_operands_may_have_any_strides(lay_out, positions, dtype):
    grads = lay_out(random(8, positions, 24, dtype=dtype))
    inputs = lay_out(random(8, positions, 40, dtype=dtype))
    assert_triton_adds(grads, inputs, small_plan(8, positions))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("positions", [1, 20])
def test_operands_may_have_different_dtypes(left, right, positions):
    grads, inputs = random(3, positions, 17, dtype=left), random(3, positions, 33, dtype=right)
    assert_triton_adds(grads, inputs, small_plan(3, positions))


def test_rows_of_the_total_may_lie_apart_and_nothing_between_is_touched():
    grads, inputs = random(4, 9, 14).to(DEVICE), random(4, 9, 35).to(DEVICE)
    for splits in (1, 2):
        room = torch.full((14, 50), 7.0, device=DEVICE)
        bias_room = torch.full((28,), 7.0, device=DEVICE)
        total, bias_total = room[:, 5:40].zero_(), bias_room[::2].zero_()
        layout = small_plan(4, 9, splits)
        add_squared_product_(total, grads, inputs, bias_total, layout=layout)
        more = tensor_core_roundings(grads)
        exact, budget = one_sample_at_a_time(grads.cpu(), inputs.cpu(), more)
        assert_within(total.cpu(), exact, budget, "total")
        assert torch.equal(room[:, :5].cpu(), torch.full((14, 5), 7.0))
        assert torch.equal(room[:, 40:].cpu(), torch.full((14, 10), 7.0))
        assert torch.equal(bias_room[1::2].cpu(), torch.full((14,), 7.0))


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty_dimensions_add_nothing_but_the_bias(size):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows).to(DEVICE)
    inputs = random(samples, positions, columns).to(DEVICE)
    total, bias_total = torch.ones(rows, columns).to(DEVICE), torch.ones(rows).to(DEVICE)
    functional.accumulate_squared_product_(
        total, grads, inputs, bias_total=bias_total, impl="triton"
    )
    assert torch.equal(total.cpu(), torch.ones(rows, columns))
    assert torch.allclose(bias_total, 1 + grads.sum(1).square().sum(0))


def test_infinities_and_nan_reach_only_their_rows():
    grads, inputs = random(2, 3, 5), random(2, 3, 40)
    grads[0, 0, 2], inputs[1, 1, 39] = float("nan"), float("inf")
    total = torch.zeros(5, 40, device=DEVICE)
    add_squared_product_(total, grads.to(DEVICE), inputs.to(DEVICE), None, layout=small_plan(2, 3))
    finite = total.isfinite()
    assert not finite[2].any()
    assert not finite[:, 39].any()
    assert finite[[0, 1, 3, 4], :39].all()


RAGGED = {
    "unequal": [3, 0, 40, 16, 1, 17],
    "equal": [5, 5, 5],
    "one": [37],
    "empty_ends": [0, 20, 0],
}


@every_dtype
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("splits", [1, 2])
def test_samples_of_unequal_length(lengths, splits, dtype):
    rows, columns, count = 19, 35, min(splits, len(lengths))
    grads, inputs = (random(sum(lengths), size, dtype=dtype) for size in (rows, columns))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    sum_dtype = compute_dtype(dtype)
    total = torch.zeros(rows, columns, dtype=sum_dtype, device=DEVICE)
    bias_total = torch.zeros(rows, dtype=sum_dtype, device=DEVICE)
    layout = Plan(TILE, Split(count, 0, count, 0, cuts_samples=False))
    add_ragged_squared_product_(
        total, grads.to(DEVICE), inputs.to(DEVICE), offsets.to(DEVICE), bias_total, layout=layout
    )
    longest = max(lengths)
    padded = [
        torch.stack([torch.cat([part, part.new_zeros(longest - len(part), part.shape[1])])
                     for part in operand.split(lengths)])
        for operand in (grads, inputs)
    ]  # fmt: skip
    more = tensor_core_roundings(padded[0])
    assert_within(total.cpu(), *one_sample_at_a_time(*padded, more), "total")
    ones = torch.ones(len(lengths), longest, 1)
    exact, budget = one_sample_at_a_time(padded[0], ones)
    assert_within(bias_total.cpu(), exact[:, 0], budget[:, 0], "bias")


def test_shares_of_a_ragged_product_never_cut_a_sample():
    cutting = Plan(TILE, Split(8, 1, 4, 4, cuts_samples=True))
    grads, inputs = random(2, 40, 6), random(2, 40, 5)
    total = torch.zeros(6, 5, device=DEVICE)
    offsets = torch.tensor([0, 40, 80], device=DEVICE)
    rows = [operand.flatten(0, 1).to(DEVICE) for operand in (grads, inputs)]
    add_ragged_squared_product_(total, *rows, offsets, None, layout=cutting)
    more = tensor_core_roundings(grads)
    assert_within(total.cpu(), *one_sample_at_a_time(grads, inputs, more), "total")


def test_the_rules_layout_of_samples_of_unequal_length_adds_the_same():
    grads, inputs = random(30, 6), random(30, 5)
    total = torch.zeros(6, 5, device=DEVICE)
    offsets = torch.tensor([0, 10, 30], device=DEVICE)
    add_ragged_squared_product_(total, grads.to(DEVICE), inputs.to(DEVICE), offsets, None)
    padded = [
        torch.stack([torch.cat([operand[:10], torch.zeros(10, operand.shape[1])]), operand[10:]])
        for operand in (grads, inputs)
    ]
    more = tensor_core_roundings(padded[0])
    assert_within(total.cpu(), *one_sample_at_a_time(*padded, more), "total")
