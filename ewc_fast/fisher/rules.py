"""What each kind of operation says of the gradients of its operands, sample by sample.

A rule takes a node of the autograd graph, the gradient of what it returned, the layout of samples
in it, which operand is asked for and that operand's shape. What an operation saved for its own
backward pass is all it needs. Operations without a rule here run their own backward pass: once
where they are elementwise, else once for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.graph import kind_of
from ewc_fast.fisher.per_sample import (
    Blocks,
    Convolution,
    Dense,
    OneByOne,
    Outer,
    PerSample,
    Rows,
)
from ewc_fast.fisher.samples import Layout, Regular


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
        dims = [*summed, self.dim + 1, self.dim + 2]
        dtype = state_dtype(values.dtype)
        return Dense(values.sum(dims, dtype=dtype).reshape(len(values), *self.shape))

    def per_channel(self, unreduced: Tensor) -> PerSample | None:
        """Sum a gradient of the result's shape (samples, channels, ...) to the channels'."""
        return self.reduced(unreduced, (*self.shape, *[1] * (unreduced.dim() - 2)))


Rule = Callable[[Operand], "PerSample | None"]


def by_rule(use: Operand) -> PerSample | None:
    """Return the gradients of a use, or ``None`` if no rule fits it."""
    rule = RULES.get(kind_of(use.node))
    return None if rule is None else rule(use)


def by_its_own_backward(use: Operand) -> PerSample:
    """Run any operation's own backward pass: once if elementwise, else once for each sample.

    An elementwise operation leaves the sum over what its operand was broadcast to, to autograd.
    """
    if not isinstance(use.node, torch.autograd.function.BackwardCFunction):
        gradient = use.node(*use.grads)[use.place]
        if gradient is not None and gradient.shape == use.grad.shape != use.shape:
            summed = use.reduced(gradient)
            if summed is not None:
                return summed
    return one_by_one(use)


def one_by_one(use: Operand) -> PerSample:
    """Run the operation's own backward pass with the gradients of one sample at a time."""
    backward = getattr(use.node, "apply", use.node)

    def gradient_of(sample: int) -> Tensor:
        alone = [None if g is None else use.layout.only(g, sample) for g in use.grads]
        found = backward(*alone)
        gradient = found[use.place] if isinstance(found, tuple) else found
        if gradient is None:
            return use.grad.new_zeros(use.shape)
        return gradient.to_dense().sum_to_size(use.shape)  # type: ignore[no-any-return]

    return OneByOne(gradient_of, _samples(use))


def _samples(use: Operand) -> int:
    return len(use.layout.by_sample(use.grad))


def _mm(use: Operand, first: Tensor, second: Tensor, grad: Tensor, place: int) -> Outer | None:
    if place == 1 and use.dim == 0:  # d second = first^T grad
        return Outer(use.rows(first), use.rows(grad), gradient_is_left=False)
    if place == 0 and use.dim == 1:  # d first = grad second^T
        return Outer(use.columns(grad), use.columns(second), gradient_is_left=True)
    return None


def mm(use: Operand) -> PerSample | None:
    """Z = A B."""
    return _mm(use, use.node._saved_self, use.node._saved_mat2, use.grad, use.place)


def addmm(use: Operand) -> PerSample | None:
    """Z = beta C + alpha A B."""
    if use.place == 0:
        return use.reduced(_times(use.grad, use.node._saved_beta))
    grad = _times(use.grad, use.node._saved_alpha)
    return _mm(use, use.node._saved_mat1, use.node._saved_mat2, grad, use.place - 1)


def _bmm(use: Operand, first: Tensor, second: Tensor, grad: Tensor, place: int) -> PerSample | None:
    if not isinstance(use.layout, Regular) or use.dim != 2 - place:
        return None
    layout = Regular(1 - place, use.layout.samples, use.layout.within)
    inner = Operand(use.node, place, use.shape[1:], use.grads, layout)
    other = first if place == 1 else second
    blocks = [_mm(inner, here, here, g, place) for here, g in zip(other, grad, strict=True)]
    return Blocks([block for block in blocks if block is not None])


def bmm(use: Operand) -> PerSample | None:
    """Z[b] = A[b] B[b]."""
    return _bmm(use, use.node._saved_self, use.node._saved_mat2, use.grad, use.place)


def baddbmm(use: Operand) -> PerSample | None:
    """Z[b] = beta C[b] + alpha A[b] B[b]."""
    if use.place == 0:
        return use.reduced(_times(use.grad, use.node._saved_beta))
    grad = _times(use.grad, use.node._saved_alpha)
    return _bmm(use, use.node._saved_batch1, use.node._saved_batch2, grad, use.place - 1)


def mv(use: Operand) -> PerSample | None:
    """z = A b."""
    if use.place == 1:
        rows, grad = use.rows(use.node._saved_self), use.rows(use.grad.unsqueeze(1))
        dtype = state_dtype(rows.dtype)
        return Dense((rows.to(dtype) * grad.to(dtype)).sum(1))
    return None


