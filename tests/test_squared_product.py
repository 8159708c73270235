"""Squared products against one sample at a time in float64, and what they promise besides."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import every_dtype
from numerics import assert_within, compute_dtype, smallest, u
from torch import Tensor

from ewc_fast import functional, reference
from ewc_fast._dispatch import product_way
from ewc_fast._native import core, reader
from ewc_fast.products import by_library

pytestmark = pytest.mark.usefixtures("one_thread")

every_level = pytest.mark.parametrize(
    "level", range(len(core.vector_levels)), ids=core.vector_levels
)
every_impl = pytest.mark.parametrize("impl", ["cpu", "auto", "reference"])


def one_sample_at_a_time(
    grads: Tensor, inputs: Tensor, more_roundings: int = 0
) -> tuple[Tensor, Tensor]:
    """Return sum_n (g_n^T a_n)^2 in float64, and how much rounding may cost it.

    A sum of T products, in any order, is wrong by at most (T + 1) u sum |g a|; its square by twice
    that times the sum, and the square of the error; N squares are then added. ``more_roundings``
    are those that a product may take part in beside.
    """
    unit = u(compute_dtype(grads.dtype))
    samples, positions = grads.shape[:2]
    exact = torch.zeros(grads.shape[2], inputs.shape[2], dtype=torch.float64)
    budget = torch.zeros_like(exact)
    for g, a in zip(grads.double(), inputs.double(), strict=True):
        product = g.t() @ a
        error = (positions + 1 + more_roundings) * unit * (g.abs().t() @ a.abs())
        exact += product.square()
        budget += 2 * product.abs() * error + error.square()
    return exact, budget + (samples + 4) * unit * exact + smallest(torch.float32)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_adds(
    run, grads: Tensor, inputs: Tensor, what: str = "total", more_roundings: int = 0
) -> None:
    """Assert that ``run(total, bias_total)`` adds the squared products to what was there."""
    dtype = compute_dtype(grads.dtype)
    total = torch.rand(grads.shape[2], inputs.shape[2], dtype=dtype)
    bias_total = torch.rand(grads.shape[2], dtype=dtype)
    before, bias_before = total.double().clone(), bias_total.double().clone()
    run(total, bias_total)
    exact, budget = one_sample_at_a_time(grads, inputs, more_roundings)
    # blocks are added one by one, each rounded to the total's last place
    blocks = grads.shape[0] * max(1, grads.shape[1] // 100) + 2
    added = before + exact
    assert_within(total, added, budget + blocks * u(dtype) * added, what)
    ones = inputs.new_ones(*inputs.shape[:2], 1)
    exact, budget = (column[:, 0] for column in one_sample_at_a_time(grads, ones))
    added = bias_before + exact
    assert_within(bias_total, added, budget + blocks * u(dtype) * added, f"bias of {what}")


# samples, positions, rows, columns: smaller and larger than tiles (12 x 32) and blocks (768)
SIZES = [
    (1, 1, 1, 1),
    (3, 1, 2, 3),
    (17, 1, 17, 31),
    (5, 2, 3, 17),
    (2, 3, 1, 33),
    (7, 5, 13, 1),
    (4, 7, 25, 37),
    (3, 17, 48, 64),
    (800, 1, 7, 5),
    (2000, 1, 29, 40),
    (1600, 2, 5, 19),
    (3, 400, 13, 17),
    (2, 768, 12, 32),
    (2, 769, 5, 40),
    (2, 1601, 26, 35),
    (1, 61, 131, 257),
]


@every_level
@every_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_adds_squares_of_sums_over_positions(size, dtype, level):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows, dtype=dtype)
    inputs = random(samples, positions, columns, dtype=dtype)

    def run(total: Tensor, bias_total: Tensor) -> None:
        core.squared_product(reader, total, grads, inputs, bias_total, 1, level)

    assert_adds(run, grads, inputs, core.vector_levels[level])


@every_impl
@every_dtype
@pytest.mark.parametrize("size", [(3, 1, 5, 6), (5, 4, 3, 7), (2, 900, 3, 4)], ids=str)
def test_every_implementation_adds_the_same(size, dtype, impl):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows, dtype=dtype)
    inputs = random(samples, positions, columns, dtype=dtype)

    def run(total: Tensor, bias_total: Tensor) -> None:
        functional.accumulate_squared_product_(
            total, grads, inputs, bias_total=bias_total, impl=impl
        )

    assert_adds(run, grads, inputs)


@every_dtype
@pytest.mark.parametrize("size", [(9, 1, 5, 6), (70, 4, 100, 90)], ids=str)
def test_the_librarys_products_add_the_same(size, dtype):
    samples, positions, rows, columns = size
    grads = random(samples, positions, rows, dtype=dtype)
    inputs = random(samples, positions, columns, dtype=dtype)
    assert_adds(lambda total, bias: by_library(total, grads, inputs, bias), grads, inputs)


def test_the_rule_depends_on_sizes_and_dtype_alone():
    sizes = itertools.product((1, 100), (1, 100), (1, 500), (1, 500))
    for samples, positions, rows, columns in sizes:
        way = product_way(samples, positions, rows, columns, torch.float32)
        assert way in ("kernel", "library")


STRIDES = {
    "expanded_samples": lambda t: t[:1].expand(t.shape),
    "expanded_positions": lambda t: t[:, :1].expand(t.shape),
    "transposed": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "positions_contiguous": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda t: t.repeat(1, 2, 2)[:, ::2, ::2],
    "misaligned": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
    "with_an_offset": lambda t: torch.cat([t, t])[t.shape[0] - 1 : 2 * t.shape[0] - 1],
}


@every_dtype
@pytest.mark.parametrize("positions", [1, 19])
@pytest.mark.parametrize("lay_out", STRIDES.values(), ids=STRIDES)
def test_operands_may_have_any_strides(lay_out, positions, dtype):
    grads = lay_out(random(5, positions, 29, dtype=dtype))
    inputs = lay_out(random(5, positions, 43, dtype=dtype))

    def run(total: Tensor, bias_total: Tensor) -> None:
        functional.accumulate_squared_product_(
            total, grads, inputs, bias_total=bias_total, impl="cpu"
        )

    assert_adds(run, grads, inputs)


def test_rows_of_the_total_may_lie_apart_and_nothing_between_is_touched():
    grads, inputs = random(4, 9, 14), random(4, 9, 35)
    room = torch.full((14, 50), 7.0)
    bias_room = torch.full((28,), 7.0)
    total, bias_total = room[:, 5:40].zero_(), bias_room[::2].zero_()
    functional.accumulate_squared_product_(total, grads, inputs, bias_total=bias_total, impl="cpu")
    exact, budget = one_sample_at_a_time(grads, inputs)
    assert_within(total, exact, budget, "total")
    assert torch.equal(room[:, :5], torch.full((14, 5), 7.0))
    assert torch.equal(room[:, 40:], torch.full((14, 10), 7.0))
    assert torch.equal(bias_room[1::2], torch.full((14,), 7.0))


@every_impl
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty_dimensions_add_nothing_but_the_bias(size, impl):
    samples, positions, rows, columns = size
    grads, inputs = random(samples, positions, rows), random(samples, positions, columns)
    total, bias_total = torch.ones(rows, columns), torch.ones(rows)
    functional.accumulate_squared_product_(total, grads, inputs, bias_total=bias_total, impl=impl)
    assert torch.equal(total, torch.ones(rows, columns))
    added = 1 + grads.sum(1).square().sum(0)
    assert torch.allclose(bias_total, added)


def test_infinities_and_nan_reach_only_their_rows():
    grads, inputs = random(2, 3, 5), random(2, 3, 40)
    grads[0, 0, 2], inputs[1, 1, 39] = float("nan"), float("inf")
    total = torch.zeros(5, 40)
    functional.accumulate_squared_product_(total, grads, inputs, impl="cpu")
    finite = total.isfinite()
    assert not finite[2].any()
    assert not finite[:, 39].any()
    assert finite[[0, 1, 3, 4], :39].all()


def product_results(threads: int) -> list[Tensor]:
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    found = []
    for samples, positions, rows, columns in (
        (300, 1, 130, 120),
        (9, 100, 61, 200),
        (2, 900, 50, 70),
        (40, 20, 60, 70),
        (60, 30, 47, 33),
    ):
        total, bias_total = torch.zeros(rows, columns), torch.zeros(rows)
        grads, inputs = random(samples, positions, rows), random(samples, positions, columns)
        functional.accumulate_squared_product_(
            total, grads, inputs, bias_total=bias_total, impl="cpu"
        )
        found += [total, bias_total]
    for channels, groups in ((3, 1), (24, 1), (32, 32)):
        total, bias_total = torch.zeros(32, channels // groups, 3, 3), torch.zeros(32)
        functional.accumulate_squared_convolution_(
            total,
            random(7, 32, 16, 16),
            random(7, channels, 16, 16),
            stride=1,
            padding=1,
            dilation=1,
            groups=groups,
            bias_total=bias_total,
        )
        found += [total, bias_total]
    return found


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_results_are_the_same_bits_for_any_number_of_threads(threads):
    for one, several in zip(product_results(1), product_results(threads), strict=True):
        assert torch.equal(one, several)


def test_repeated_calls_with_two_threads_give_the_same_bits():
    grads, inputs = random(40, 20, 60), random(40, 20, 70)
    image, image_grads = random(8, 9, 10, 10), random(8, 16, 10, 10)

    def results() -> tuple[Tensor, ...]:
        total, bias_total = torch.zeros(60, 70), torch.zeros(60)
        functional.accumulate_squared_product_(
            total, grads, inputs, bias_total=bias_total, impl="cpu"
        )
        weight = torch.zeros(16, 9, 3, 3)
        functional.accumulate_squared_convolution_(
            weight, image_grads, image, stride=1, padding=1, dilation=1, groups=1
        )
        return total, bias_total, weight

    first = results()
    torch.set_num_threads(2)
    for _ in range(300):
        for expected, found in zip(first, results(), strict=True):
            assert torch.equal(expected, found)


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# channels of inputs and grads, groups, size, kernel, stride, padding, dilation
CONVOLUTIONS = {
    "1d": (5, 7, 1, (19,), (3,), (1,), (0,), (1,)),
    "1d_dilated": (9, 3, 1, (30,), (5,), (2,), (4,), (3,)),
    "2d_few_channels": (3, 20, 1, (13, 12), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_many_channels": (37, 13, 1, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_stride": (16, 24, 1, (11, 10), (3, 2), (2, 3), (1, 0), (1, 2)),
    "2d_padding_beyond_the_image": (8, 5, 1, (2, 3), (3, 3), (1, 2), (5, 4), (1, 1)),
    "2d_one_by_one": (33, 14, 1, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    "2d_one_by_one_stride": (6, 14, 1, (9, 7), (1, 1), (2, 2), (0, 0), (1, 1)),
    "2d_long": (2, 3, 1, (40, 41), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_long_many": (9, 4, 1, (33, 32), (2, 3), (1, 1), (1, 1), (1, 1)),
    "2d_groups": (20, 6, 2, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_depthwise": (19, 19, 19, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_depthwise_stride": (34, 34, 34, (9, 10), (2, 5), (2, 1), (1, 2), (2, 1)),
    "2d_depthwise_twice": (4, 8, 4, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3d": (2, 5, 1, (5, 6, 7), (2, 3, 3), (1, 1, 2), (1, 0, 1), (1, 2, 1)),
    "3d_many_channels": (10, 3, 1, (4, 5, 4), (3, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    "3d_depthwise": (5, 5, 5, (4, 5, 4), (3, 1, 2), (1, 1, 1), (1, 0, 0), (1, 1, 2)),
}
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def convolution(case, dtype=torch.float32, samples=3):
    """Return a case's grads, inputs, an empty total and the geometry."""
    columns, rows, groups, size, kernel, stride, padding, dilation = case
    inputs = random(samples, columns, *size, dtype=dtype)
    total = torch.zeros(rows, columns // groups, *kernel, dtype=compute_dtype(dtype))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    positions = CONVOLVE[len(size)](inputs.double(), total.double(), None, **geometry).shape
    return random(*positions, dtype=dtype), inputs, total, geometry


def unfolded(grads: Tensor, inputs: Tensor, total: Tensor, geometry) -> tuple[Tensor, Tensor]:
    """Return the oracle and its budget by autograd, one sample at a time.

    The weight's gradient is linear in both, so that of their magnitudes bounds what rounding costs.
    """
    unit, positions = u(total.dtype), grads[0, 0].numel()

    def gradient(g: Tensor, a: Tensor) -> Tensor:
        weight = torch.zeros_like(total, dtype=torch.float64, requires_grad=True)
        output = CONVOLVE[inputs.dim() - 2](a, weight, None, **geometry)
        return torch.autograd.grad(output, weight, g)[0]

    exact = torch.zeros_like(total, dtype=torch.float64)
    budget = torch.zeros_like(exact)
    for g, a in zip(grads.double().split(1), inputs.double().split(1), strict=True):
        product = gradient(g, a)
        error = (positions + 1) * unit * gradient(g.abs(), a.abs())
        exact += product.square()
        budget += 2 * product.abs() * error + error.square()
    return exact, budget + (2 * grads.shape[0] + 6) * unit * exact + smallest(torch.float32)


def bias_exact(grads: Tensor) -> tuple[Tensor, Tensor]:
    flat = grads.flatten(2).transpose(1, 2)
    ones = flat.new_ones(*flat.shape[:2], 1)
    exact, budget = one_sample_at_a_time(flat, ones)
    return exact[:, 0], budget[:, 0] + 8 * u(compute_dtype(grads.dtype)) * exact[:, 0]


@every_impl
@every_dtype
@every_convolution
def test_convolutions_add_squared_gradients_of_every_sample(case, dtype, impl):
    grads, inputs, total, geometry = convolution(case, dtype)
    bias_total = total.new_zeros(len(total))
    functional.accumulate_squared_convolution_(
        total, grads, inputs, **geometry, bias_total=bias_total, impl=impl
    )
    assert_within(total, *unfolded(grads, inputs, total, geometry), "total")
    assert_within(bias_total, *bias_exact(grads), "bias")


@every_level
@pytest.mark.parametrize("name", ["2d_few_channels", "2d_many_channels", "2d_depthwise"])
def test_convolutions_at_every_vector_level(name, level):
    grads, inputs, total, geometry = convolution(CONVOLUTIONS[name])
    deep = [t.unsqueeze(2) for t in (total, grads, inputs)]
    places = [
        (one, *geometry[field]) for field, one in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    depthwise = geometry["groups"] > 1
    core.squared_convolution(reader, *deep, None, *places, depthwise, 1, level)
    assert_within(total, *unfolded(grads, inputs, total, geometry), core.vector_levels[level])


@every_dtype
@pytest.mark.parametrize(
    "name",
    [
        "2d_few_channels",
        "2d_many_channels",
        "2d_one_by_one",
        "2d_groups",
        "2d_depthwise",
        "3d_many_channels",
    ],
)
def test_channels_last_and_strided_images(name, dtype):
    grads, inputs, total, geometry = convolution(CONVOLUTIONS[name], dtype)
    last = torch.channels_last if inputs.dim() == 4 else torch.channels_last_3d
    by_layout = []
    for lay_out in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=last),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    ):
        found = total.clone()
        functional.accumulate_squared_convolution_(
            found, lay_out(grads), lay_out(inputs), **geometry
        )
        by_layout.append(found)
    for found in by_layout:
        assert torch.equal(found, by_layout[0])


