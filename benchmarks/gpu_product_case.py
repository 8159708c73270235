"""Squared per-sample products on a GPU: layers, what competes on them, and what is right.

Both the squared product and the layer's ordinary weight gradient need 2 N T O I operations; the
weight gradient, one product over the N T rows, is the rate to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from gpu_timing import OURS
from harness import MismatchError, Provider
from torch import Tensor

from ewc_fast import functional

AUTO, TRITON = f"{OURS}, auto", f"{OURS}, triton"
GRADIENT = "torch weight gradient"
BMM, BMM_FLOAT = "torch bmm, squared, in chunks", "torch bmm into float32, squared, in chunks"
EINSUM, SQUARES = "torch einsum in chunks", "torch product of squares"
UNFOLD, GROUPED = "torch unfold and bmm in chunks", "torch grouped weight gradient in chunks"
CHUNK = 1 << 30  # bytes of per-sample products that PyTorch's compositions may keep

Kind = Literal["bfloat16", "float16", "float32", "tf32"]
Call = Callable[[], object]


@dataclass(frozen=True)
class Precision:
    """How operands are kept and multiplied, and what that may cost the sum of squares.

    Errors are of (F + mean F): a sum near 0 keeps the roundings of its terms. Products of 16-bit
    numbers are exact in float32, so only the order of sums differs, or squares rounded on loading.
    Rounding a sample's product to the operands' own dtype, as PyTorch's do, costs as many of its
    roundings more; those compositions are allowed that.
    """

    dtype: torch.dtype
    ours: float
    library: float


PRECISIONS: dict[Kind, Precision] = {
    "bfloat16": Precision(torch.bfloat16, ours=1e-3, library=8 * 2**-8),
    "float16": Precision(torch.float16, ours=1e-3, library=8 * 2**-11),
    "float32": Precision(torch.float32, ours=1e-4, library=1e-4),
    "tf32": Precision(torch.float32, ours=16 * 2**-11, library=16 * 2**-11),
}


@contextmanager
def multiplied(kind: Kind) -> Iterator[None]:
    """Let float32 products round their operands to TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Linear:
    """A linear layer: outputs, inputs, positions a sample, samples."""

    rows: int
    columns: int
    positions: int
    samples: int
    kind: Kind = "bfloat16"

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}, T {self.positions}, N {self.samples}, {self.kind}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.positions * self.samples

    def providers(self, device: torch.device) -> dict[str, Provider]:
        """Return what competes on it."""
        precision = PRECISIONS[self.kind]
        draw = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=draw, device=device)
        grads = make(self.samples, self.positions, self.rows).to(precision.dtype)
        inputs = make(self.samples, self.positions, self.columns).to(precision.dtype)
        total = torch.zeros(self.rows, self.columns, device=device)
        product = partial(functional.accumulate_squared_product_, total, grads, inputs)
        exact = Exact(total, lambda: _exact_product(grads, inputs))
        found = {
            AUTO: exact.provider(partial(product, impl="auto"), precision.ours),
            TRITON: exact.provider(partial(product, impl="triton"), precision.ours),
            EINSUM: exact.provider(
                lambda: _einsum(total, grads, inputs), precision.library
            ),
            BMM: exact.provider(lambda: _bmm(total, grads, inputs), precision.library),
        }  # fmt: skip
        if precision.dtype.itemsize == 2 and device.type == "cuda":
            found[BMM_FLOAT] = exact.provider(
                lambda: _bmm(total, grads, inputs, out_dtype=torch.float32), precision.library
            )
        if self.positions == 1:
            g, a = grads[:, 0], inputs[:, 0]
            found[SQUARES] = exact.provider(
                lambda: total.add_(g.square().t() @ a.square()), precision.library
            )
        rows, columns = grads.flatten(0, 1), inputs.flatten(0, 1)
        found[GRADIENT] = Provider(lambda: rows.t() @ columns, lambda: None)
        return found


def _exact_product(grads: Tensor, inputs: Tensor) -> Tensor:
    exact = torch.zeros(grads.shape[2], inputs.shape[2], dtype=torch.float64, device=grads.device)
    if grads.shape[1] == 1:
        return exact.addmm_(grads[:, 0].double().square().t(), inputs[:, 0].double().square())
    for g, a in zip(grads, inputs, strict=True):
        exact += (g.double().t() @ a.double()).square_()
    return exact


