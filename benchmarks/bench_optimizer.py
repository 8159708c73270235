"""What the penalty adds to an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from harness import MismatchError, Provider, Result, measure, script
from layouts import Shape, layout
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ewc_fast import EWC, EWCOptimizer, reference

Mode = Literal["gradient", "proximal"]

EWC_LAMBDA = 400.0
LR = 1e-6
ALONE = "torch, fused, alone"
# So large that the sum with the penalty's gradient is nowhere near 0, where Adam's first step is
# the sign of what rounding left.
TASK_GRADIENT = 100.0
TOLERANCE = 4 * torch.finfo(torch.float32).eps

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], Optimizer]] = {
    "SGD with momentum": partial(SGD, lr=LR, momentum=0.9, fused=True),
    "AdamW": partial(AdamW, lr=LR, weight_decay=0.0, fused=True),
}


def suite(quick: bool) -> Result:
    """Measure both optimizers on one list of tensors."""
    elements, seconds = (1_000_000, 1.0) if quick else (10_000_000, 8.0)
    result = Result()
    for name, build in OPTIMIZERS.items():
        timings = measure(providers(build, layout("list", elements)), seconds=seconds)
        result.add(f"step, {name}", timings, (ALONE,))
    return result


def providers(
    build: Callable[[Sequence[nn.Parameter]], Optimizer], shapes: Sequence[Shape]
) -> dict[str, Provider]:
    """Return the steps that compete, each of its own model."""
    models = {
        ALONE: SteppedModel(shapes, build, None),
        "in EWCOptimizer, gradient": SteppedModel(shapes, build, "gradient"),
        "in EWCOptimizer, proximal": SteppedModel(shapes, build, "proximal"),
    }
    return {name: Provider(model.step, model.check) for name, model in models.items()}


class SteppedModel:
    """Parameters some way from their anchor, and an optimizer that steps them."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        build: Callable[[Sequence[nn.Parameter]], Optimizer],
        mode: Mode | None,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self._build, self._mode = build, mode
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
        self._inner = build(self._params)
        self._optimizer = (
            self._inner if mode is None else EWCOptimizer(self._inner, self._ewc, mode=mode)
        )

    def step(self) -> None:
        """Take one step."""
        self._optimizer.step()

    @torch.no_grad()
    def check(self) -> None:
        """Compare the first step with one of the plain optimizer and the reference."""
        for param, start in zip(self._params, self._start, strict=True):
            param.copy_(start)
            param.grad = torch.full_like(param, TASK_GRADIENT)
        self._inner.state.clear()
        self.step()
        for index, (found, want) in enumerate(zip(self._params, self._wanted(), strict=True)):
            error = ((found - want).abs() / (LR + want.abs())).amax().item()
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
        self._build(params).step()
        if self._mode == "proximal":
            reference.proximal_step_(*state, ewc_lambda=EWC_LAMBDA, lr=LR)
        return values


if __name__ == "__main__":
    script(suite)
