"""The penalty's gradient as it is written without ewc_fast: by autograd, or by hand in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from penalty_case import EWC_LAMBDA, Task
from torch import Tensor

Call = Callable[[], object]

# Elements in a block of the blocked loop: its two temporaries stay in the second-level cache, and
# PyTorch's overhead of about a microsecond an operation stays small.
BLOCK = 1 << 17


def autograd_loop(params: Sequence[Tensor], tasks: Sequence[Task]) -> Call:
    """Return the loop of the public EWC codebases: every tensor of every task, then backward."""

    def call() -> Tensor:
        terms = (
            (fisher * (param - anchor) ** 2).sum()
            for task in tasks
            for fisher, param, anchor in zip(task.fisher, params, task.anchor, strict=True)
        )
        penalty = sum(terms, start=torch.zeros(())) * (EWC_LAMBDA / 2)
        penalty.backward()
        return penalty.detach()

    return call


def in_place_with_value(grads: list[Tensor], params: list[Tensor], task: Task) -> dict[str, Call]:
    """Return ways to write gradient and value by hand; the loops keep their temporaries."""
    rows = list(zip(grads, params, task.fisher, task.anchor, strict=True))
    loop = _with_scratch(rows, max(param.numel() for param in params))
    blocks = _with_scratch([block for row in rows for block in _blocks(row)], BLOCK)
    kept = [torch.empty_like(param) for param in params]
    return {
        "loop, sum": lambda: _loop(loop, _sum_of_products),
        "loop, dot": lambda: _loop(loop, _dot),
        "blocked loop, dot": lambda: _loop(blocks, _dot),
        "foreach": lambda: _foreach(
            grads, params, task, list(torch._foreach_sub(params, task.anchor))
        ),
        "foreach, kept temporaries": lambda: _foreach(
            grads, params, task, _distances(kept, params, task)
        ),
    }


def in_place(grads: list[Tensor], params: list[Tensor], task: Task) -> dict[str, Call]:
    """Return ways to write the gradient alone."""
    rows = list(zip(grads, params, task.fisher, task.anchor, strict=True))
    loop = _with_scratch(rows, max(param.numel() for param in params))
    return {
        "loop": lambda: _loop_without_value(loop),
        "foreach": lambda: _foreach_without_value(grads, params, task),
    }


Row = tuple[Tensor, ...]  # grad, param, fisher, anchor; then two of scratch memory


def _blocks(row: Row) -> list[Row]:
    flat = [tensor.view(-1) for tensor in row]
    return list(zip(*(tensor.split(BLOCK) for tensor in flat), strict=True))


def _with_scratch(rows: Sequence[Row], elements: int) -> list[Row]:
    """Add two temporaries to each row, the same memory for all."""
    first, second = torch.empty(elements), torch.empty(elements)
    shapes = [row[0].shape for row in rows]
    return [
        (*row, first[: shape.numel()].view(shape), second[: shape.numel()].view(shape))
        for row, shape in zip(rows, shapes, strict=True)
    ]


def _loop(rows: Sequence[Row], inner_product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    values = []
    for grad, param, fisher, anchor, distance, pull in rows:
        torch.sub(param, anchor, out=distance)
        torch.mul(fisher, distance, out=pull)
        grad.add_(pull, alpha=EWC_LAMBDA)
        values.append(inner_product(pull, distance))
    return torch.stack(values).sum() * (EWC_LAMBDA / 2)


def _sum_of_products(pull: Tensor, distance: Tensor) -> Tensor:
    return pull.mul_(distance).sum()


def _dot(pull: Tensor, distance: Tensor) -> Tensor:
    return torch.dot(pull.view(-1), distance.view(-1))


def _distances(out: list[Tensor], params: list[Tensor], task: Task) -> list[Tensor]:
    torch._foreach_copy_(out, params)
    torch._foreach_sub_(out, task.anchor)
    return out


def _foreach(
    grads: list[Tensor], params: list[Tensor], task: Task, distances: list[Tensor]
) -> Tensor:
    torch._foreach_addcmul_(grads, task.fisher, distances, value=EWC_LAMBDA)
    torch._foreach_mul_(distances, distances)
    torch._foreach_mul_(distances, task.fisher)
    return torch.stack([terms.sum() for terms in distances]).sum() * (EWC_LAMBDA / 2)


def _loop_without_value(rows: Sequence[Row]) -> None:
    for grad, param, fisher, anchor, distance, _ in rows:
        torch.sub(param, anchor, out=distance)
        grad.addcmul_(fisher, distance, value=EWC_LAMBDA)


def _foreach_without_value(grads: list[Tensor], params: list[Tensor], task: Task) -> None:
    distances = torch._foreach_sub(params, task.anchor)
    torch._foreach_addcmul_(grads, task.fisher, distances, value=EWC_LAMBDA)
