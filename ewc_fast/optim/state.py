"""What the optimizers that have the penalty inside keep: options, moments, copies, checkpoints."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc_fast import functional
from ewc_fast.ewc import EWC
from ewc_fast.importance import ActivePath
from ewc_fast.optim.arguments import check_ewc, check_mode
from ewc_fast.optim.last_step import LastStep

_HALF = (torch.bfloat16, torch.float16)
_OWN = ("ewc", "mode", "master_weights", "stochastic_rounding")


@dataclass(frozen=True)
class Held:
    """What an EWC has for parameters: each one's Fisher and anchor; for SI the paths they go."""

    springs: Mapping[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)
    path: ActivePath | None = None


class FusedState(Optimizer, ABC):
    """All of :class:`~ewc_fast.optim.fused.FusedOptimizer` but its step."""

    ewc: EWC | None
    mode: Literal["gradient", "proximal"]
    master_weights: bool
    stochastic_rounding: bool

    def _configure(
        self, ewc: EWC | None, mode: str, master_weights: bool, stochastic_rounding: bool
    ) -> None:
        """Take up what PyTorch's class doesn't know, before that is initialised."""
        check_mode(mode)
        if master_weights and stochastic_rounding:
            raise ValueError(
                "stochastic_rounding: expected False with master_weights=True, whose float32 "
                "copies lose nothing that rounding by chance could save"
            )
        self.__dict__.update(
            ewc=None,  # until there are parameters that it can be compared with
            mode=mode,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
        )
        self._forget()

    def _take_up(self, ewc: EWC | None) -> None:
        """Finish what :meth:`_configure` began, once there are groups."""
        for group in self.param_groups:
            if group.get("differentiable"):
                raise ValueError(
                    "differentiable: expected False, since a fused step writes in place, unseen by "
                    "autograd; use ewc_fast.EWCOptimizer around PyTorch's optimizer"
                )
        # GradScaler then unscales gradients itself, as for optimizers that aren't fused.
        self._step_supports_amp_scaling = False
        if ewc is not None:
            check_ewc(ewc, self.param_groups)
        self.ewc = ewc

    def _forget(self) -> None:
        self._plans: dict[tuple[Any, ...], functional.Plan] = {}
        self._held, self._held_for = Held(), (-1, -1)  # by EWC.version, number of parameters
        self._last_step = LastStep()

    @property
    def last_penalty(self) -> Tensor | None:
        """The penalty before the last step, a float64 scalar; None before the first, or no EWC."""
        return self._last_step.penalty

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype in _HALF

    def _is_wide(self, param: Tensor) -> bool:
        """Whether the parameter's moments are float32, though it is not."""
        return (self.master_weights or self.stochastic_rounding) and param.dtype in _HALF

    def _moment(self, param: Tensor) -> Tensor:
        dtype = torch.float32 if self._is_wide(param) else param.dtype
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _missing_master(self, param: Tensor) -> dict[str, Tensor]:
        if not self._has_master(param) or "master" in self.state.get(param, ()):
            return {}
        return {"master": param.detach().float()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; new parameters of the EWC's model are taken up."""
        if self.ewc is not None:
            self.ewc.track()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for param, kept in self.state.items():
            if "step" in kept:
                kept["step"] = kept["step"].to(param.device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as PyTorch's optimizer does, with the EWC's under the key ``"ewc"``."""
        state = super().state_dict()
        return state if self.ewc is None else {**state, "ewc": self.ewc.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`, or that of PyTorch's optimizer.

        The EWC is left alone where its key is missing.
        """
        ewc_state = state_dict.get("ewc")
        if self.ewc is not None and ewc_state is not None:
            self.ewc.check_state_dict(ewc_state)
        inner = {key: value for key, value in state_dict.items() if key != "ewc"}
        super().load_state_dict(inner)
        for param, saved in self._saved(inner):
            self._load_wide(param, saved)
        if self.ewc is not None and ewc_state is not None:
            self.ewc.load_state_dict(ewc_state)

    def _saved(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Return each parameter's saved state."""
        numbers = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                yield param, state_dict["state"][number]

    def _load_wide(self, param: Tensor, saved: dict[str, Any]) -> None:
        """Mend what PyTorch loads in the parameters' dtype, whatever it was saved in."""
        kept = self.state[param]
        if not self._has_master(param):
            kept.pop("master", None)
        for name, value in saved.items():
            if name in kept and name != "step" and self._is_wide(param):
                kept[name] = value.to(param.device, torch.float32, copy=True)
