"""Steps of optimizers: operands of every kind for them, as the compiled steps and the specification
take them. Names and slots are those of ``ewc_fast.steps`` and ``csrc/optimizer.h``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from list_operations import noise, positive, state
from numerics import compute_dtype
from torch import Tensor

from ewc_fast import reference_steps
from ewc_fast.reference_steps import AdamOptions, SgdOptions

SLOTS = {
    "params": 0, "grads": 1, "fisher": 2, "anchor": 3, "master": 4, "exp_avgs": 5,
    "momentum_buffers": 5, "exp_avg_sqs": 6, "max_exp_avg_sqs": 7, "path": 8, "steps": 9,
}  # fmt: skip
Lists = dict[str, list[Tensor]]

ADAM = AdamOptions(
    lr=0.01, weight_decay=0.0, ewc_lambda=1.7, maximize=False, proximal=False, rounding_seed=None,
    beta1=0.9, beta2=0.999, eps=1e-8, decoupled=False,
)  # fmt: skip
SGD = SgdOptions(
    lr=0.01, weight_decay=0.0, ewc_lambda=1.7, maximize=False, proximal=False, rounding_seed=None,
    momentum=0.9, dampening=0.0, nesterov=False, first=False,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A kind of step: its options, and which operands it has."""

    options: AdamOptions | SgdOptions
    springs: bool = True
    amsgrad: bool = False
    master: bool = False
    fisher: torch.dtype | None = None  # None: the state's
    narrow: bool = False  # moments of 16-bit parameters are 16 bits wide too
    path: bool = False

    @property
    def adam(self) -> bool:
        return isinstance(self.options, AdamOptions)

    def with_options(self, **changes: Any) -> Step:
        return replace(self, options=self.options._replace(**changes))

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether parameters of a dtype can have such operands."""
        wide = dtype in (torch.float32, torch.float64)
        return not (
            (wide and (self.master or self.narrow))
            or (dtype == torch.float64 and self.fisher is not None)
        )

    def make(self, params: list[Tensor]) -> Lists:
        """Return random operands around parameters."""
        dtypes = [p.dtype if self.narrow else compute_dtype(p.dtype) for p in params]
        made: Lists = {"params": params, "grads": noise(params)}
        if self.springs:
            made |= {"fisher": positive(params, self.fisher), "anchor": state(params)}
        if self.master:
            made["master"] = [p.float() + 2**-12 * torch.randn(p.shape) for p in params]
        if self.adam:
            made["exp_avgs"] = _to([0.1 * m for m in state(params)], dtypes)
            made["exp_avg_sqs"] = _to([m.square() + 1e-6 for m in state(params)], dtypes)
            made["steps"] = [torch.tensor(float(3 + i % 5)) for i in range(len(params))]
        elif self.options.momentum:
            made["momentum_buffers"] = _to(state(params), dtypes)
        if self.path:
            made["path"] = state(params)
        if self.amsgrad:
            made["max_exp_avg_sqs"] = _to([m.square() for m in state(params)], dtypes)
        return made

    def reference(self, lists: Lists) -> float:
        """Take the step of the specification; return the penalty before it."""
        step = reference_steps.adam_step_ if self.adam else reference_steps.sgd_step_
        return step(self.options, **lists).item()


def _to(tensors: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [t.to(d) for t, d in zip(tensors, dtypes, strict=True)]


def copied(lists: Lists) -> Lists:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


STEPS = {
    "adam": Step(ADAM),
    "adam_plain": Step(ADAM, springs=False),
    "adam_coupled_maximize": Step(ADAM._replace(weight_decay=0.1, maximize=True)),
    "adamw": Step(ADAM._replace(weight_decay=0.1, decoupled=True), amsgrad=True),
    "adamw_proximal": Step(ADAM._replace(weight_decay=0.1, decoupled=True, proximal=True)),
    "adam_master": Step(ADAM, master=True, amsgrad=True),
    "adam_moments": Step(ADAM, narrow=True),
    "adam_bfloat16_fisher": Step(ADAM, fisher=torch.bfloat16, narrow=True),
    "adam_bfloat16_fisher_master": Step(ADAM, fisher=torch.bfloat16, master=True),
    "adam_by_chance": Step(ADAM._replace(rounding_seed=0xDEADBEEF)),
    "adam_betas": Step(ADAM._replace(beta1=0.0, beta2=0.3)),
    "adam_path": Step(ADAM._replace(maximize=True, weight_decay=0.1), path=True),
    "adam_path_proximal_amsgrad": Step(ADAM._replace(proximal=True), path=True, amsgrad=True),
    "adam_path_master": Step(ADAM, path=True, master=True),
    "adam_path_by_chance": Step(ADAM._replace(rounding_seed=7), path=True),
    "sgd": Step(SGD),
    "sgd_plain": Step(SGD._replace(momentum=0.0), springs=False),
    "sgd_no_momentum": Step(SGD._replace(momentum=0.0, maximize=True)),
    "sgd_nesterov": Step(SGD._replace(nesterov=True, weight_decay=0.1)),
    "sgd_dampened_proximal": Step(SGD._replace(dampening=0.3, proximal=True)),
    "sgd_first": Step(SGD._replace(first=True, dampening=0.3)),
    "sgd_master": Step(SGD, master=True, fisher=torch.bfloat16),
    "sgd_path": Step(SGD, path=True),
    "sgd_path_plain": Step(SGD._replace(momentum=0.0), path=True, springs=False),
    "sgd_path_master": Step(SGD._replace(proximal=True), path=True, master=True),
    "sgd_by_chance": Step(SGD._replace(rounding_seed=5), narrow=True),
}