def test_channels_last_without_padding_is_read_in_place():
    case = (16, 12, 1, (9, 9), (3, 3), (2, 2), (0, 0), (1, 1))
    grads, inputs, total, geometry = convolution(case)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    functional.accumulate_squared_convolution_(total, grads, inputs, **geometry)
    assert_within(total, *unfolded(grads, inputs, total, geometry), "total")


@pytest.mark.parametrize("output_padding", [0, 1])
def test_a_transposed_convolution_is_one_with_grads_and_inputs_swapped(output_padding):
    stride, padding, dilation = 1, 1, 2
    inputs, weight = random(3, 6, 5, 6), random(6, 4, 3, 3).double()
    options = {"stride": stride, "padding": padding, "dilation": dilation}

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return F.conv_transpose2d(x, w, None, output_padding=output_padding, **options)

    grads = torch.randn_like(layer(inputs.double(), weight)).float()
    exact = torch.zeros_like(weight)
    for x, g in zip(inputs.double().split(1), grads.double().split(1), strict=True):
        w = weight.clone().requires_grad_()
        exact += torch.autograd.grad(layer(x, w), w, g)[0].square()
    total = torch.zeros(6, 4, 3, 3)
    functional.accumulate_squared_convolution_(total, inputs, grads, **options, groups=1)
    assert torch.allclose(total.double(), exact, rtol=1e-4, atol=1e-4)


