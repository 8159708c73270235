"""What the penalty adds to an optimizer's step: in a pass of its own, or inside the step.

Bytes of memory traffic for each float32 parameter of AdamW: 28 alone, 48 with a pass for the
penalty, 36 with the penalty inside. Of reads alone: 16, 32, 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from floor import StepFloor
from harness import MismatchError, Provider, Result, Timings, measure, script
from layouts import Shape, layout
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc_fast import EWC, EWCOptimizer, optim, reference

Mode = Literal["gradient", "proximal"]
Params = Sequence[nn.Parameter]
Build = Callable[[Params, EWC], Any]  # an optimizer of the parameters

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
    written: int  # tensors of the parameters' size that a step writes


OPTIMIZERS = {
    "SGD with momentum": Kind(
        partial(torch.optim.SGD, lr=LR, momentum=0.9),
        partial(optim.SGD, lr=LR, momentum=0.9),
        written=2,
    ),
    "AdamW": Kind(
        partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
        partial(optim.AdamW, lr=LR, weight_decay=0.0),
        written=3,
    ),
}


SIZES = {"1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000, "1e8": 100_000_000}
USUAL = ("1e7", "1e8")
QUICK = ("1e6",)


def suite(quick: bool, only: Sequence[str] = ()) -> Result:
    """Measure both optimizers on lists of tensors of each size."""
    result = Result()
    for size in only or (QUICK if quick else USUAL):
        for name, kind in OPTIMIZERS.items():
            timings = _timings(kind, SIZES[size], 1.0 if quick else 8.0)
            result.add(f"step, {name}, {size}", timings, (ALONE,))
    return result


def _timings(kind: Kind, elements: int, seconds: float) -> Timings:
    """Time what competes at one size, five calls a turn where the operands fit the caches.

    At 1e8 elements a model takes up to 3 GB: there only PyTorch's fused step, ours and bare loops.
    """
    large, small = elements > 10_000_000, elements < 1_000_000
    steps = _builders(kind)
    names = [ALONE, *(name for name in steps if name.startswith("inside"))] if large else steps
    competing = providers(kind, layout("list", elements), names) | floors(kind, elements)
    return measure(competing, seconds=seconds, calls=5 if small else 1)


def providers(
    kind: Kind, shapes: Sequence[Shape], names: Iterable[str] = ()
) -> dict[str, Provider]:
    """Return the steps that compete, or some by name, each of its own model."""
    builders = _builders(kind)
    models = {name: SteppedModel(shapes, kind, *builders[name]) for name in names or builders}
    return {name: Provider(model.step, model.check) for name, model in models.items()}


def floors(kind: Kind, elements: int) -> dict[str, Provider]:
    """Return bare loops over one flat tensor for each operand, without a penalty and with one."""
    written = [torch.zeros(elements) for _ in range(kind.written)]
    read = [torch.full((elements,), 0.25 * (index + 1)) for index in range(3)]
    loops = {"bare loop, alone": read[:1], "bare loop, with Fisher and anchor": read}

    def check(floor: StepFloor, addends: Sequence[Tensor]) -> None:
        before = written[0][-1].item()
        floor()
        want = 0.5 * before + sum(addend[-1].item() for addend in addends)
        if any(abs(tensor[-1].item() - want) > TOLERANCE * want for tensor in written):
            raise MismatchError(f"the bare loop did not make {want} of {before}")

    found = {}
    for name, addends in loops.items():
        floor = StepFloor(written, addends)
        found[name] = Provider(floor, partial(check, floor, addends))
    return found


def _builders(kind: Kind) -> dict[str, tuple[Build, Mode | None]]:
    """Return what builds each optimizer, and the mode of its penalty."""
    fused, foreach = partial(kind.theirs, fused=True), partial(kind.theirs, foreach=True)

    def wrapped(mode: Mode) -> Build:
        return lambda params, ewc: EWCOptimizer(fused(params), ewc, mode=mode)

    def inside(mode: Mode) -> Build:
        return lambda params, ewc: kind.ours(params, ewc=ewc, mode=mode)

    return {
        ALONE: (lambda params, _: fused(params), None),
        "torch, foreach, alone": (lambda params, _: foreach(params), None),
        "inside, alone": (lambda params, _: kind.ours(params), None),
        "inside, gradient": (inside("gradient"), "gradient"),
        "inside, proximal": (inside("proximal"), "proximal"),
        "in EWCOptimizer, gradient": (wrapped("gradient"), "gradient"),
        "in EWCOptimizer, proximal": (wrapped("proximal"), "proximal"),
        "in PyTorch, foreach and fused": (
            lambda params, ewc: Composed(fused(params), ewc),
            "gradient",
        ),
    }


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
        build: Build,
        mode: Mode | None,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self._kind, self._mode = kind, mode
        self._params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
        named = [(f"{index}", param) for index, param in enumerate(self._params)]
        self._ewc = EWC(named if mode else named[:1], ewc_lambda=EWC_LAMBDA)
        self._ewc.consolidate_from(
            {
                name: torch.rand(param.shape, generator=draw)
                for name, param in self._ewc.parameters.items()
            }
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
        state = list(self._ewc.fisher.values()), list(self._ewc.anchor.values())
        grads = [torch.full_like(param, TASK_GRADIENT) for param in values]
        if self._mode == "gradient":
            reference.add_penalty_grad_(grads, values, *state, ewc_lambda=EWC_LAMBDA)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        self._kind.theirs(params, fused=True).step()
        if self._mode == "proximal":
            reference.proximal_step_(values, *state, ewc_lambda=EWC_LAMBDA, lr=LR)
        return values


if __name__ == "__main__":
    script(suite, parts=tuple(SIZES))
