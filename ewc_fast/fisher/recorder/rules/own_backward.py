"""Operations without a rule: their own backward passes, with what they saved for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.per_sample import OneByOne, PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand


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
        return gradient.to_dense().sum_to_size(use.shape)

    return OneByOne(gradient_of, len(use.layout.by_sample(use.grad)))