def trilinear(use: Operand) -> PerSample | None:
    """z[o] = x^T W[o] y: the outer product of grad and x, and of that with y."""
    node = use.node
    if use.place != 1 or use.dim != 0 or node._saved_sumdim != (2, 3):
        return None
    left, first, right = (use.rows(t) for t in (use.grad, node._saved_i1, node._saved_i3))
    both = (left.unsqueeze(3) * first.unsqueeze(2)).flatten(2)
    return Reshaped(Outer(both, right, gradient_is_left=True), use.shape)


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


def convolution(use: Operand) -> PerSample | None:
    """Convolutions of any dimension, transposed too."""
    if use.dim != 0:
        return None
    if use.place == 2:
        return use.per_channel(use.grad)
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    geometry = {name: getattr(use.node, f"_saved_{name}") for name in names}
    grads, inputs = (
        use.layout.by_sample(t).flatten(1, 2) for t in (use.grad, use.node._saved_input)
    )
    return Convolution(grads, inputs, tuple(use.shape), geometry)


def embedding(use: Operand) -> PerSample | None:
    """Rows of a table, chosen by indices."""
    if use.node._saved_scale_grad_by_freq:  # counts the other samples' indices too
        return None
    return _rows(use, use.node._saved_indices, use.node._saved_padding_idx)


def index(use: Operand) -> PerSample | None:
    """``table[indices]``."""
    indices = use.node._saved_indices
    if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.long:
        return None
    return _rows(use, indices[0] % use.shape[0], -1)


def _rows(use: Operand, indices: Tensor, padding_idx: int) -> PerSample | None:
    if use.dim >= indices.dim():
        return None
    chosen = use.layout.by_sample(indices).flatten(1)
    values = use.layout.by_sample(use.grad.flatten(indices.dim())).flatten(1, -2)
    values = values.masked_fill((chosen == padding_idx).unsqueeze(2), 0)
    return Rows(chosen, values, tuple(use.shape))


def add(use: Operand) -> PerSample | None:
    """Z = A + alpha B."""
    return use.reduced(_times(use.grad, use.node._saved_alpha if use.place == 1 else 1))


def sub(use: Operand) -> PerSample | None:
    """Z = A - alpha B: the sign squares away, but not beside other uses."""
    return use.reduced(_times(use.grad, -use.node._saved_alpha if use.place == 1 else 1))


def mul(use: Operand) -> PerSample | None:
    """Z = A * B."""
    other = use.node._saved_other if use.place == 0 else use.node._saved_self
    return None if other is None else use.reduced(use.grad * other)


def expand(use: Operand) -> PerSample | None:
    """One tensor for all samples, made explicit."""
    return use.reduced(use.grad)


def repeat(use: Operand) -> PerSample | None:
    """One copy for each sample."""
    values = use.layout.by_sample(use.grad)
    if values[0].numel() != use.shape.numel():
        return None
    return Dense(values.reshape(len(values), *use.shape))


def layer_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over the last dimensions."""
    if use.place == 2:
        return use.reduced(use.grad)
    node = use.node
    return use.reduced((node._saved_input - node._saved_result1) * node._saved_result2 * use.grad)


def group_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over groups of channels."""
    if use.place == 2:
        return use.per_channel(use.grad)
    node = use.node
    grouped = node._saved_input.reshape(*node._saved_result1.shape, -1)
    normal = (grouped - node._saved_result1.unsqueeze(-1)) * node._saved_result2.unsqueeze(-1)
    return use.per_channel(normal.view(use.grad.shape) * use.grad)


def batch_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b with running statistics."""
    if use.place == 2:
        return use.per_channel(use.grad)
    node, behind = use.node, [1] * (use.grad.dim() - 2)
    if node._saved_training:
        return None
    mean = node._saved_running_mean.view(-1, *behind)
    scale = (node._saved_running_var + node._saved_eps).rsqrt().view(-1, *behind)
    return use.per_channel((node._saved_input - mean) * scale * use.grad)


def rms_norm(use: Operand) -> PerSample | None:
    """Z = w x / root mean square."""
    return use.reduced(use.node._saved_input * use.node._saved_result1 * use.grad)


def _times(grad: Tensor, factor: float) -> Tensor:
    return grad if factor == 1 else grad * factor


RULES: dict[str, Rule] = {
    "Addmm": addmm,
    "Mm": mm,
    "Bmm": bmm,
    "Baddbmm": baddbmm,
    "Mv": mv,
    "Trilinear": trilinear,
    "Convolution": convolution,
    "Embedding": embedding,
    "Index": index,
    "Add": add,
    "Sub": sub,
    "Mul": mul,
    "Expand": expand,
    "Repeat": repeat,
    "NativeLayerNorm": layer_norm,
    "NativeGroupNorm": group_norm,
    "NativeBatchNorm": batch_norm,
    "FusedRmsNorm": rms_norm,
}
