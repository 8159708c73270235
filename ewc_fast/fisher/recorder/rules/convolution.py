"""Convolutions."""

from __future__ import annotations

from ewc_fast.fisher.recorder.per_sample import Convolution, PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand


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
