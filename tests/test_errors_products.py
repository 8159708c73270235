"""Squared products refuse what they can't take, in the user's words, and write nothing."""

from __future__ import annotations

import pytest
import torch

from ewc_fast import functional
from ewc_fast._native import core, reader

PRODUCT = {
    "total": lambda: torch.zeros(4, 5),
    "grads": lambda: torch.ones(2, 3, 4),
    "inputs": lambda: torch.ones(2, 3, 5),
    "bias_total": lambda: torch.zeros(4),
}
CONVOLUTION = {
    "total": lambda: torch.zeros(4, 3, 3, 3),
    "grads": lambda: torch.ones(2, 4, 8, 8),
    "inputs": lambda: torch.ones(2, 6, 8, 8),
    "bias_total": lambda: torch.zeros(4),
    "stride": lambda: 1,
    "padding": lambda: 1,
    "dilation": lambda: 1,
    "groups": lambda: 2,
}
SHARED = torch.ones(200)

BAD_PRODUCTS = {
    "no_tensor": ({"grads": [1.0]}, TypeError, "grads: expected a torch.Tensor, got list"),
    "sparse": ({"inputs": torch.ones(2, 3).to_sparse()}, TypeError, "inputs: expected a dense"),
    "integers": ({"grads": torch.ones(2, 3, 4).int()}, TypeError, "grads: expected a floating"),
    "half_total": ({"total": torch.zeros(4, 5).half()}, TypeError, "total: expected float32"),
    "double_total": ({"total": torch.zeros(4, 5).double()}, TypeError, "total: expected float32"),
    "double_inputs": ({"inputs": torch.ones(2, 3, 5).double()}, TypeError, "inputs: expected a dt"),
    "double_bias": ({"bias_total": torch.zeros(4).double()}, TypeError, "bias_total: expected fl"),
    "device": ({"grads": torch.ones(2, 3, 4, device="meta")}, ValueError, "grads: expected device"),
    "dimensions": ({"grads": torch.ones(2, 4)}, ValueError, r"grads: expected 3 dimensions \(N, T"),
    "samples": ({"inputs": torch.ones(1, 3, 5)}, ValueError, r"inputs: expected shape \(2, 3, 5\)"),
    "positions": ({"inputs": torch.ones(2, 1, 5)}, ValueError, r"inputs: expected shape \(2, 3"),
    "rows": ({"grads": torch.ones(2, 3, 5)}, ValueError, r"total: expected shape \(5, 5\)"),
    "bias_shape": ({"bias_total": torch.zeros(1)}, ValueError, r"bias_total: expected shape \(4,"),
    "columns_apart": ({"total": torch.zeros(5, 4).t()}, ValueError, "total: expected contiguous"),
    "expanded_total": ({"total": torch.zeros(1, 5).expand(4, 5)}, ValueError, "total: expected el"),
    "expanded_bias": ({"bias_total": torch.zeros(1).expand(4)}, ValueError, "bias_total: expected"),
    "shares_memory": (
        {"total": SHARED[:20].view(4, 5), "grads": SHARED[19:43].view(2, 3, 4)},
        ValueError,
        "total: expected memory of its own, .* with grads; pass a clone",
    ),
    "bias_shares_memory": (
        {"total": SHARED[:20].view(4, 5), "bias_total": SHARED[19:23]},
        ValueError,
        "shares memory with",
    ),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of"),
    "cuda": ({"impl": "cuda"}, ValueError, "impl='cuda' works on cuda tensors"),
}
BAD_CONVOLUTIONS = {
    "no_dimension": (
        {"inputs": torch.ones(2, 6)},
        ValueError,
        r"inputs: expected \(N, I, \*size\)",
    ),
    "dimensions": ({"grads": torch.ones(2, 4, 8)}, ValueError, "grads: expected 4 dimensions"),
    "stride": ({"stride": 0}, ValueError, "stride: expected 2 integers >= 1"),
    "padding": ({"padding": -1}, ValueError, "padding: expected 2 integers >= 0"),
    "padding_name": ({"padding": "same"}, TypeError, "padding: expected an integer"),
    "dilation": ({"dilation": (1,)}, ValueError, "dilation: expected 2 integers"),
    "groups": ({"groups": 4}, ValueError, "groups: expected a divisor of the channels"),
    "groups_kind": ({"groups": 1.0}, TypeError, "groups: expected an integer"),
    "groups_of_total": ({"groups": 1}, ValueError, r"total: expected shape \(4, 6, 3, 3\)"),
    "samples": ({"grads": torch.ones(3, 4, 8, 8)}, ValueError, r"grads: expected shape \(2, 4"),
    "too_few_positions": ({"stride": 2, "padding": 3}, ValueError, "grads: expected positions"),
    "too_many_positions": ({"padding": 0}, ValueError, r"grads: expected positions \(6, 6\)"),
    "empty_kernel": ({"total": torch.zeros(4, 3, 0, 3)}, ValueError, "total: expected a kernel"),
    "bias_shape": ({"bias_total": torch.zeros(3)}, ValueError, "bias_total: expected shape"),
    "total_strides": (
        {"total": torch.zeros(4, 3, 3, 3).transpose(2, 3)},
        ValueError,
        "total: expected a contiguous tensor",
    ),
    "shares_memory": (
        {"total": SHARED[:108].view(4, 3, 3, 3), "bias_total": SHARED[:4]},
        ValueError,
        "shares memory",
    ),
}


