"""The steps of recurrent layers, forward in place and backward by formula.

The steps save slopes in place of their gates: what a gradient that arrives is multiplied by on its
way to each step's pre-activations. All are made at once, after the last step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_slope = torch.ops.aten.sigmoid_backward  # (a, y): a y (1 - y)
tanh_slope = torch.ops.aten.tanh_backward  # (a, y): a (1 - y^2)


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
        tanhs, new, width = torch.empty_like(c_after), torch.empty_like(c_after), h_0.shape[1]
        i, f, g, o = gates.chunk(4, 2)
        both, transposed = gates.narrow(2, 0, 2 * width), weight.t()
        each = _steps(gates, both, i, f, g, o, h_before, h_after, c_before, c_after, tanhs, new)
        for t in order:
            gates_t, both_t, i_t, f_t, g_t, o_t, h, h_next, c, c_next, tanh, new_t = each[t]
            gates_t.addmm_(h, transposed)
            both_t.sigmoid_()
            o_t.sigmoid_()
            new_t.copy_(g_t).tanh_()  # a third of the time that it takes between other columns
            torch.mul(f_t, c, out=c_next).addcmul_(i_t, new_t)
            torch.tanh(c_next, out=tanh)
            torch.mul(o_t, tanh, out=h_next)
        hidden.previous = h_before
        ends = h_after[order[-1]].clone(), c_after[order[-1]].clone()
        if any(ctx.needs_input_grad):
            kept, of_c = f.clone(), tanh_slope(o, tanhs)
            tanh_slope.grad_input(i, new, grad_input=g)
            sigmoid_slope.grad_input(new, i, grad_input=i)
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
        both = gates.narrow(2, 0, 2 * width)
        m, new = torch.empty_like(after), torch.empty_like(after)
        if bias is not None:
            both += bias[: 2 * width]
        of_both, of_m = weight[: 2 * width].t(), weight[2 * width :].t()
        r, z, n = gates.chunk(3, 2)
        each = _steps(both, r, z, n, m, new, before, after)
        for t in order:
            both_t, r_t, z_t, n_t, m_t, new_t, h, h_next = each[t]
            both_t.addmm_(h, of_both).sigmoid_()
            if bias is None:
                torch.mm(h, of_m, out=m_t)
            else:
                torch.addmm(bias[2 * width :], h, of_m, out=m_t)
            torch.addcmul(n_t, r_t, m_t, out=new_t).tanh_()
            torch.lerp(new_t, h, z_t, out=h_next)
        hidden.previous = before
        last = after[order[-1]].clone()
        if any(ctx.needs_input_grad):
            kept, of_n = z.clone(), tanh_slope(1 - z, new)
            sigmoid_slope.grad_input(before - new, z, grad_input=z)
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
