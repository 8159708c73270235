r"""The gradients of a batch's samples with respect to one operand, in the form they come in.

Each form adds :math:`\sum_n g_n^2` to a total without storing all :math:`g_n`, and can also add
the :math:`g_n` of a few samples to those of other uses, to be squared afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ewc_fast import functional, products, sums
from ewc_fast._checks import state_dtype
from ewc_fast.sums import Factor


class PerSample(Protocol):
    """Gradients of samples with respect to a tensor of some shape."""

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""

    def add_squares_with_bias(self, total: Tensor, bias_total: Tensor) -> bool:
        """Do so for the operation's bias too, if one reading serves both; return whether it did."""

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of the samples from ``start`` on, as many as there is room for."""


class Alone:
    """A form that has nothing in common with a bias."""

    def add_squares_with_bias(self, total: Tensor, bias_total: Tensor) -> bool:
        """Do nothing."""
        return False


@dataclass(frozen=True)
class Dense(Alone):
    """Gradients as they are, (N, *shape): of biases, scales, position embeddings."""

    values: Tensor

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        if total.is_contiguous() and total.numel() > 0:
            functional.accumulate_square_(total, _beside(total, self.values).contiguous())
        else:
            total.add_(self.values.to(total.dtype).square().sum(0))

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        gradients.add_(self.values[start : start + len(gradients)])


@dataclass(frozen=True)
class Sums:
    """Sums over positions of gradients (N, T, D) times a factor: of scales."""

    grads: Tensor
    factor: Factor
    shape: torch.Size

    @property
    def values(self) -> Tensor:
        """The gradients as they are, (N, *shape)."""
        dtype = state_dtype(self.grads.dtype)
        values = (self.grads * self.factor.computed()).sum(1, dtype=dtype)
        return values.view(-1, *self.shape)

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        if total.is_contiguous():
            sums.add_squared_sums_(total.view(-1), self.grads, self.factor)
        else:
            Dense(self.values).add_squares(total)

    def add_squares_with_bias(self, total: Tensor, bias_total: Tensor) -> bool:
        """Add those of the sums without the factor, too."""
        if not total.is_contiguous():
            return False
        sums.add_squared_sums_(total.view(-1), self.grads, self.factor, bias_total)
        return True

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        Dense(self.values).add_to(gradients, start)


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
        self._add(total, None)

    def add_squares_with_bias(self, total: Tensor, bias_total: Tensor) -> bool:
        """Add those of the gradient side's sums over positions, too."""
        if _is_transposed(total) == self.gradient_is_left:
            return False  # the rows are the inputs'
        self._add(total, bias_total)
        return True

    def _add(self, total: Tensor, bias_total: Tensor | None) -> None:
        rows, columns = _beside(total, self.left), _beside(total, self.right)
        if _is_transposed(total):
            total, rows, columns = total.t(), columns, rows
        products.add_squared_product_(total, rows, columns, bias_total)

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        some = slice(start, start + len(gradients))
        left, right = self.left[some].to(gradients.dtype), self.right[some].to(gradients.dtype)
        gradients.baddbmm_(left.transpose(1, 2), right)


def _is_transposed(total: Tensor) -> bool:
    return total.stride(1) != 1 and total.stride(0) == 1


def joined(uses: Sequence[PerSample]) -> PerSample | None:
    """Return the sum over uses of one operand in the form of one, or ``None`` if forms differ."""
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) == len(uses):  # the sum over positions goes over the uses, too
        left = torch.cat([outer.left for outer in outers], 1)
        right = torch.cat([outer.right for outer in outers], 1)
        return Outer(left, right, outers[0].gradient_is_left)
    dense = [use.values for use in uses if isinstance(use, (Dense, Sums))]
    if len(dense) == len(uses):
        return Dense(torch.stack(dense).sum(0, dtype=state_dtype(dense[0].dtype)))
    return None


@dataclass(frozen=True)
class Reshaped(Alone):
    """Gradients with respect to the same entries, in another shape."""

    of: Outer
    shape: torch.Size

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        self.of.add_squares(total.view(-1, self.shape[-1]))

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        self.of.add_to(gradients.flatten(1, -2), start)


@dataclass(frozen=True)
class Blocks(Alone):
    """One outer-product gradient for each entry of a first dimension, as ``bmm`` has them."""

    blocks: list[Outer]

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        for part, block in zip(total, self.blocks, strict=True):
            block.add_squares(part)

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        for part, block in zip(gradients.unbind(1), self.blocks, strict=True):
            block.add_to(part, start)


@dataclass(frozen=True)
class Rows(Alone):
    """Gradients of a few rows of a table (N, T, D), which may repeat: embeddings."""

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    skipped_row: int = -1  # whose entries do not count

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares; repeated rows add up before."""
        sums.add_squared_rows_(total, self.indices, self.values, self.skipped_row)

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        some = slice(start, start + len(gradients))
        for gradient, rows, values in zip(
            gradients, self.indices[some], self.values[some].to(gradients.dtype), strict=True
        ):
            kept = values.masked_fill((rows == self.skipped_row).unsqueeze(1), 0)
            gradient.index_add_(0, rows, kept.view(-1, *self.shape[1:]))


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
        self._add(total, None)

    def add_squares_with_bias(self, total: Tensor, bias_total: Tensor) -> bool:
        """Add those of the sums over positions, too."""
        if self.geometry["transposed"] or self.grads.shape[1] != 1:
            return False
        self._add(total, bias_total)
        return True

    def _add(self, total: Tensor, bias_total: Tensor | None) -> None:
        if self.grads.shape[1] != 1:
            for n in range(len(self.grads)):
                gradient = torch.zeros_like(total).unsqueeze(0)
                self.add_to(gradient, n)
                total.add_(gradient[0].square_())
            return
        grads, inputs = (_beside(total, t[:, 0]) for t in (self.grads, self.inputs))
        if self.geometry["transposed"]:  # the formula of a convolution from grads to inputs
            grads, inputs = inputs, grads
        geometry = {key: self.geometry[key] for key in ("stride", "padding", "dilation", "groups")}
        functional.accumulate_squared_convolution_(
            total, grads, inputs, **geometry, bias_total=bias_total
        )

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        like = gradients.new_zeros(self.weight_shape)
        for n, gradient in enumerate(gradients, start):
            gradient.add_(
                torch.ops.aten.convolution_backward(
                    self.grads[n].to(like.dtype), self.inputs[n].to(like.dtype), like, None,
                    *self.geometry.values(), (False, True, False),
                )[1]
            )  # fmt: skip


@dataclass(frozen=True)
class OneByOne(Alone):
    """Gradients that an operation's own backward gives when all other samples' are 0."""

    gradient_of: Callable[[int], Tensor]
    samples: int

    def add_squares(self, total: Tensor) -> None:
        """Add the sum over samples of the squares."""
        for n in range(self.samples):
            total.add_(self.gradient_of(n).to(total.dtype).square())

    def add_to(self, gradients: Tensor, start: int) -> None:
        """Add the gradients of some samples."""
        for n, gradient in enumerate(gradients, start):
            gradient.add_(self.gradient_of(n))


def _beside(total: Tensor, operand: Tensor) -> Tensor:
    """Return an operand fit for sums in the total's dtype: models may compute in another."""
    return operand if state_dtype(operand.dtype) == total.dtype else operand.to(total.dtype)
