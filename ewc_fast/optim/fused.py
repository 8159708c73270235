"""What the optimizers that have the penalty inside share: rows, state, copies, checkpoints."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc_fast import functional
from ewc_fast.ewc import EWC
from ewc_fast.importance import ActivePath
from ewc_fast.optim.arguments import check_ewc, check_mode

_HALF = (torch.bfloat16, torch.float16)
_OWN = ("ewc", "mode", "master_weights", "stochastic_rounding")


@dataclass
class Batch:
    """Parameters of one group that take the step in one call."""

    begins: bool  # its momentum
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    fisher: list[Tensor] = field(default_factory=list)
    anchor: list[Tensor] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)


class FusedOptimizer(Optimizer, ABC):
    """Base of :class:`SGD`, :class:`Adam`, :class:`AdamW`, beside PyTorch's class of that name."""

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
        self._springs: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._springs_of: tuple[int, int] | None = None
        self._path: ActivePath | None = None
        self.last_penalty: Tensor | None = None

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what the closure returns, the task's loss without the penalty.

        ``last_penalty`` then holds the penalty before the step, if there is an EWC.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._find_springs()
        omegas = self._omegas()
        batches = [self._batches(group, omegas) for group in self.param_groups]
        values = []
        for index, group in enumerate(self.param_groups):
            resting, moving = batches[index]
            if resting:
                values.append(self._settle(group, resting))
            for key, batch in moving.items():
                plan = self._plans.setdefault(
                    (index, *key), functional.Plan(pinned=("fisher", "anchor"))
                )
                values.append(self._step_batch(group, batch, plan))
        if self.ewc is not None:
            self.last_penalty = _added(values, self.ewc.constant_penalty)
        return loss

    @abstractmethod
    def _step_batch(self, group: dict[str, Any], batch: Batch, plan: functional.Plan) -> Tensor:
        """Take the step of a batch; return the penalty before it."""

    @abstractmethod
    def _begin(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Make the parameter's state where missing; return whether its momentum is to begin."""

    def _find_springs(self) -> None:
        """Look the springs up anew when the EWC or the groups have changed."""
        if self.ewc is None:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        now = self.ewc.version, len(params)
        if now != self._springs_of:
            rows = zip(*self.ewc.springs_of(params).operands, strict=True)
            self._springs = {param: (fisher, anchor) for param, fisher, anchor in rows}
            self._springs_of = now
            self._path = self.ewc.path_of(params)
            self._plans.clear()

    def _omegas(self) -> dict[Tensor, Tensor]:
        """Return the path integrals that this step adds to: with a gradient there is a way."""
        if self._path is None:
            return {}
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return self._path.omegas(param for param in params if param.grad is not None)

    def _batches(
        self, group: dict[str, Any], omegas: dict[Tensor, Tensor]
    ) -> tuple[list[Tensor], dict[tuple[Any, ...], Batch]]:
        """Return the parameters that only settle, and the others by what they have.

        As in PyTorch, a parameter without a gradient is left alone, unless a spring is at it.
        Frozen ones have none.
        """
        chosen: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = []
        resting = []
        for param in group["params"]:
            spring = self._springs.get(param) if param.requires_grad else None
            if param.grad is not None:
                chosen.append((param, spring))
            elif spring is not None and self.mode == "proximal":
                resting.append(param)
            elif spring is not None:
                chosen.append((param, spring))
        batches: dict[tuple[Any, ...], Batch] = {}
        for param, spring in chosen:
            begins = self._begin(param, group)
            omega = omegas.get(param)
            key = (spring is not None, self._has_master(param), begins, omega is not None)
            batch = batches.setdefault(key, Batch(begins))
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            batch.params.append(param)
            batch.grads.append(param.grad)
            if spring is not None:
                batch.fisher.append(spring[0])
                batch.anchor.append(spring[1])
            if omega is not None:
                batch.path.append(omega)
        return resting, batches

    def _check_gradients(self) -> None:
        """Raise for sparse gradients, before any group has begun its step."""
        for param in itertools.chain.from_iterable(g["params"] for g in self.param_groups):
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients: build embeddings "
                    "with sparse=False"
                )

    def _settle(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        """Take the proximal step alone, of parameters without a gradient."""
        assert self.ewc is not None
        held = [self.state.get(p, {}).get("master", p) for p in params]
        springs = [self._springs[p] for p in params]
        fisher, anchor = [fisher for fisher, _ in springs], [anchor for _, anchor in springs]
        strength = self.ewc.ewc_lambda
        value = functional.penalty(held, fisher, anchor, ewc_lambda=strength)
        functional.proximal_step_(held, fisher, anchor, ewc_lambda=strength, lr=float(group["lr"]))
        for param, moved in zip(params, held, strict=True):
            if moved is not param:
                param.copy_(moved)
        return value

    def _options(self, group: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """Return what all optimizers tell their step."""
        options: dict[str, Any] = {
            "lr": _learning_rate(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
        }
        if batch.fisher:
            assert self.ewc is not None
            options |= {"fisher": batch.fisher, "anchor": batch.anchor, "mode": self.mode}
            options["ewc_lambda"] = self.ewc.ewc_lambda
        if batch.path:
            options["path"] = batch.path
        if self._has_master(batch.params[0]):
            options["master"] = [self.state[param]["master"] for param in batch.params]
        if self.stochastic_rounding and any(p.dtype == torch.bfloat16 for p in batch.params):
            drawn = torch.randint(2**32, (), dtype=torch.int64, device="cpu")
            options["rounding_seed"] = int(drawn)
        return options

    # State

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype in _HALF

    def _is_wide(self, param: Tensor) -> bool:
        """Whether the parameter's moments are float32, though it is not."""
        return (self.master_weights or self.stochastic_rounding) and param.dtype in _HALF

    def _moment(self, param: Tensor) -> Tensor:
        dtype = torch.float32 if self._is_wide(param) else param.dtype
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _begin_master(self, param: Tensor) -> None:
        if self._has_master(param) and "master" not in self.state[param]:
            self.state[param]["master"] = param.detach().float()

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


def _learning_rate(lr: float | Tensor) -> float | Tensor:
    """Return a number, or the tensor on a GPU that the step reads there: nobody waits for it."""
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _added(values: list[Tensor], constant: float | Tensor) -> Tensor:
    """Add scalars on the first one's device, for which nobody waits."""
    total = values[0] + constant if values else torch.as_tensor(constant, dtype=torch.float64)
    for value in values[1:]:
        total = total + value.to(total.device)
    return total
