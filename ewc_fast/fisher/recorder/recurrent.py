r"""Recurrent layers with the hidden products of all their steps in one node of the graph.

torch's fused layers hide their steps, and step by step each is several nodes. Here every layer
and direction is an ordinary product of the inputs, a tap where the hidden weights enter, and the
steps. With :math:`d_t` the gradient of :math:`W h_{t-1} + b`, the tap's gradients of W and b are
:math:`\sum_t d_t h_{t-1}^\top` and :math:`\sum_t d_t`.

The steps save slopes in place of their gates: what a gradient that arrives is multiplied by on its
way to each :math:`d_t`. All are made at once, after the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_slope = torch.ops.aten.sigmoid_backward  # (a, y): a y (1 - y)
tanh_slope = torch.ops.aten.tanh_backward  # (a, y): a (1 - y^2)


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


class Hidden:
    """The states before each step, (time, samples, width), for the tap of their weights."""

    def __init__(self, *, reverse: bool) -> None:
        self.reverse = reverse
        self.previous = torch.empty(0)

    def order(self, steps: int) -> range:
        """Return the steps in the order they are taken."""
        return range(steps - 1, -1, -1) if self.reverse else range(steps)

    def room(self, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return where the states before and after each step are, which is the same memory."""
        states = first.new_empty(steps + 1, *first.shape)
        states[steps if self.reverse else 0] = first
        return (states[1:], states[:-1]) if self.reverse else (states[:-1], states[1:])


class HiddenTap(Function):
    """Adds nothing to the pre-activations, and receives the gradients of their hidden part."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, hidden: Hidden, shape: tuple[int, ...]
    ) -> Tensor:
        """Return zeros that take no memory."""
        ctx.hidden = hidden
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the ordinary gradients."""
        rows = grad.flatten(0, 1)
        of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            rows.t() @ ctx.hidden.previous.flatten(0, 1) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
            None,
        )


class LSTMSteps(Function):
    """i, f, g, o = pre + W h + b; c = f c + i g; h = o tanh(c)."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        tap: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Hidden,
    ) -> tuple[Tensor, ...]:
        """Return all outputs, the last h and the last c."""
        gates, order = _started(ctx, pre, tap, bias, hidden)
        h_before, h_after = hidden.room(h_0, len(gates))
        c_before, c_after = hidden.room(c_0, len(gates))
        tanhs, width = torch.empty_like(c_after), h_0.shape[1]
        i, f, g, o = gates.chunk(4, 2)
        both, transposed = gates.narrow(2, 0, 2 * width), weight.t()
        each = _steps(gates, both, i, f, g, o, h_before, h_after, c_before, c_after, tanhs)
        for t in order:
            gates_t, both_t, i_t, f_t, g_t, o_t, h, h_next, c, c_next, tanh = each[t]
            gates_t.addmm_(h, transposed)
            both_t.sigmoid_()
            g_t.tanh_()
            o_t.sigmoid_()
            torch.mul(f_t, c, out=c_next).addcmul_(i_t, g_t)
            torch.tanh(c_next, out=tanh)
            torch.mul(o_t, tanh, out=h_next)
        hidden.previous = h_before
        ends = h_after[order[-1]].clone(), c_after[order[-1]].clone()
        if any(ctx.needs_input_grad):
            kept, of_c = f.clone(), tanh_slope(o, tanhs)
            of_i = sigmoid_slope(g, i)
            tanh_slope.grad_input(i, g, grad_input=g)
            i.copy_(of_i)
            sigmoid_slope.grad_input(c_before, f, grad_input=f)
            sigmoid_slope.grad_input(tanhs, o, grad_input=o)
            ctx.save_for_backward(gates, kept, of_c, weight)
        return h_after.clone(), *ends

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, outputs: Tensor | None, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Go back through the steps."""
        slopes, kept, of_c, weight = ctx.saved_tensors
        found, order = torch.empty_like(slopes), ctx.hidden.order(len(slopes))[::-1]
        by_gate, into = (t.unflatten(2, (4, -1)) for t in (slopes, found))
        each = _steps(found, by_gate[:, :, :3], by_gate[:, :, 3], into[:, :, :3], into[:, :, 3],
                      kept, of_c)  # fmt: skip
        c = torch.zeros_like(kept[0]) if c is None else c.clone()
        h = _last(outputs, h, order[0], c)
        for t, following in zip(order, [*order[1:], None], strict=True):
            found_t, cell_slopes, out_slope, into_cell, into_out, kept_t, of_c_t = each[t]
            c.addcmul_(h, of_c_t)
            torch.mul(h, out_slope, out=into_out)
            torch.mul(c.unsqueeze(1), cell_slopes, out=into_cell)
            c.mul_(kept_t)
            h = _before(outputs, following, found_t, weight)
        return found.flatten(0, 1), found, h, c, None, None, None


