r"""The gradients of a batch's samples with respect to one operand, in the form they come in.

Each form adds :math:`\sum_n g_n^2` to a total without storing all :math:`g_n`, and can also
produce the gradients of a few samples, to be added to those of other uses before squaring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ewc_fast import functional, products
from ewc_fast._checks import state_dtype


class PerSample(Protocol):
    """Gradients of samples with respect to a tensor of some shape."""

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples, (samples, *shape), in the state's dtype."""


@dataclass(frozen=True)
class Dense:
    """Gradients as they are, (N, *shape): of biases, scales, position embeddings."""

    values: Tensor

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        if total.is_contiguous() and total.numel() > 0:
            functional.accumulate_square_(total, _beside(total, self.values).contiguous())
        else:
            total.add_(self.values.to(total.dtype).square().sum(0))

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        return self.values[start:stop].to(state_dtype(self.values.dtype))


@dataclass(frozen=True)
class Outer:
    r"""Sums of outer products over positions, :math:`g_n = \sum_t l_{nt} r_{nt}^\top`.

    left: (N, T, P), right: (N, T, Q); one of them is the gradient of an output, the other an input.
    """

    left: Tensor
    right: Tensor
    gradient_is_left: bool

    @classmethod
    def of(cls, gradient: Tensor, input: Tensor, gradient_is_left: bool) -> Outer:
        """Return the product with its two sides named by what they are."""
        pair = (gradient, input) if gradient_is_left else (input, gradient)
        return cls(*pair, gradient_is_left)

    @property
    def gradient(self) -> Tensor:
        """The side that is the gradient of an output."""
        return self.left if self.gradient_is_left else self.right

    @property
    def input(self) -> Tensor:
        """The side that is an input."""
        return self.right if self.gradient_is_left else self.left

    @property
    def positions(self) -> int:
        """How many outer products add up in each sample."""
        return self.left.shape[1]

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares, by one product a sample or one for all."""
        left, right = _beside(total, self.left), _beside(total, self.right)
        if total.stride(1) != 1 and total.stride(0) == 1:
            products.accumulate_squared_product_(total.t(), right, left)
        else:
            products.accumulate_squared_product_(total, left, right)

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        dtype = state_dtype(self.left.dtype)
        left, right = self.left[start:stop].to(dtype), self.right[start:stop].to(dtype)
        return torch.bmm(left.transpose(1, 2), right)


def joined(uses: Sequence[PerSample]) -> PerSample | None:
    """Return the sum over uses of one operand in the form of one, or ``None`` if forms differ."""
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) == len(uses):  # the sum over positions goes over the uses, too
        left = torch.cat([outer.left for outer in outers], 1)
        right = torch.cat([outer.right for outer in outers], 1)
        return Outer(left, right, outers[0].gradient_is_left)
    dense = [use.values for use in uses if isinstance(use, Dense)]
    if len(dense) == len(uses):
        return Dense(torch.stack(dense).sum(0, dtype=state_dtype(dense[0].dtype)))
    return None


@dataclass(frozen=True)
class Reshaped:
    """Gradients with respect to the same entries, in another shape."""

    of: Outer
    shape: torch.Size

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        self.of.add_squares(total.view(-1, self.shape[-1]))

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        return self.of.gradients(start, stop).view(-1, *self.shape)


@dataclass(frozen=True)
class Blocks:
    """One outer-product gradient for each entry of a first dimension, as ``bmm`` has them."""

    blocks: list[Outer]

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        for part, block in zip(total, self.blocks, strict=True):
            block.add_squares(part)

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        return torch.stack([block.gradients(start, stop) for block in self.blocks], 1)


@dataclass(frozen=True)
class Rows:
    """Gradients of a few rows of a table (N, T, D), which may repeat: embeddings."""

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares; repeated rows add up before."""
        entries = self.shape[0]
        sample = torch.arange(len(self.indices), device=self.indices.device).unsqueeze(1)
        keys, places = (sample * entries + self.indices).flatten().unique(return_inverse=True)
        values = self.values.flatten(0, 1).to(total.dtype)
        sums = values.new_zeros(len(keys), values.shape[1]).index_add_(0, places, values)
        total.index_add_(0, keys % entries, sums.square_().view(-1, *self.shape[1:]))

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        values = self.values[start:stop].to(state_dtype(self.values.dtype))
        found = values.new_zeros(stop - start, self.shape[0], values.shape[2])
        places = self.indices[start:stop].unsqueeze(2).expand_as(values)
        return found.scatter_add_(1, places, values).view(stop - start, *self.shape)


@dataclass(frozen=True)
class Convolution:
    """Gradients of a convolution's weight; each sample may have several images.

    grads: (N, images, O, *out), inputs: (N, images, I, *in).
    """

    grads: Tensor
    inputs: Tensor
    weight_shape: tuple[int, ...]
    geometry: dict[str, Any]  # stride, padding, dilation, groups, transposed, output_padding

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        if self.grads.shape[1] != 1:
            _square_in_chunks(self, total)
            return
        grads, inputs = (_beside(total, t[:, 0]) for t in (self.grads, self.inputs))
        if self.geometry["transposed"]:  # the formula of a convolution from grads to inputs
            grads, inputs = inputs, grads
        geometry = {key: self.geometry[key] for key in ("stride", "padding", "dilation", "groups")}
        products.accumulate_squared_convolution_(total, grads, inputs, **geometry)

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        dtype = state_dtype(self.grads.dtype)
        like = self.grads.new_zeros(self.weight_shape, dtype=dtype)
        return torch.stack(
            [
                torch.ops.aten.convolution_backward(
                    self.grads[n].to(dtype), self.inputs[n].to(dtype), like, None,
                    *self.geometry.values(), (False, True, False),
                )[1]
                for n in range(start, stop)
            ]
        )  # fmt: skip


@dataclass(frozen=True)
class OneByOne:
    """Gradients that an operation's own backward gives when all other samples' are 0."""

    gradient_of: Callable[[int], Tensor]
    samples: int

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        for n in range(self.samples):
            total.add_(self.gradient_of(n).to(total.dtype).square())

    def gradients(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples."""
        found = torch.stack([self.gradient_of(n) for n in range(start, stop)])
        return found.to(state_dtype(found.dtype))


def _beside(total: Tensor, operand: Tensor) -> Tensor:
    """Return an operand fit for sums in the total's dtype: models may compute in another."""
    return operand if state_dtype(operand.dtype) == total.dtype else operand.to(total.dtype)


def _square_in_chunks(gradients: Convolution, total: Tensor) -> None:
    for n in range(len(gradients.grads)):
        total.add_(gradients.gradients(n, n + 1)[0].to(total.dtype).square())
