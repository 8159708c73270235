"""The state of a model after one and after ten tasks, and what its penalty's gradient must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import MismatchError
from layouts import Shape
from torch import Tensor, nn

from ewc_fast import EWC, reference

TASKS = 10
EWC_LAMBDA = 400.0
GRADIENT_BEFORE = 1.0
GRADIENT_TOLERANCE = 8 * torch.finfo(torch.float32).eps
VALUE_TOLERANCE = 1e-6
# torch.dot adds in float32 and is off by 8e-5 at 1e8 parameters. It is fast, so let it compete.
RIVAL_VALUE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Task:
    """What a finished task leaves."""

    fisher: list[Tensor]
    anchor: list[Tensor]


@dataclass(frozen=True)
class Wanted:
    """The gradients and the value that the reference finds in float64."""

    grads: list[Tensor]
    value: float


class PenaltyCase:
    """Parameters, their gradients, the first task's state, and the EWC of one and of ten tasks.

    ``keep_tasks`` holds every task's Fisher and anchor too, which ten separate penalties need, and
    judges the merged state by the sum of these ten. Otherwise it is judged by itself.
    """

    def __init__(self, shapes: Sequence[Shape], *, keep_tasks: bool) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(0.05 * self._noise(shape)) for shape in shapes]
        named = [(f"{index}", param) for index, param in enumerate(self.params)]
        self.one_task = EWC(named, ewc_lambda=EWC_LAMBDA)
        self.ten_tasks = EWC(named, ewc_lambda=EWC_LAMBDA)
        self.tasks: list[Task] = []
        for task in range(TASKS):
            fisher = self._fisher(shapes)
            if keep_tasks:
                self.tasks.append(Task(fisher, [param.detach().clone() for param in self.params]))
            by_name = {name: new for (name, _), new in zip(named, fisher, strict=True)}
            if task == 0:
                self.one_task.consolidate_from(by_name)
            self.ten_tasks.consolidate_from(by_name)
            self._train(step=0.01)
        for param in self.params:
            param.grad = torch.full_like(param, GRADIENT_BEFORE)
        # A copy: were it shared, the caches would hold it for the one EWC and not for the other.
        merged = _state(self.one_task)
        self.first_task = Task(
            [f.clone() for f in merged.fisher], [a.clone() for a in merged.anchor]
        )
        self.wanted_of_one = self._wanted([self.first_task])
        kept = self.tasks or [_state(self.ten_tasks)]
        constant = 0.0 if self.tasks else self.ten_tasks.constant_penalty
        self.wanted_of_ten = self._wanted(kept, constant)

    @property
    def grads(self) -> list[Tensor]:
        """The parameters' gradients, written by every implementation."""
        return [param.grad for param in self.params if param.grad is not None]

    @property
    def values(self) -> list[Tensor]:
        """The parameters, apart from autograd."""
        return [param.detach() for param in self.params]

    def check(
        self, call: Callable[[], object], wanted: Wanted, value_tolerance: float | None
    ) -> None:
        """Raise unless ``call`` adds the wanted gradients and returns the wanted value, if any."""
        for grad in self.grads:
            grad.fill_(GRADIENT_BEFORE)
        value = call()
        for index, (grad, want) in enumerate(zip(self.grads, wanted.grads, strict=True)):
            scale = GRADIENT_BEFORE + (want - GRADIENT_BEFORE).abs_()
            error = ((grad - want).abs_() / scale).amax().item()
            if not error <= GRADIENT_TOLERANCE:
                raise MismatchError(f"grads[{index}]: relative error {error:.1e}")
        if value_tolerance is not None:
            found = value.item() if isinstance(value, Tensor) else float("nan")
            if not abs(found - wanted.value) <= value_tolerance * wanted.value:
                raise MismatchError(f"value: expected {wanted.value:.9g}, got {found:.9g}")

    def _noise(self, shape: Shape) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _fisher(self, shapes: Sequence[Shape]) -> list[Tensor]:
        uniform = (torch.rand(shape, generator=self._generator) for shape in shapes)
        return [0.01 * values.square_() for values in uniform]

    @torch.no_grad()
    def _train(self, step: float) -> None:
        for param in self.params:
            param.add_(self._noise(tuple(param.shape)), alpha=step)

    def _wanted(self, tasks: Sequence[Task], constant: float = 0.0) -> Wanted:
        """Ask the reference, one tensor at a time: float64 copies of all would not fit."""
        grads, value = [], constant
        for index, param in enumerate(self.values):
            total = torch.full_like(param, GRADIENT_BEFORE, dtype=torch.float64)
            for task in tasks:
                fisher, anchor = task.fisher[index].double(), task.anchor[index].double()
                at = [param.double()], [fisher], [anchor]
                value += reference.penalty(*at, ewc_lambda=EWC_LAMBDA).item()
                total += reference.penalty_grad(*at, ewc_lambda=EWC_LAMBDA)[0]
            grads.append(total.float())
        return Wanted(grads, value)


def _state(ewc: EWC) -> Task:
    return Task(list(ewc.fisher.values()), list(ewc.anchor.values()))