class GRUSteps(Function):
    """r, z = pre + W h + b; n = tanh(pre + r (W h + b)); h = n + z (h - n)."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        tap: Tensor,
        h_0: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Hidden,
    ) -> tuple[Tensor, ...]:
        """Return all outputs and the last h."""
        width = h_0.shape[1]
        gates, order = _started(ctx, pre, tap, None, hidden)
        before, after = hidden.room(h_0, len(gates))
        both, m = gates.narrow(2, 0, 2 * width), torch.empty_like(after)
        if bias is not None:
            both += bias[: 2 * width]
        of_both, of_m = weight[: 2 * width].t(), weight[2 * width :].t()
        r, z, n = gates.chunk(3, 2)
        each = _steps(both, r, z, n, m, before, after)
        for t in order:
            both_t, r_t, z_t, n_t, m_t, h, h_next = each[t]
            both_t.addmm_(h, of_both).sigmoid_()
            if bias is None:
                torch.mm(h, of_m, out=m_t)
            else:
                torch.addmm(bias[2 * width :], h, of_m, out=m_t)
            n_t.addcmul_(r_t, m_t).tanh_()
            torch.lerp(n_t, h, z_t, out=h_next)
        hidden.previous = before
        last = after[order[-1]].clone()
        if any(ctx.needs_input_grad):
            kept, of_n = z.clone(), tanh_slope(1 - z, n)
            sigmoid_slope.grad_input(before - n, z, grad_input=z)
            torch.mul(of_n, r, out=n)
            sigmoid_slope.grad_input(m.mul_(of_n), r, grad_input=r)
            ctx.save_for_backward(gates, kept, of_n, weight)
        return after.clone(), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outputs: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        """Go back through the steps; the reset gate is between n and its hidden part."""
        slopes, kept, of_n, weight = ctx.saved_tensors
        found, order = torch.empty_like(slopes), ctx.hidden.order(len(slopes))[::-1]
        of_pre, width = torch.empty_like(slopes), kept.shape[2]
        each = _steps(found, slopes.unflatten(2, (3, -1)), found.unflatten(2, (3, -1)), kept, of_n,
                      of_pre[:, :, 2 * width :])  # fmt: skip
        h = _last(outputs, h, order[0], kept[0])
        for t, following in zip(order, [*order[1:], None], strict=True):
            found_t, slopes_t, into, kept_t, of_n_t, into_n = each[t]
            torch.mul(h.unsqueeze(1), slopes_t, out=into)
            torch.mul(h, of_n_t, out=into_n)
            h = _before(outputs, following, found_t, weight).addcmul_(h, kept_t)
        of_pre[:, :, : 2 * width] = found[:, :, : 2 * width]
        return of_pre.flatten(0, 1), found, h, None, None, None


class RNNSteps(Function):
    """h = tanh or relu of pre + W h + b."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        tap: Tensor,
        h_0: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Hidden,
        relu: bool,
    ) -> tuple[Tensor, ...]:
        """Return all outputs and the last h."""
        gates, order = _started(ctx, pre, tap, bias, hidden)
        before, after = hidden.room(h_0, len(gates))
        each, transposed = _steps(gates, before, after), weight.t()
        for t in order:
            pre_t, h, h_next = each[t]
            torch.addmm(pre_t, h, transposed, out=h_next)
            _ = h_next.relu_() if relu else h_next.tanh_()
        hidden.previous = before
        if any(ctx.needs_input_grad):
            slopes = (after > 0).to(after.dtype) if relu else after.square().neg_().add_(1)
            ctx.save_for_backward(slopes, weight)
        return after.clone(), after[order[-1]].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outputs: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        """Go back through the steps."""
        slopes, weight = ctx.saved_tensors
        found, order = torch.empty_like(slopes), ctx.hidden.order(len(slopes))[::-1]
        h = _last(outputs, h, order[0], slopes[0])
        for t, following in zip(order, [*order[1:], None], strict=True):
            torch.mul(h, slopes[t], out=found[t])
            h = _before(outputs, following, found[t], weight)
        return found.flatten(0, 1), found, h, None, None, None, None


def _started(
    ctx: Any, pre: Tensor, tap: Tensor, bias: Tensor | None, hidden: Hidden
) -> tuple[Tensor, range]:
    """Return the pre-activations, to be overwritten, and the order of the steps."""
    ctx.hidden = hidden
    ctx.set_materialize_grads(False)
    gates = pre.detach().view(tap.shape)
    if bias is not None:
        gates += bias
    return gates, hidden.order(len(gates))


def _steps(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the tensors of each step."""
    return list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))


def _last(outputs: Tensor | None, h: Tensor | None, at: int, like: Tensor) -> Tensor:
    """Return the gradient of the state after the last step."""
    if outputs is None:
        return torch.zeros_like(like) if h is None else h
    return outputs[at] if h is None else outputs[at] + h


def _before(outputs: Tensor | None, at: int | None, found: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the state before a step by way of W, and of that state as output."""
    if outputs is None or at is None:
        return found.mm(weight)
    return torch.addmm(outputs[at], found, weight)
