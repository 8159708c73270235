"""Adam's and SGD's steps with the penalty inside on a GPU, beside PyTorch's fused steps alone.

36 bytes a float32 parameter beside 28 of AdamW alone, and 28 beside 20 of SGD with momentum: 1.29
and 1.4 times at one bandwidth. Device time by CUDA events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from gpu_operations_case import CUDA, LR, TRITON, shapes
from gpu_timing import NO_ROOM, TRIED_OUT, Budget, Clock, Effort, device_for, measure, script
from harness import Claim, MismatchError, Provider, Result
from torch import Tensor

from ewc_fast import functional, reference_steps
from ewc_fast._dispatch import Impl
from ewc_fast.reference_steps import AdamOptions, SgdOptions

ALONE = "torch, fused, alone"
APART = "ewc_fast, penalty, then torch, fused"
EWC_LAMBDA, MOMENTUM = 400.0, 0.9
ADAMW, SGD = "AdamW", "SGD with momentum"
MOST = {ADAMW: 1.35, SGD: 1.5}  # times the step alone, promised from 10^8 parameters on
LIKE_A_MODEL, QUICK = 10**8, 3000
SECONDS = 90.0
EFFORT = Effort(seconds=0.3, rounds=7)
CHECKED = 1 << 22  # elements, compared with the specification
ROUNDINGS = 4  # eps of a parameter that its error may have

Names = dict[str, list[Tensor]]


@dataclass
class Case:
    """An optimizer's step on float32 tensors of a layout."""

    optimizer: str
    layout: str
    elements: int
    device: torch.device
    lists: Names = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"step, {self.optimizer}, {self.elements:.0e} {self.layout}"

    def providers(self) -> dict[str, Provider]:
        """Make the operands; return what competes on them."""
        self.lists = self._operands()
        plan, penalised = functional.Plan(), self._inner()
        springs = [self.lists[name] for name in ("grads", "params", "fisher", "anchor")]

        def apart() -> None:
            functional.add_penalty_grad_(*springs, ewc_lambda=EWC_LAMBDA, plan=plan)
            penalised.step()

        calls: dict[str, Callable[[], object]] = {
            CUDA: self._ours("cuda"), TRITON: self._ours("triton"), ALONE: self._inner().step,
            APART: apart,
        }  # fmt: skip
        return {
            name: Provider(call, partial(self._check, call) if name in (CUDA, TRITON) else _nothing)
            for name, call in calls.items()
        }

    def _ours(self, impl: Impl) -> Callable[[], object]:
        fixed = {"lr": LR, "ewc_lambda": EWC_LAMBDA, "impl": impl, "plan": functional.Plan()}
        if self.optimizer == SGD:
            return partial(functional.sgd_step_, **self.lists, momentum=MOMENTUM, **fixed)
        decay = {"weight_decay": 0.01, "decoupled_weight_decay": True}
        return partial(functional.adam_step_, **self.lists, **decay, **fixed)

    def _inner(self) -> torch.optim.Optimizer:
        params = self.lists["params"]
        for param, grad in zip(params, self.lists["grads"], strict=True):
            param.grad = grad
        if self.optimizer == SGD:
            return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True)
        return torch.optim.AdamW(params, lr=LR, weight_decay=0.01, fused=True)

    def _operands(self) -> Names:
        draw = torch.Generator(self.device).manual_seed(0)
        adam = ("exp_avgs", "exp_avg_sqs") if self.optimizer == ADAMW else ("momentum_buffers",)
        made = {
            name: [
                torch.rand(shape, generator=draw, device=self.device)
                for shape in shapes(self.layout, self.elements)
            ]
            for name in ("params", "grads", "fisher", "anchor", *adam)
        }
        if self.optimizer == ADAMW:
            made["steps"] = [torch.zeros((), device=self.device) for _ in made["params"]]
        return made

    def _check(self, call: Callable[[], object]) -> None:
        """Hold one step to the specification in float64, on tensors that are not too large."""
        picked = [i for i, p in enumerate(self.lists["params"]) if p.numel() <= CHECKED]
        exact = {
            name: [ts[i].clone() if name == "steps" else ts[i].double() for i in picked]
            for name, ts in self.lists.items()
        }
        call()
        common = (LR, 0.01 if self.optimizer == ADAMW else 0.0, EWC_LAMBDA, False, False, None)
        if self.optimizer == ADAMW:
            options = AdamOptions(*common, 0.9, 0.999, 1e-8, decoupled=True)
            reference_steps.adam_step_(options, **exact)
        else:
            reference_steps.sgd_step_(
                SgdOptions(*common, MOMENTUM, 0.0, nesterov=False, first=False), **exact
            )
        eps = torch.finfo(torch.float32).eps
        for i, right in zip(picked, exact["params"], strict=True):
            off = (self.lists["params"][i].double() - right).abs() / (eps * (right.abs() + LR))
            if not off.max().item() <= ROUNDINGS:
                raise MismatchError(f"params[{i}]: off by {off.max().item():.3g} eps")


def _nothing() -> None:
    """PyTorch's own steps are not checked."""


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Return what is measured, the most telling first."""
    sizes = [QUICK] if quick else [LIKE_A_MODEL, LIKE_A_MODEL // 100]
    return [
        Case(optimizer, layout, n, device)
        for n in sizes
        for layout in ("list", "flat")
        for optimizer in (ADAMW, SGD)
    ]


def suite(quick: bool, budget: Budget) -> Iterator[Result]:
    """Measure case by case, until time is up."""
    clock = Clock(device_for(quick))
    for case in cases(quick, clock.device):
        if budget.spent:
            yield Result(refused={str(case): "not reached: time was up"})
            continue
        yield measured(case, clock, TRIED_OUT if quick else EFFORT)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(case: Case, clock: Clock, effort: Effort) -> Result:
    """Measure one case."""
    result = Result()
    try:
        providers = case.providers()
    except torch.OutOfMemoryError:
        return Result(refused={str(case): NO_ROOM})
    timings = measure(providers, clock, effort)
    result.add(str(case), timings, (ALONE,))
    for row in result.rows:
        row |= {"optimizer": case.optimizer, "layout": case.layout, "elements": case.elements}
        if row["provider"] not in (CUDA, TRITON) or clock.device.type != "cuda":
            continue
        if case.elements >= LIKE_A_MODEL:
            times = timings.median(row["provider"]) / timings.median(ALONE)
            title = f"{case}, {row['provider']}: times the step alone"
            result.claims.append(Claim(title, times, MOST[case.optimizer], at_least=False))
    return result


if __name__ == "__main__":
    script(suite, SECONDS)
