"""Validates the optimizers' steps, to be taken later: by kernels, or by a graph's operators."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ewc_fast import _checks, _step_ops, _steps
from ewc_fast._checks import TensorList, as_list
from ewc_fast._dispatch import Impl
from ewc_fast._plan import Plan
from ewc_fast._steps import Step
from ewc_fast.reference_steps import AdamOptions, SgdOptions

Lists = Mapping[str, Tensor | Iterable[Tensor] | None]
Mode = Literal["gradient", "proximal"]


def prepare_adam_step(
    lists: Lists,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    ewc_lambda: float | Tensor = 0.0,
    mode: Mode = "gradient",
    rounding_seed: int | Tensor | None = None,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Step:
    """Validate a step of :func:`ewc_fast.functional.adam_step_`, lists by name; return it untaken.

    For optimizers, which take no group's step before all are validated.
    """
    numbers = _Numbers.of(lr, ewc_lambda, rounding_seed)
    options = AdamOptions(
        lr=numbers.rate,
        weight_decay=_checks.non_negative("weight_decay", weight_decay),
        ewc_lambda=numbers.strength,
        maximize=maximize,
        proximal=_is_proximal(mode),
        rounding_seed=numbers.seed,
        beta1=_checks.decay_rate("betas[0]", betas[0]),
        beta2=_checks.decay_rate("betas[1]", betas[1]),
        eps=_checks.non_negative("eps", eps),
        decoupled=decoupled_weight_decay,
    )
    present = _present(lists, rounding_seed is not None)
    if numbers.in_graph is not None:
        return functools.partial(_step_ops.adam_step_, present, options, numbers.in_graph)
    return _steps.adam_step(present, options, impl, plan, numbers.rate_on_gpu)


def prepare_sgd_step(
    lists: Lists,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    maximize: bool = False,
    ewc_lambda: float | Tensor = 0.0,
    mode: Mode = "gradient",
    rounding_seed: int | Tensor | None = None,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Step:
    """Validate a step of :func:`ewc_fast.functional.sgd_step_`, and return it untaken."""
    numbers = _Numbers.of(lr, ewc_lambda, rounding_seed)
    options = SgdOptions(
        lr=numbers.rate,
        weight_decay=_checks.non_negative("weight_decay", weight_decay),
        ewc_lambda=numbers.strength,
        maximize=maximize,
        proximal=_is_proximal(mode),
        rounding_seed=numbers.seed,
        momentum=_checks.non_negative("momentum", momentum),
        dampening=_checks.finite("dampening", dampening),
        nesterov=nesterov,
        first=first,
    )
    if (lists.get("momentum_buffers") is None) != (momentum == 0):
        buffers = "no buffers" if lists.get("momentum_buffers") is None else "buffers"
        raise ValueError(
            "momentum_buffers: expected buffers with momentum, and none without, got "
            f"momentum={momentum!r} and {buffers}"
        )
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("nesterov: expected momentum > 0 and dampening 0 with it")
    present = _present(lists, rounding_seed is not None)
    if numbers.in_graph is not None:
        return functools.partial(_step_ops.sgd_step_, present, options, numbers.in_graph)
    return _steps.sgd_step(present, options, impl, plan, numbers.rate_on_gpu)


class _Numbers(NamedTuple):
    """What steps take as numbers, checked; in a graph tensors, which count when it runs."""

    rate: float
    rate_on_gpu: Tensor | None  # counts instead
    strength: float
    seed: int | None
    in_graph: _step_ops.Numbers | None

    @classmethod
    def of(
        cls, lr: float | Tensor, ewc_lambda: float | Tensor, seed: int | Tensor | None
    ) -> _Numbers:
        """Check and read the numbers, or leave that to the graph that is being made."""
        if torch.compiler.is_compiling():
            in_graph = _step_ops.Numbers(
                _checks.in_graph("lr", lr),
                _checks.in_graph("ewc_lambda", ewc_lambda),
                None if seed is None else torch.as_tensor(seed, dtype=torch.int64, device="cpu"),
            )
            return cls(0.0, None, 0.0, None, in_graph)
        rate, rate_on_gpu = _checks.learning_rate(lr)
        drawn = int(seed) if isinstance(seed, Tensor) else seed
        _checks.seed(drawn, name="rounding_seed")
        return cls(rate, rate_on_gpu, _checks.strength(ewc_lambda, rate), drawn, None)


def _is_proximal(mode: Mode) -> bool:
    _checks.one_of("mode", mode, ("gradient", "proximal"))
    return mode == "proximal"


def _present(lists: Lists, by_chance: bool) -> dict[str, TensorList]:
    """Return the lists that are there, if those that need each other are."""
    if (lists.get("fisher") is None) != (lists.get("anchor") is None):
        missing, given = (
            ("fisher", "anchor") if lists.get("fisher") is None else ("anchor", "fisher")
        )
        raise ValueError(f"{missing}: expected one beside {given}, got None")
    if lists.get("master") is not None and by_chance:
        raise ValueError("rounding_seed: expected None beside master, which rounds to nearest")
    return {name: as_list(name, tensors) for name, tensors in lists.items() if tensors is not None}