def refuses(operation, good, bad, error, message):
    arguments = {name: make() for name, make in good.items()} | bad
    before = SHARED.clone()
    with pytest.raises(error, match=message):
        operation(**arguments)
    for name in ("total", "bias_total"):
        written = arguments[name]
        if name not in bad:
            assert not written.any(), f"{name} was written"
    assert torch.equal(SHARED, before)


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PRODUCTS.values(), ids=BAD_PRODUCTS)
def test_a_bad_product_is_refused(bad, error, message):
    refuses(functional.accumulate_squared_product_, PRODUCT, bad, error, message)


@pytest.mark.parametrize(
    ("bad", "error", "message"), BAD_CONVOLUTIONS.values(), ids=BAD_CONVOLUTIONS
)
def test_a_bad_convolution_is_refused(bad, error, message):
    refuses(functional.accumulate_squared_convolution_, CONVOLUTION, bad, error, message)


def test_the_good_ones_are_taken():
    for operation, good in (
        (functional.accumulate_squared_product_, PRODUCT),
        (functional.accumulate_squared_convolution_, CONVOLUTION),
    ):
        arguments = {name: make() for name, make in good.items()}
        operation(**arguments)
        assert arguments["total"].all()
        assert arguments["bias_total"].all()


@pytest.mark.parametrize(
    ("total", "grads", "inputs", "bias"),
    [
        ((4, 5), (2, 3, 3), (2, 3, 5), (4,)),
        ((4, 5), (2, 3, 4), (2, 3, 6), (4,)),
        ((4, 5), (2, 3, 4), (1, 3, 5), (4,)),
        ((4, 5), (2, 3, 4), (2, 2, 5), (4,)),
        ((4, 5), (2, 3, 4), (2, 3, 5), (3,)),
    ],
    ids=str,
)
def test_the_core_itself_touches_nothing_outside_the_tensors(total, grads, inputs, bias):
    tensors = [torch.zeros(shape) for shape in (total, grads, inputs, bias)]
    with pytest.raises(ValueError, match="expected"):
        core.squared_product(reader, *tensors, 1)


@pytest.mark.parametrize(
    ("total", "grads", "inputs", "padding"),
    [
        ((4, 3, 1, 3, 3), (2, 4, 1, 9, 8), (2, 3, 1, 8, 8), (0, 1, 1)),
        ((4, 3, 1, 3, 3), (2, 5, 1, 8, 8), (2, 3, 1, 8, 8), (0, 1, 1)),
        ((4, 3, 1, 3, 3), (2, 4, 1, 8, 8), (2, 4, 1, 8, 8), (0, 1, 1)),
        ((4, 3, 1, 3, 3), (2, 4, 1, 8, 8), (1, 3, 1, 8, 8), (0, 1, 1)),
        ((4, 3, 1, 3, 3), (2, 4, 1, 8, 8), (2, 3, 1, 8, 8), (0, -1, 1)),
        ((4, 3, 1, 0, 3), (2, 4, 1, 8, 8), (2, 3, 1, 8, 8), (0, 1, 1)),
    ],
    ids=str,
)
def test_the_core_itself_reads_nothing_outside_the_image(total, grads, inputs, padding):
    tensors = [torch.zeros(shape) for shape in (total, grads, inputs)]
    ones = (1, 1, 1)
    with pytest.raises(ValueError, match="expected"):
        core.squared_convolution(reader, *tensors, None, ones, padding, ones, False, 1)
