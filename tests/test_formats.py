"""The 8-bit format is what it says: its grid, its rounding, its range."""

from __future__ import annotations

import math

import pytest
import torch

from ewc_fast.formats import BLOCK, decode_e5m3, encode_e5m3, reencode_e5m3_

# every value of a block, in units of its scale, by the definition
GRID = torch.tensor(
    [0.0] + [2.0 ** (c // 8 - 31) * (1 + c % 8 / 8) for c in range(1, 256)]
).double()


def heavy_tailed(n, sigma, *, dtype=torch.float32):
    return torch.exp(sigma * torch.randn(n, dtype=torch.float64)).to(dtype)


def scales_by_element(scales, numel):
    return scales.repeat_interleave(BLOCK)[:numel].double()


def neighbours(values, scales):
    """Return the greatest code's value below or at each value, and the least one above."""
    grid, units = GRID.to(values.device), values.double() / scales
    lower = torch.searchsorted(grid, units, right=True) - 1
    return grid[lower] * scales, grid[(lower + 1).clamp_max(255)] * scales


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 5000])
def test_encoding_takes_the_nearest_code(sigma, numel):
    values = heavy_tailed(numel, sigma)
    codes, scales = encode_e5m3(values)
    assert codes.dtype == torch.uint8
    assert scales.shape == (math.ceil(numel / BLOCK),)
    by_element = scales_by_element(scales, numel)
    lower, upper = neighbours(values, by_element)
    nearest = torch.minimum(values.double() - lower, (upper - values.double()).abs())
    error = (decode_e5m3(codes, scales).double() - values.double()).abs()
    assert torch.equal(error, nearest)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_the_relative_error_is_a_seventeenth_at_most_and_2_2_percent_in_the_middle(sigma):
    values = heavy_tailed(200_000, sigma)
    decoded = decode_e5m3(*encode_e5m3(values))
    kept = decoded > 0
    error = ((decoded - values).abs() / values)[kept]
    in_range = values[kept] >= 1.125 * 2.0**-31 * values.max()
    assert error[in_range].max() <= 1 / 17 * (1 + 1e-6)
    assert error.median().item() == pytest.approx(0.0217, abs=0.0005)
    assert 1 - kept.double().mean().item() <= (0.007 if sigma == 4.0 else 0.0)


def test_the_scale_is_the_least_power_of_two_that_takes_the_largest_entry():
    largest = torch.tensor([1.0, 1.875, 1.8751, 1.9999, 2.0, 3e-39, 1e-45, 2.0**126]).double()
    for value in largest.float():
        codes, scales = encode_e5m3(value.reshape(1))
        assert math.frexp(scales.item())[0] == 0.5
        assert value <= 1.875 * scales.item()
        assert value > 1.875 * scales.item() / 2 or scales.item() == 2.0**-149
        assert abs(decode_e5m3(codes, scales).item() - value.item()) <= value.item() / 17


def test_a_block_spans_31_binary_orders_and_rounds_to_0_only_below_half_the_smallest_code():
    smallest = 1.125 * 2.0**-31
    values = torch.tensor([1.0, smallest, 0.51 * smallest, 0.49 * smallest, 0.0])
    decoded = decode_e5m3(*encode_e5m3(values))
    assert decoded.tolist() == [1.0, smallest, smallest, 0.0, 0.0]


def test_zeros_stay_zeros_and_denormals_are_kept():
    assert decode_e5m3(*encode_e5m3(torch.zeros(300))).tolist() == [0.0] * 300
    denormals = torch.tensor([1e-45, 3e-39, 0.0, 1.1e-38])
    decoded = decode_e5m3(*encode_e5m3(denormals))
    spacing = 2.0**-149
    assert ((decoded - denormals).abs() <= denormals / 17 + spacing).all()
    assert decoded[2] == 0
    assert (decoded[[0, 1, 3]] > 0).all()


def test_the_largest_float_is_kept_as_the_largest_code():
    assert decode_e5m3(*encode_e5m3(torch.tensor([torch.finfo(torch.float32).max]))).item() == (
        1.875 * 2.0**127
    )


@pytest.mark.parametrize("bad", [-1e-30, math.inf, math.nan], ids=str)
def test_negative_infinite_and_undefined_values_are_refused(bad):
    values = torch.ones(400)
    values[300] = bad
    with pytest.raises(ValueError, match=r"values: expected finite entries >= 0.*got entries"):
        encode_e5m3(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_encoding_what_was_decoded_changes_nothing(dtype):
    decoded = decode_e5m3(*encode_e5m3(heavy_tailed(10_000, 4.0, dtype=dtype)))
    assert torch.equal(decode_e5m3(*encode_e5m3(decoded)), decoded)


def test_blocks_follow_the_order_of_memory():
    values = heavy_tailed(24 * 32, 2.0).view(24, 32)
    turned = values.t().contiguous().t()  # column by column in memory
    codes, scales = encode_e5m3(turned)
    assert codes.stride() == turned.stride()
    by_memory = encode_e5m3(values.t().contiguous())
    assert torch.equal(codes.t(), by_memory[0])
    assert torch.equal(scales, by_memory[1])
    assert torch.equal(decode_e5m3(codes, scales), decode_e5m3(*by_memory).t())


def test_long_tensors_are_encoded_in_stretches_like_short_ones():
    values = heavy_tailed((1 << 20) + 300, 2.0)
    codes, scales = encode_e5m3(values)
    tail = encode_e5m3(values[1 << 20 :])
    assert torch.equal(codes[1 << 20 :], tail[0])
    assert torch.equal(scales[-2:], tail[1])
    assert torch.equal(decode_e5m3(codes, scales)[1 << 20 :], decode_e5m3(*tail))


def test_a_sum_goes_to_a_neighbour_by_chance_and_is_right_on_average():
    value, runs = 1.03, 20_000  # between 1 and 1.125
    codes, scales = encode_e5m3(torch.ones(runs))
    reencode_e5m3_(codes, scales, torch.full((runs,), value), seed=3)
    decoded = decode_e5m3(codes, scales)
    assert set(decoded.tolist()) == {1.0, 1.125}
    spread = 0.125 / 2 / math.sqrt(runs)
    assert abs(decoded.mean().item() - value) < 5 * spread


def test_a_sum_below_the_smallest_code_is_right_on_average():
    smallest, runs = 1.125 * 2.0**-31, 255 * 40
    before = torch.full((runs,), smallest)
    before[::BLOCK] = 1.0
    codes, scales = encode_e5m3(before)
    reencode_e5m3_(codes, scales, torch.where(before == 1, 1.0, 0.25 * smallest), seed=5)
    decoded = decode_e5m3(codes, scales)[before != 1]
    assert set(decoded.tolist()) == {0.0, smallest}
    assert (decoded.mean() / smallest).item() == pytest.approx(0.25, abs=5 * 0.5 / math.sqrt(runs))


def test_what_was_zero_is_rounded_to_nearest():
    values = heavy_tailed(1000, 2.0)
    codes, scales = encode_e5m3(torch.zeros(1000))
    reencode_e5m3_(codes, scales, values, seed=1)
    error = (decode_e5m3(codes, scales) - values).abs()
    assert (error <= values / 17 * (1 + 1e-6)).all()


def test_the_seed_repeats_a_sum():
    values = heavy_tailed(1000, 2.0)
    states = []
    for seed in (1, 1, 2):
        codes, scales = encode_e5m3(values)
        reencode_e5m3_(codes, scales, values * 1.01, seed=seed)
        states.append(codes)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
