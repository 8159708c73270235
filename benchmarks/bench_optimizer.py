"""What the penalty adds to an optimizer's step: in a pass of its own, or inside the step.

Bytes of memory traffic for each float32 parameter of AdamW: 28 alone, 48 with a pass for the
penalty, 36 with the penalty inside. Of reads alone: 16, 32, 24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from harness import MismatchError, Provider, Result, measure, script
from layouts import Shape, layout
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc_fast import EWC, EWCOptimizer, optim, reference

Mode = Literal["gradient", "proximal"]
Params = Sequence[nn.Parameter]

EWC_LAMBDA = 400.0
LR = 1e-6
ALONE = "torch, fused, alone"
# So large that the sum with the penalty's gradient is nowhere near 0, where Adam's first step is
# the sign of what rounding left.
TASK_GRADIENT = 100.0
TOLERANCE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Kind:
    """An optimizer of PyTorch's, and ours of the same name."""

    theirs: Callable[..., Optimizer]
    ours: Callable[..., Optimizer]


OPTIMIZERS = {
    "SGD with momentum": Kind(
        partial(torch.optim.SGD, lr=LR, momentum=0.9), partial(optim.SGD, lr=LR, momentum=0.9)
    ),
    "AdamW": Kind(
        partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
        partial(optim.AdamW, lr=LR, weight_decay=0.0),
    ),
}


def suite(quick: bool) -> Result:
    """Measure both optimizers on one list of tensors."""
    elements, seconds = (1_000_000, 1.0) if quick else (10_000_000, 8.0)
    result = Result()
    for name, kind in OPTIMIZERS.items():
        timings = measure(providers(kind, layout("list", elements)), seconds=seconds)
        result.add(f"step, {name}", timings, (ALONE,))
    return result


def providers(kind: Kind, shapes: Sequence[Shape]) -> dict[str, Provider]:
    """Return the steps that compete, each of its own model."""
    fused, foreach = partial(kind.theirs, fused=True), partial(kind.theirs, foreach=True)

    def wrapped(mode: Mode) -> Callable[[Params, EWC], Optimizer]:
        return lambda params, ewc: EWCOptimizer(fused(params), ewc, mode=mode)

    def inside(mode: Mode) -> Callable[[Params, EWC], Optimizer]:
        return lambda params, ewc: kind.ours(params, ewc=ewc, mode=mode)

    models = {
        ALONE: SteppedModel(shapes, kind, lambda params, _: fused(params), None),
        "torch, foreach, alone": SteppedModel(
            shapes, kind, lambda params, _: foreach(params), None
        ),
        "inside, alone": SteppedModel(shapes, kind, lambda params, _: kind.ours(params), None),
        "inside, gradient": SteppedModel(shapes, kind, inside("gradient"), "gradient"),
        "inside, proximal": SteppedModel(shapes, kind, inside("proximal"), "proximal"),
        "in EWCOptimizer, gradient": SteppedModel(shapes, kind, wrapped("gradient"), "gradient"),
        "in EWCOptimizer, proximal": SteppedModel(shapes, kind, wrapped("proximal"), "proximal"),
        "in PyTorch, foreach and fused": SteppedModel(
            shapes, kind, lambda params, ewc: Composed(fused(params), ewc), "gradient"
        ),
    }
    return {name: Provider(model.step, model.check) for name, model in models.items()}


class Composed:
    """The penalty's gradient by PyTorch's operations on lists, then PyTorch's fused step."""

    def __init__(self, inner: Optimizer, ewc: EWC) -> None:
        self.state = inner.state
        self._inner, self._params = inner, list(ewc.parameters.values())
        self._fisher, self._anchor = list(ewc.fisher.values()), list(ewc.anchor.values())

    @torch.no_grad()
    def step(self) -> None:
        """Add the penalty's gradient; take the step."""
        pulls = torch._foreach_sub(self._params, self._anchor)
        torch._foreach_mul_(pulls, self._fisher)
        grads = [param.grad for param in self._params]
        torch._foreach_add_(grads, pulls, alpha=EWC_LAMBDA)
        self._inner.step()


class SteppedModel:
    """Parameters some way from their anchor, and an optimizer that steps them."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        kind: Kind,
        build: Callable[[Params, EWC], Any],
        mode: Mode | None,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self._kind, self._mode = kind, mode
        self._params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
        named = [(f"{index}", param) for index, param in enumerate(self._params)]
        self._ewc = EWC(named, ewc_lambda=EWC_LAMBDA)
        self._ewc.consolidate_from(
            {name: torch.rand(param.shape, generator=draw) for name, param in named}
        )
        self._start = [
            param.detach() + 0.01 * torch.randn(param.shape, generator=draw)
            for param in self._params
        ]
        self._optimizer = build(self._params, self._ewc)

    def step(self) -> None:
        """Take one step."""
        self._optimizer.step()

    @torch.no_grad()
    def check(self) -> None:
        """Compare the first step with one of the plain optimizer and the reference."""
        for param, start in zip(self._params, self._start, strict=True):
            param.copy_(start)
            param.grad = torch.full_like(param, TASK_GRADIENT)
        self._optimizer.state.clear()
        self.step()
        rows = zip(self._params, self._wanted(), self._start, strict=True)
        for index, (found, want, start) in enumerate(rows):
            # A step may be rounded before it is subtracted, or with it, in one FMA.
            scale = (want - start).abs() + want.abs()
            error = ((found - want).abs() / scale).amax().item()
            if not error <= TOLERANCE:
                raise MismatchError(f"params[{index}]: relative error {error:.1e} after a step")

    def _wanted(self) -> list[Tensor]:
        params = [nn.Parameter(start.clone()) for start in self._start]
        values = [param.detach() for param in params]
        state = values, list(self._ewc.fisher.values()), list(self._ewc.anchor.values())
        grads = [torch.full_like(param, TASK_GRADIENT) for param in values]
        if self._mode == "gradient":
            reference.add_penalty_grad_(grads, *state, ewc_lambda=EWC_LAMBDA)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        self._kind.theirs(params, fused=True).step()
        if self._mode == "proximal":
            reference.proximal_step_(*state, ewc_lambda=EWC_LAMBDA, lr=LR)
        return values


if __name__ == "__main__":
    script(suite)