def test_samples_in_several_chunks_add_up():
    grads, inputs = random(40, 4, 60, 60), random(40, 16, 60, 60)
    total, parts = torch.zeros(4, 16, 3, 3), torch.zeros(4, 16, 3, 3)
    geometry = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    functional.accumulate_squared_convolution_(total, grads, inputs, **geometry)
    for g, a in zip(grads.split(1), inputs.split(1), strict=True):
        functional.accumulate_squared_convolution_(parts, g, a, **geometry)
    assert torch.allclose(total, parts, rtol=1e-5)


def test_references_agree_with_each_other():
    grads, inputs = random(3, 4, 10), random(3, 5, 10)
    product, one_by_one = torch.zeros(4, 5), torch.zeros(4, 5, 1)
    reference.accumulate_squared_product_(
        product, grads.transpose(1, 2), inputs.transpose(1, 2), bias_total=None
    )
    reference.accumulate_squared_convolution_(
        one_by_one,
        grads,
        inputs,
        stride=(1,),
        padding=(0,),
        dilation=(1,),
        groups=1,
        bias_total=None,
    )
    assert torch.allclose(product, one_by_one[..., 0])


def test_autograd_notices_the_write():
    total = torch.ones(2, 3, requires_grad=True)
    squares = (total * total).sum()
    functional.accumulate_squared_product_(total, random(1, 1, 2), random(1, 1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
