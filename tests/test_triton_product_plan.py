"""How the squared product is laid out on a GPU: the rules, as pure functions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ewc_fast._triton.precision import float32_precision
from ewc_fast._triton.product_plan import (
    Operand,
    Tile,
    dot,
    plan,
    split,
    tiles_of,
    with_fewest_steps,
)


def test_tf32_is_used_only_where_pytorch_was_told_to():
    matmul = torch.backends.cuda.matmul
    assert float32_precision() == "tf32x3"
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, setting)
    try:
        setattr(matmul, setting, "tf32" if setting == "fp32_precision" else True)
        assert float32_precision() == "tf32"
    finally:
        setattr(matmul, setting, before)


def test_factors_are_multiplied_exactly_or_as_asked():
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert dot(brain, brain, False, "tf32x3") == ("tf32", False)  # not rounded: it is native
    assert dot(half, brain, False, "tf32x3") == ("tf32", True)
    assert dot(single, single, False, "tf32x3") == ("tf32x3", True)
    assert dot(single, brain, False, "tf32") == ("tf32", True)
    assert dot(brain, brain, True, "tf32") == ("tf32x3", True)  # squares need more digits
    assert dot(torch.float64, torch.float64, True, "tf32") == ("ieee", False)


@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "float16"])
def test_squares_of_half_precision_are_two_parts_of_tf32(bits):
    """What the error budget of one position rests on: the two parts lose nothing."""
    numbers = torch.randn(10000).to(torch.bfloat16 if bits == 8 else torch.float16).float()
    square = numbers * numbers
    large = rounded_to_11_bits(square)
    assert torch.equal(rounded_to_11_bits(square - large), square - large)
    assert ((square - large).abs() <= 2**-11 * square).all()


def rounded_to_11_bits(x: Tensor) -> Tensor:
    """Round a float32 half away from zero, as tensor cores' TF32 is."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_vectors_are_as_wide_as_everything_allows():
    def vector(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Operand:
        return Operand.of(torch.empty(shape, dtype=dtype))

    assert vector(2, 3, 64) == Operand(1, 8, (24, 8, 1))
    assert vector(2, 3, 1000).vector == 8
    assert vector(2, 3, 12).vector == 4
    assert vector(2, 3, 7).vector == 1
    assert vector(2, 3, 64, dtype=torch.float32).vector == 4
    assert Operand.of(torch.empty(2, 64, 48).transpose(1, 2)) == Operand(0, 4, (768, 1, 12))
    assert Operand.of(torch.empty(1, 5, 64).expand(7, 5, 64)).strides == (0, 16, 1)
    assert Operand.of(torch.empty(6 * 64 + 1, dtype=torch.float16)[1:].view(2, 3, 64)).vector == 1


def test_the_plan_fills_the_chip_and_covers_everything():
    sizes = itertools.product((1, 3, 100), (1, 40, 2048), (10, 300, 4096), (64, 4096), (1, 132))
    tiles = tiles_of(torch.bfloat16, "tf32", False, 16)
    for samples, positions, rows, columns, processors in sizes:
        found = plan(tiles, samples, positions, rows, columns, processors)
        share, count = found.split, found.tile.count(rows, columns)
        steps = samples * -(-positions // found.tile.positions)
        assert share.count * count <= max(count, 2 * processors)
        groups = share.count // share.chunks
        assert groups * share.group_steps == steps
        assert (share.chunks - 1) * share.steps < share.group_steps <= share.chunks * share.steps
        assert share.cuts_samples == (groups == samples and share.chunks > 1 and share.steps
                                      < -(-positions // found.tile.positions))  # fmt: skip


def test_steps_are_short_for_few_positions():
    tile = Tile(128, 128, 64, 8)
    assert [with_fewest_steps(tile, t).positions for t in (1, 5, 65, 197, 2048)] == [
        16, 16, 32, 32, 64,
    ]  # fmt: skip


def test_the_goals_layout():
    """At O = I = 4096, 8 samples of 2048 positions in bfloat16 on 132 multiprocessors."""
    found = plan(tiles_of(torch.bfloat16, "tf32", False, 16), 8, 2048, 4096, 4096, 132)
    assert found.tile == Tile(128, 128, 64, 8)
    assert found.split.count == 1
    assert split(8, 32, 36, 132).count == 3
