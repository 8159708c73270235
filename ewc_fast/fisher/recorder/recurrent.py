r"""Recurrent layers with the hidden products of all their steps in one node of the graph.

torch's fused layers hide their steps, and step by step each is several nodes. Here every layer
and direction is an ordinary product of the inputs, a tap where the hidden weights enter, and the
steps. With :math:`d_t` the gradient of :math:`W h_{t-1} + b`, the tap's gradients of W and b are
:math:`\sum_t d_t h_{t-1}^\top` and :math:`\sum_t d_t`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.recurrent_steps import (
    GRUSteps,
    Hidden,
    HiddenTap,
    LSTMSteps,
    RNNSteps,
)


def can_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether :func:`run` computes what a function of ``torch._VF`` would, from its arguments.

    Left out: packed sequences, projections, dropout, mixed dtypes, and sequences of one step, whose
    graph must not look like that of several: with one step, rows that have the time in front look
    like rows that have the samples in front.
    """
    if kwargs or len(args) != 9 or not isinstance(args[3], bool):
        return False
    data, hidden, params, biases, layers, dropout, train, bidirectional, batch_first = args
    tensors = [data, *(hidden if isinstance(hidden, (tuple, list)) else [hidden]), *params]
    return (
        torch.is_grad_enabled()
        and not torch.is_autocast_enabled(data.device.type)
        and not torch._C._are_functorch_transforms_active()
        and data.dim() == 3
        and data.numel() > 0
        and data.shape[1 if batch_first else 0] > 1
        and data.is_floating_point()
        and not (train and dropout > 0)
        and len(params) == layers * (2 if bidirectional else 1) * (4 if biases else 2)
        and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    )


def run(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of all steps and the last states, as the function of that name does."""
    data, hidden, params, biases, layers, _, _, bidirectional, batch_first = args
    if batch_first:
        data = data.transpose(0, 1)
    states = hidden if isinstance(hidden, (tuple, list)) else (hidden,)
    first = list(zip(*(state.unbind(0) for state in states), strict=True))
    directions, each = (2 if bidirectional else 1), (4 if biases else 2)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            weights = params[at * each : (at + 1) * each]
            steps = _layer(name, data, first[at], weights, reverse=direction == 1)
            outputs.append(steps[0])
            last.append(steps[1:])
        data = torch.cat(outputs, 2) if bidirectional else outputs[0]
    ends = [torch.stack(state) for state in zip(*last, strict=True)]
    return (data.transpose(0, 1) if batch_first else data), *ends


def _layer(
    name: str, data: Tensor, first: Sequence[Tensor], weights: Sequence[Tensor], *, reverse: bool
) -> tuple[Tensor, ...]:
    """Run one direction of one layer over (time, samples, features)."""
    of_input, of_hidden, *biases = weights
    rows = data.reshape(-1, data.shape[2])
    bias, hidden_bias = biases or (None, None)
    # Flat, for a view that changes in place would be looked up again.
    pre = rows.mm(of_input.t()) if bias is None else torch.addmm(bias, rows, of_input.t())
    hidden = Hidden(reverse=reverse)
    tap = HiddenTap.apply(of_hidden, hidden_bias, hidden, (*data.shape[:2], pre.shape[1]))
    fixed = of_hidden.detach(), None if hidden_bias is None else hidden_bias.detach()
    if name == "lstm":
        return LSTMSteps.apply(pre, tap, *first, *fixed, hidden)
    if name == "gru":
        return GRUSteps.apply(pre, tap, *first, *fixed, hidden)
    return RNNSteps.apply(pre, tap, *first, *fixed, hidden, name == "rnn_relu")
