"""Matrix products: the per-sample gradient of a factor is a sum of outer products."""

from __future__ import annotations

from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.recorder.layouts import Ragged, Regular
from ewc_fast.fisher.recorder.per_sample import Blocks, Dense, Outer, PerSample, Reshaped
from ewc_fast.fisher.recorder.rules.operand import Operand, times


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
        return use.reduced(times(use.grad, use.node._saved_beta))
    grad = times(use.grad, use.node._saved_alpha)
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


def grouped_mm(use: Operand) -> PerSample | None:
    """Z[rows of e] = A[rows of e] B[e]: experts, each with the rows that chose it."""
    node = use.node
    if use.place != 1 or use.dim != 0 or node._saved_offs is None or len(use.shape) != 3:
        return None
    owners, blocks, start = use.layout.owners(len(use.grad), use.grad.device), [], 0
    for stop in node._saved_offs.tolist():
        layout = Ragged(owners[start:stop], use.layout.samples, 0)
        left, right = (
            layout.by_sample(t[start:stop]).flatten(1, 2) for t in (node._saved_self, use.grad)
        )
        blocks.append(Outer(left, right, gradient_is_left=False))
        start = stop
    return Blocks(blocks)


def baddbmm(use: Operand) -> PerSample | None:
    """Z[b] = beta C[b] + alpha A[b] B[b]."""
    if use.place == 0:
        return use.reduced(times(use.grad, use.node._saved_beta))
    grad = times(use.grad, use.node._saved_alpha)
    return _bmm(use, use.node._saved_batch1, use.node._saved_batch2, grad, use.place - 1)


def _mv(use: Operand, matrix: Tensor, grad: Tensor) -> PerSample:
    rows, columns = use.rows(matrix), use.rows(grad.unsqueeze(1))
    dtype = state_dtype(rows.dtype)
    return Dense((rows.to(dtype) * columns.to(dtype)).sum(1))


def mv(use: Operand) -> PerSample | None:
    """Z = A b."""
    return _mv(use, use.node._saved_self, use.grad) if use.place == 1 else None


def addmv(use: Operand) -> PerSample | None:
    """Z = beta c + alpha A b."""
    if use.place == 0:
        return use.reduced(times(use.grad, use.node._saved_beta))
    if use.place == 1:
        return None
    return _mv(use, use.node._saved_mat, times(use.grad, use.node._saved_alpha))


def trilinear(use: Operand) -> PerSample | None:
    """z[o] = x^T W[o] y: the outer product of grad and x, and of that with y."""
    node = use.node
    if use.place != 1 or use.dim != 0 or node._saved_sumdim != (2, 3):
        return None
    left, first, right = (use.rows(t) for t in (use.grad, node._saved_i1, node._saved_i3))
    both = (left.unsqueeze(3) * first.unsqueeze(2)).flatten(2)
    return Reshaped(Outer(both, right, gradient_is_left=True), use.shape)
