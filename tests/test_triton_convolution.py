"""The Triton kernels of convolutions against one sample at a time in float64."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_within, u
from test_squared_product import CONVOLUTIONS, bias_exact, convolution, unfolded
from torch import Tensor

pytest.importorskip("triton")

from ewc_fast import functional
from ewc_fast._triton import squared_convolution, squared_depthwise
from ewc_fast._triton.blocks import Geometry, blocks_of
from ewc_fast._triton.shares import share_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Small ones, so that few numbers cross their borders: rows, columns, positions, warps.
TILE = squared_convolution.Tile(16, 32, 32, 4)
DEPTHWISE = {name: case for name, case in CONVOLUTIONS.items() if "depthwise" in name}
OTHERS = {name: case for name, case in CONVOLUTIONS.items() if name not in DEPTHWISE} | {
    # channels of inputs and grads, groups, size, kernel, stride, padding, dilation
    "1d_one_position": (17, 18, 1, (3,), (3,), (1,), (0,), (1,)),
    "2d_groups_of_few": (8, 12, 4, (5, 6), (3, 2), (1, 2), (1, 0), (1, 1)),
    "2d_groups_of_a_tile": (32, 34, 2, (5, 4), (2, 2), (1, 1), (1, 1), (1, 1)),
}


def deep(geometry, *tensors: Tensor) -> tuple[Geometry, list[Tensor]]:
    """Return a geometry and tensors in three dimensions."""
    missing = 3 - len(geometry["stride"])
    numbers = [
        (neutral,) * missing + geometry[name]
        for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    images = [t.reshape(*t.shape[:2], *[1] * missing, *t.shape[2:]) for t in tensors]
    return Geometry(*numbers), images


def run(case, dtype=torch.float32, lay_out=lambda t: t, programs=1, samples=2):
    """Add a case's squares to totals that are not zero; return what it added, and the operands."""
    grads, inputs, total, geometry = convolution(case, dtype, samples)
    grads, inputs = lay_out(grads).to(DEVICE), lay_out(inputs).to(DEVICE)
    total, bias_total = torch.rand_like(total), torch.rand(len(total))
    before = total.clone(), bias_total.clone()
    total, bias_total = total.to(DEVICE), bias_total.to(DEVICE)
    numbers, images = deep(geometry, total, grads, inputs)
    if inputs.shape[1] == geometry["groups"] > 1:
        squared_depthwise.accumulate_squared_depthwise_(
            *images, bias_total, numbers, lanes=1024, programs=programs
        )
    else:
        squared_convolution.accumulate_squared_convolution_(
            *images, bias_total, numbers, geometry["groups"], TILE, programs
        )
    return (total.cpu(), bias_total.cpu()), before, (grads.cpu(), inputs.cpu(), geometry)


def assert_right(found, before, operands, what="") -> None:
    grads, inputs, geometry = operands
    unit = u(torch.float32)
    for name, total, old, (exact, budget) in zip(
        ("total", "bias"),
        found,
        before,
        (unfolded(grads, inputs, before[0], geometry), bias_exact(grads)),
        strict=True,
    ):
        # one more rounding for each share that is added
        added = old.double() + exact
        assert_within(total, added, budget + (len(grads) + 2) * unit * added, f"{what}{name}")


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_convolutions_add_squared_gradients_of_every_sample(case):
    assert_right(*run(case))


@pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE)
def test_depthwise_convolutions_do_so_too(case):
    assert_right(*run(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["1d_dilated", "2d_groups_of_a_tile", "3d_depthwise"])
def test_half_precision_is_added_up_in_float32(name, dtype):
    assert_right(*run((OTHERS | DEPTHWISE)[name], dtype))


BY_NAME = {
    "runs_of_channels": ((32, 16, 1, (5, 6), (2, 2), (1, 1), (1, 0), (1, 1)), torch.bfloat16),
    "float64": ((3, 5, 1, (9,), (3,), (2,), (1,), (1,)), torch.float64),
    "depthwise": ((5, 5, 5, (9,), (3,), (1,), (1,), (1,)), torch.float64),
}


@pytest.mark.parametrize(("case", "dtype"), BY_NAME.values(), ids=BY_NAME)
def test_triton_is_taken_by_name_with_tiles_of_its_own_choice(case, dtype):
    grads, inputs, total, geometry = convolution(case, dtype, 2)
    bias_total = total.new_zeros(len(total)).to(DEVICE)
    found = total.to(DEVICE)
    functional.accumulate_squared_convolution_(
        found, grads.to(DEVICE), inputs.to(DEVICE), **geometry, bias_total=bias_total, impl="triton"
    )
    assert_within(found.cpu(), *unfolded(grads, inputs, total, geometry), "total")
    assert_within(bias_total.cpu(), *bias_exact(grads), "bias")


LAYOUTS = {
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "some_channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one_sample_for_all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["2d_groups", "3d_depthwise", "2d_groups_of_a_tile"])
def test_operands_may_have_any_strides(name, lay_out):
    assert_right(*run((OTHERS | DEPTHWISE)[name], lay_out=lay_out))


@pytest.mark.parametrize("programs", [4, 36])
@pytest.mark.parametrize("name", ["2d_few_channels", "3d_depthwise", "3d"])
def test_samples_and_parts_of_samples_are_shared_out(name, programs):
    """Few programs get some samples each, many parts of one, each position's at most."""
    assert_right(*run((OTHERS | DEPTHWISE)[name], programs=programs))


@pytest.mark.parametrize("name", ["2d_groups", "3d_depthwise"])
def test_repeated_runs_give_the_same_bits(name):
    case = (OTHERS | DEPTHWISE)[name]
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(case, programs=18, samples=1)[0])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["2d_groups", "2d_depthwise"])
def test_no_samples_add_nothing(name):
    found, before, _ = run((OTHERS | DEPTHWISE)[name], samples=0)
    assert all(torch.equal(one, other) for one, other in zip(found, before, strict=True))


@pytest.mark.parametrize(
    ("size", "positions", "block"),
    [
        ((1, 56, 56), 64, (1, 8, 8)),
        ((1, 7, 7), 64, (1, 8, 8)),
        ((1, 1, 1000), 64, (1, 1, 64)),
        ((8, 4, 4), 64, (4, 4, 4)),
        ((1, 1, 1), 16, (1, 1, 16)),
    ],
)
def test_blocks_cover_an_image_with_few_positions_to_spare(size, positions, block):
    assert blocks_of(size, positions) == block


def test_shares_cover_all_samples_and_steps_once():
    for samples in (1, 2, 7, 100):
        for steps in (1, 3, 50):
            for programs in (1, 8, 64, 1000):
                shares = share_out(samples, steps, 3, programs)
                taken = [
                    (sample, step)
                    for share in range(shares.count)
                    for sample in range(
                        share // shares.parts * shares.samples,
                        min(samples, (share // shares.parts + 1) * shares.samples),
                    )
                    for step in range(
                        share % shares.parts * shares.steps,
                        min(steps, (share % shares.parts + 1) * shares.steps),
                    )
                ]
                assert sorted(taken) == [(n, s) for n in range(samples) for s in range(steps)]
                assert len(taken) == len(set(taken))