def _chunks(total: Tensor, *operands: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the operands' samples, so many at a time as the compositions may keep."""
    samples = max(1, CHUNK // max(1, 4 * total.numel()))
    yield from zip(*(operand.split(samples) for operand in operands), strict=True)


def _bmm(total: Tensor, grads: Tensor, inputs: Tensor, **options: torch.dtype) -> None:
    for g, a in _chunks(total, grads, inputs):
        products = torch.bmm(g.transpose(1, 2), a, **options)
        total.add_(products.square().sum(0, dtype=torch.float32))


def _einsum(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    for g, a in _chunks(total, grads, inputs):
        total.add_(torch.einsum("nto,nti->noi", g, a).square().sum(0, dtype=torch.float32))


@dataclass(frozen=True)
class Convolution:
    """A convolution over square images, padded by half its kernel."""

    rows: int
    columns: int
    size: int
    samples: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    kind: Kind = "bfloat16"

    def __str__(self) -> str:
        stride, depth = "/2" * (self.stride == 2), ", depthwise" * (self.groups > 1)
        shape = f"{self.columns}-{self.rows}, {self.samples} x {self.size}^2"
        return f"conv{self.kernel}{stride} {shape}{depth}, {self.kind}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        outputs = self._output_size() ** 2 * self.samples
        return 2 * self.rows * self.columns // self.groups * self.kernel**2 * outputs

    def _output_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def geometry(self) -> dict[str, int]:
        """What the functional operation takes."""
        padding = self.kernel // 2
        return {
            "stride": self.stride, "padding": padding, "dilation": 1, "groups": self.groups,
        }  # fmt: skip

    def providers(self, device: torch.device) -> dict[str, Provider]:
        """Return what competes on it."""
        precision = PRECISIONS[self.kind]
        draw = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=draw, device=device)
        out = self._output_size()
        inputs = make(self.samples, self.columns, self.size, self.size).to(precision.dtype)
        grads = make(self.samples, self.rows, out, out).to(precision.dtype)
        total = torch.zeros(
            self.rows, self.columns // self.groups, self.kernel, self.kernel, device=device
        )
        operation = partial(functional.accumulate_squared_convolution_, **self.geometry)
        call = partial(operation, total, grads, inputs)

        def by_the_reference() -> Tensor:
            exact = torch.zeros_like(total, dtype=torch.float64)
            for g, a in zip(grads.split(8), inputs.split(8), strict=True):
                operation(exact, g.double(), a.double(), impl="reference")
            return exact

        exact = Exact(total, by_the_reference)
        found = {
            AUTO: exact.provider(partial(call, impl="auto"), precision.ours),
            TRITON: exact.provider(partial(call, impl="triton"), precision.ours),
            GROUPED: exact.provider(
                lambda: self._by_groups(total, grads, inputs), precision.library
            ),
        }  # fmt: skip
        if self.groups == 1:
            found[UNFOLD] = exact.provider(
                lambda: self._by_unfolding(total, grads, inputs), precision.library
            )
        weight = total.to(precision.dtype)
        found[GRADIENT] = Provider(
            lambda: self._weight_gradient(grads, inputs, weight, self.groups), lambda: None
        )
        return found

    def _weight_gradient(
        self, grads: Tensor, inputs: Tensor, weight: Tensor, groups: int
    ) -> Tensor:
        step, pad = [self.stride] * 2, [self.kernel // 2] * 2
        found: Tensor = torch.ops.aten.convolution_backward(
            grads, inputs, weight, None, step, pad, [1, 1], False, [0, 0], groups,
            (False, True, False),
        )[1]  # fmt: skip
        return found

    def _by_groups(self, total: Tensor, grads: Tensor, inputs: Tensor) -> None:
        """Samples as groups of one convolution: its weight gradient is theirs, one by one."""
        for g, a in _chunks(total, grads, inputs):
            n = len(g)
            weight = total.new_empty(n * total.shape[0], *total.shape[1:], dtype=g.dtype)
            found = self._weight_gradient(
                g.reshape(1, -1, *g.shape[2:]), a.reshape(1, -1, *a.shape[2:]),
                weight, n * self.groups,
            )  # fmt: skip
            total.add_(found.view(n, *total.shape).square().sum(0, dtype=torch.float32))

    def _by_unfolding(self, total: Tensor, grads: Tensor, inputs: Tensor) -> None:
        patch = self.columns * self.kernel**2
        samples = max(1, CHUNK // (4 * max(patch * self._output_size() ** 2, total.numel())))
        for g, a in zip(grads.split(samples), inputs.split(samples), strict=True):
            patches = F.unfold(a, self.kernel, padding=self.kernel // 2, stride=self.stride)
            products = torch.bmm(g.flatten(2), patches.transpose(1, 2))
            squares = products.square().sum(0, dtype=torch.float32)
            total.add_(squares.view_as(total))


class Exact:
    """The result in float64, made when first asked for, and the largest error of each provider."""

    def __init__(self, total: Tensor, make: Callable[[], Tensor]) -> None:
        self._total, self._make = total, make
        self._exact: Tensor | None = None

    def provider(self, call: Call, tolerance: float) -> Provider:
        """Return a call that adds to the total, with its check."""
        return Provider(call, lambda: self._check(call, tolerance))

    def _check(self, call: Call, tolerance: float) -> None:
        if self._exact is None:
            self._exact = self._make()
        self._total.zero_()
        call()
        error = (self._total.double() - self._exact).abs_()
        worst = (error / (self._exact + self._exact.mean())).amax().item()
        self._total.zero_()
        if not worst <= tolerance:
            raise MismatchError(f"relative error {worst:.1e}, {tolerance:.1e} allowed")
