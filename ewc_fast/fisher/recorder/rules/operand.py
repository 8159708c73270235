"""What a rule is given: an operand, and the gradients that arrived at its operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.recorder.layouts import Layout
from ewc_fast.fisher.recorder.per_sample import Dense, PerSample, Sums
from ewc_fast.sums import Factor


@dataclass(frozen=True)
class Operand:
    """One operand of one operation, with the gradients that its results received."""

    node: Any
    place: int
    shape: torch.Size
    grads: tuple[Tensor | None, ...]
    layout: Layout

    @property
    def grad(self) -> Tensor:
        """The gradient of the operation's first result."""
        assert self.grads[0] is not None
        return self.grads[0]

    @property
    def dim(self) -> int:
        """The dimension of the results that holds the samples."""
        return self.layout.dim

    def rows(self, tensor: Tensor) -> Tensor:
        """Return (samples, positions, features) of a matrix whose rows are laid out so."""
        return self.layout.by_sample(tensor).flatten(1, -2)

    def columns(self, tensor: Tensor) -> Tensor:
        """Return (samples, positions, features) of a matrix whose columns are laid out so."""
        return self.layout.by_sample(tensor).movedim(1, -1).flatten(1, -2)

    def reduced(self, unreduced: Tensor, shape: tuple[int, ...] | None = None) -> PerSample | None:
        """Sum a gradient of the result's shape to that of an operand which was broadcast."""
        shape = tuple(self.shape if shape is None else shape)
        full = (1,) * (unreduced.dim() - len(shape)) + shape
        if full[self.dim] != 1:
            return None
        values = self.layout.by_sample(unreduced)
        # samples, dimensions before, two of the samples' dimension, dimensions behind
        places = [d + 1 if d < self.dim else d + 2 for d in range(len(full))]
        summed = [
            place
            for d, place in enumerate(places)
            if d != self.dim and full[d] == 1 and unreduced.shape[d] != 1
        ]
        summed += [d for d in (self.dim + 1, self.dim + 2) if values.shape[d] != 1]
        if summed:
            values = values.sum(summed, dtype=state_dtype(values.dtype))
        return Dense(values.reshape(len(values), *self.shape))

    def per_channel(self, unreduced: Tensor) -> PerSample | None:
        """Sum a gradient of the result's shape (samples, channels, ...) to the channels'."""
        return self.reduced(unreduced, (*self.shape, *[1] * (unreduced.dim() - 2)))

    def scale(
        self, inputs: Tensor, mean: Tensor | None = None, scale: Tensor | None = None
    ) -> PerSample | None:
        """Sum the gradient times (inputs - mean) scale to the last dimensions, an operand's."""
        own = self.grad.dim() - len(self.shape)
        if self.dim >= own:
            return None
        grads, values, means, scales = (
            None if t is None else self.rows(t.flatten(own))
            for t in (self.grad, inputs, mean, scale)
        )
        assert grads is not None
        assert values is not None
        return Sums(grads, Factor(values, means, scales), self.shape)

    def scale_of_channels(self, inputs: Tensor, mean: Tensor, scale: Tensor) -> PerSample | None:
        """Do so to the channels', given (images, channels) of means and scales."""
        if self.dim != 0:
            return None
        grads, values, means, scales = (
            self.layout.by_sample(t) for t in (self.grad, inputs, mean, scale)
        )
        if grads.shape[1:3] == (1, 1):  # an image a sample: positions come last
            grads, values, means, scales = (
                t.flatten(0, 2).unsqueeze(-1).flatten(2).transpose(1, 2)
                for t in (grads, values, means, scales)
            )
            return Sums(grads, Factor(values, means, scales), self.shape)
        behind = [1] * (inputs.dim() - 2)
        mean, scale = (t.view(*t.shape, *behind) for t in (mean, scale))
        return self.per_channel(Factor(inputs, mean, scale).computed() * self.grad)


def times(grad: Tensor, factor: float) -> Tensor:
    """Return a gradient times a number that is mostly 1."""
    return grad if factor == 1 else grad * factor
