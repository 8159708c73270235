"""The squared product of linear layers and convolutions, beside their ordinary weight gradient.

Both need the same multiplications: 1 is what squaring per-sample gradients costs when it is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import MismatchError, Provider, Result, measure, script
from torch import Tensor

from ewc_fast import functional
from ewc_fast.products import by_library

KERNEL = "ewc_fast, kernel"
AUTO = "ewc_fast, auto"
LIBRARY = "torch products in chunks, squared"
GRADIENT = "torch weight gradient"
# Squares of sums of up to a thousand products, in float32: two such sums in another order differ
# by less, where samples with sums near 0 do not make up the total, which the mean takes care of.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Linear:
    """A linear layer with several positions a sample."""

    rows: int
    columns: int
    positions: int
    samples: int

    def __str__(self) -> str:
        return f"linear {self.columns}-{self.rows}, {self.samples} x {self.positions}"


@dataclass(frozen=True)
class Convolution:
    """A convolution over square images, padded so that 3 x 3 keeps the size."""

    rows: int
    columns: int
    size: int
    samples: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        return (
            f"conv{self.kernel} {self.columns}-{self.rows}"
            f"{'/2' * (self.stride == 2)}, {self.samples} x {self.size}^2"
        )


LINEAR = (
    Linear(400, 784, 1, 256),
    Linear(2000, 2000, 1, 256),
    Linear(1024, 256, 128, 16),
    Linear(768, 256, 128, 16),
    Linear(256, 1024, 128, 16),
    Linear(1000, 256, 128, 16),
    Linear(576, 192, 65, 64),
    Linear(768, 192, 65, 64),
    Linear(128, 512, 64, 32),
)
CONVOLUTIONS = (
    Convolution(32, 3, 32, 128),
    Convolution(64, 32, 32, 128, stride=2),
    Convolution(128, 64, 16, 128),
    Convolution(64, 64, 32, 32),
    Convolution(128, 128, 16, 32),
    Convolution(256, 256, 8, 32),
    Convolution(512, 512, 4, 32),
)


def suite(quick: bool) -> Result:
    """Measure all layers, or two."""
    result, seconds = Result(), 0.3 if quick else 2.0
    for layer in LINEAR[:1] if quick else LINEAR:
        result.add(str(layer), measure(linear_providers(layer), seconds=seconds), (GRADIENT,))
    for case in CONVOLUTIONS[-1:] if quick else CONVOLUTIONS:
        timings = measure(convolution_providers(case), seconds=seconds)
        result.add(str(case), timings, (GRADIENT,))
    return result


def linear_providers(layer: Linear) -> dict[str, Provider]:
    """Return what competes on a linear layer."""
    draw = torch.Generator().manual_seed(0)
    grads = torch.randn(layer.samples, layer.positions, layer.rows, generator=draw)
    inputs = torch.randn(layer.samples, layer.positions, layer.columns, generator=draw)
    total = torch.zeros(layer.rows, layer.columns)
    product = partial(functional.accumulate_squared_product_, total, grads, inputs)
    wanted = _Wanted(functional.accumulate_squared_product_, total, grads, inputs)
    flat_grads, flat_inputs = grads.flatten(0, 1), inputs.flatten(0, 1)
    squared = {
        KERNEL: partial(product, impl="cpu"),
        AUTO: partial(product, impl="auto"),
        LIBRARY: partial(by_library, total, grads, inputs, None),
    }
    providers = {
        name: Provider(call, partial(wanted.check, total, call)) for name, call in squared.items()
    }
    providers[GRADIENT] = Provider(lambda: torch.mm(flat_grads.t(), flat_inputs), lambda: None)
    return providers


def convolution_providers(case: Convolution) -> dict[str, Provider]:
    """Return what competes on a convolution."""
    draw = torch.Generator().manual_seed(0)
    padding = case.kernel // 2
    inputs = torch.randn(case.samples, case.columns, case.size, case.size, generator=draw)
    weight = torch.zeros(case.rows, case.columns, case.kernel, case.kernel)
    shape = torch.nn.functional.conv2d(inputs, weight, None, case.stride, padding).shape
    grads = torch.randn(shape, generator=draw)
    geometry = {"stride": case.stride, "padding": padding, "dilation": 1, "groups": 1}
    operation = partial(functional.accumulate_squared_convolution_, **geometry)
    total = torch.zeros_like(weight)
    call = partial(operation, total, grads, inputs)

    def weight_gradient() -> object:
        return torch.ops.aten.convolution_backward(
            grads,
            inputs,
            weight,
            None,
            [case.stride] * 2,
            [padding] * 2,
            [1, 1],
            False,
            [0, 0],
            1,
            (False, True, False),
        )

    wanted = _Wanted(operation, total, grads, inputs)
    return {
        KERNEL: Provider(call, partial(wanted.check, total, call)),
        GRADIENT: Provider(weight_gradient, lambda: None),
    }


class _Wanted:
    """The result in float64 by the reference."""

    def __init__(
        self, operation: Callable[..., None], total: Tensor, grads: Tensor, inputs: Tensor
    ) -> None:
        self._exact = torch.zeros_like(total, dtype=torch.float64)
        operation(self._exact, grads.double(), inputs.double(), impl="reference")

    def check(self, total: Tensor, call: Callable[[], None]) -> None:
        """Raise unless a call adds it to ``total``."""
        total.zero_()
        call()
        error = (total - self._exact).abs() / (self._exact + self._exact.mean())
        if not error.amax().item() <= TOLERANCE:
            raise MismatchError(f"relative error {error.amax().item():.1e}")


if __name__ == "__main__":
    script(suite)
