"""Springs that are used piece by piece, decoded where they must be.

Beside the state, a step takes the memory of one decoded piece, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ewc_fast import functional
from ewc_fast._dispatch import Impl
from ewc_fast._springs import ActiveSprings, Spring
from ewc_fast.formats import in_memory_order

PIECE = 1 << 21  # elements; whole blocks of 8-bit codes


class Piece(NamedTuple):
    """Consecutive rows, or a part of one: what belongs to the parameters, and their springs."""

    number: int
    lists: list[list[Tensor]]
    springs: list[Spring]


class PiecewiseSprings(ActiveSprings):
    """Springs in any format and place, used piece by piece; with what ``impl`` says on each."""

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        super().__init__(params, springs, impl)
        self._plans: dict[tuple[str, int], functional.Plan] = {}

    @property
    def operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Raise: whoever reads Fisher and anchor in place finds them only where they are plain."""
        raise ValueError(
            "storage: a step with the penalty inside reads the state in place, which takes "
            "storage='float32' or 'bfloat16'; for others wrap PyTorch's optimizer in EWCOptimizer"
        )

    def penalty(self, ewc_lambda: float | Tensor) -> Tensor:
        """Return the penalty as a float64 scalar that can be differentiated once."""
        moving = self._moving()
        value: Tensor = _Penalty.apply(moving, float(ewc_lambda), *moving._params)
        return value

    def proximal_step_(self, ewc_lambda: float | Tensor, lr: float | Tensor) -> None:
        """Pull every parameter towards its anchor by the proximal step."""
        moving = self._moving()
        assert isinstance(moving, PiecewiseSprings)

        def step(piece: Piece, fisher: list[Tensor], anchor: list[Tensor]) -> None:
            functional.proximal_step_(
                piece.lists[0],
                fisher,
                anchor,
                ewc_lambda=float(ewc_lambda),
                lr=float(lr),
                impl=self._impl,
                plan=moving._plan("proximal", piece),
            )

        moving._visit(step, moving._params)

    def _add_to(
        self, grads: list[Tensor], ewc_lambda: float | Tensor, constant: float | Tensor
    ) -> Tensor:
        def add(piece: Piece, fisher: list[Tensor], anchor: list[Tensor]) -> Tensor:
            return functional.add_penalty_grad_(
                piece.lists[0],
                piece.lists[1],
                fisher,
                anchor,
                ewc_lambda=float(ewc_lambda),
                impl=self._impl,
                plan=self._plan("gradient", piece),
            )

        return self._total(self._visit(add, grads, self._params)) + constant

    @torch.no_grad()
    def value(self, params: Sequence[Tensor], ewc_lambda: float) -> Tensor:
        """Return the penalty alone."""

        def value(piece: Piece, fisher: list[Tensor], anchor: list[Tensor]) -> Tensor:
            return functional.penalty(piece.lists[0], fisher, anchor, ewc_lambda=ewc_lambda)

        return self._total(self._visit(value, params))

    @torch.no_grad()
    def pulls(self, params: Sequence[Tensor], ewc_lambda: float) -> list[Tensor]:
        """Return the penalty's gradient."""
        out = [torch.zeros_like(param) for param in params]
        self._add_to(out, ewc_lambda, 0.0)  # to the parameters that this object holds
        return out

    def _total(self, values: list[Any]) -> Tensor:
        if not values:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def _plan(self, operation: str, piece: Piece) -> functional.Plan:
        return self._plans.setdefault((operation, piece.number), functional.Plan())

    def _visit(
        self,
        work: Callable[[Piece, list[Tensor], list[Tensor]], Any],
        *lists: Sequence[Tensor],
    ) -> list[Any]:
        """Call ``work(piece, fisher, anchor)`` for every piece, its state on its device."""
        pieces = self._pieces(*lists)
        results = []
        for device in dict.fromkeys(param.device for param in self._params):
            here = [piece for piece in pieces if piece.lists[0][0].device == device]
            for piece, springs in zip(here, self._brought(device, here), strict=True):
                fisher = [spring.fisher_values() for spring in springs]
                results.append(work(piece, fisher, [spring.anchor for spring in springs]))
        return results

    def _brought(self, device: torch.device, pieces: Sequence[Piece]) -> Iterator[list[Spring]]:
        """Yield each piece's springs on the device."""
        for piece in pieces:
            yield piece.springs

    def _pieces(self, *lists: Sequence[Tensor]) -> list[Piece]:
        """Split rows longer than a piece, and collect short ones into pieces."""
        pieces: list[Piece] = []
        room = 0
        for index, spring in enumerate(self._springs):
            row = [tensors[index].detach() for tensors in lists]
            for tensors, cut in _cuts(row, spring):
                size = cut.anchor.numel()
                if not pieces or size > room or pieces[-1].lists[0][0].device != tensors[0].device:
                    pieces.append(Piece(len(pieces), [[] for _ in lists], []))
                    room = PIECE
                room -= size
                pieces[-1].springs.append(cut)
                for collected, tensor in zip(pieces[-1].lists, tensors, strict=True):
                    collected.append(tensor)
        return pieces


def _cuts(row: list[Tensor], spring: Spring) -> Iterator[tuple[list[Tensor], Spring]]:
    """Yield parts of a long row, in the order of memory; the whole row if layouts differ."""
    numel = spring.anchor.numel()
    if numel <= PIECE or any(tensor.stride() != spring.anchor.stride() for tensor in row):
        yield row, spring
        return
    for start in range(0, numel, PIECE):
        stop = min(start + PIECE, numel)
        yield [in_memory_order(tensor)[start:stop] for tensor in row], spring.cut(start, stop)


class _Penalty(torch.autograd.Function):
    """The penalty, differentiable once: nothing of the state is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, springs: PiecewiseSprings, ewc_lambda: float, *params: Tensor) -> Tensor:
        ctx.springs, ctx.ewc_lambda = springs, ewc_lambda
        ctx.save_for_backward(*params)
        return springs.value(params, ewc_lambda)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pulls = ctx.springs.pulls(ctx.saved_tensors, ctx.ewc_lambda)
        return None, None, *(pull.mul_(gradient.to(pull)) for pull in pulls)
