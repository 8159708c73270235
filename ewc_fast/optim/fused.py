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
from ewc_fast._prepare import prepare_sgd_step
from ewc_fast._steps import Step
from ewc_fast.ewc import EWC
from ewc_fast.optim.arguments import check_ewc, check_mode
from ewc_fast.optim.last_step import LastStep

_HALF = (torch.bfloat16, torch.float16)
Springs = dict[Tensor, tuple[Tensor, Tensor]]  # each parameter's Fisher and anchor
_OWN = ("ewc", "mode", "master_weights", "stochastic_rounding")


@dataclass
class Batch:
    """Parameters of one group that take the step in one call."""

    rests: bool  # without a gradient; only the proximal step is taken
    begins: bool  # its momentum
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    fisher: list[Tensor] = field(default_factory=list)
    anchor: list[Tensor] = field(default_factory=list)


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
            if ewc.importance == "si":
                raise ValueError(
                    "ewc: importance='si' needs the path of each step, which a fused step does not "
                    "keep; use ewc_fast.EWCOptimizer around PyTorch's optimizer"
                )
        self.ewc = ewc

    def _forget(self) -> None:
        self._plans: dict[tuple[Any, ...], functional.Plan] = {}
        self._springs: Springs = {}
        self._springs_of: tuple[int, int] | None = None
        self._last_step = LastStep()

    @property
    def last_penalty(self) -> Tensor | None:
        """The penalty before the last step, a float64 scalar; None before the first, or no EWC."""
        return self._last_step.penalty

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
        values = [step() for step in self._validated_steps()]
        if self.ewc is not None:
            self._last_step.penalty = _added(values, self.ewc.constant_penalty)
        return loss

    @abstractmethod
    def _prepare(self, group: dict[str, Any], batch: Batch, plan: functional.Plan | None) -> Step:
        """Validate the step of a batch and return it."""

    @abstractmethod
    def _missing_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state that a parameter lacks, as it is before the first step."""

    def _begins_with_zeros(self, group: dict[str, Any]) -> bool:
        """Whether missing state is as good as zeros."""
        return True

    def _validated_steps(self) -> list[Step]:
        """Return the steps of all groups; if one's are refused, none is taken and no state left."""
        springs = self._current_springs()
        if torch.compiler.is_compiling():
            self._begin_early(*(self._acting(group, springs) for group in self.param_groups))
        begun: list[tuple[Tensor, dict[str, Tensor]]] = []
        try:
            return [
                step
                for index, group in enumerate(self.param_groups)
                for step in self._group_steps(index, group, springs, begun)
            ]
        except BaseException:
            self._undo(begun)
            raise

    def _group_steps(
        self,
        index: int,
        group: dict[str, Any],
        springs: Springs,
        begun: list[tuple[Tensor, dict[str, Tensor]]],
    ) -> list[Step]:
        """Return the steps of a group's batches, their state made where missing."""
        steps = []
        for key, batch in self._batches(group, springs, begun).items():
            prepare = self._prepare_rest if batch.rests else self._prepare
            steps.append(prepare(group, batch, self._plan(index, *key)))
        return steps

    def _plan(self, *key: int) -> functional.Plan | None:
        """Return what a batch's call keeps; graphs keep nothing of the kind."""
        if torch.compiler.is_compiling():
            return None
        return self._plans.setdefault(key, functional.Plan(pinned=("fisher", "anchor")))

    def _current_springs(self) -> Springs:
        """Return the springs, looked up anew when the EWC or the groups have changed."""
        if self.ewc is None:
            return {}
        params = [param for group in self.param_groups for param in group["params"]]
        now, compiling = (self.ewc.version, len(params)), torch.compiler.is_compiling()
        if now == self._springs_of and not compiling:
            return self._springs
        rows = zip(*self.ewc.springs_of(params).operands, strict=True)
        springs = {param: (fisher, anchor) for param, fisher, anchor in rows}
        if not compiling:  # see EWC._active
            self._springs, self._springs_of = springs, now
            self._plans.clear()
        return springs

    def _moves(self, param: Tensor, springs: Springs) -> bool:
        """Whether a parameter takes a step: as in PyTorch, or as a spring pulls in its gradient."""
        pulled = self.mode == "gradient" and param.requires_grad and param in springs
        return param.grad is not None or pulled

    def _acting(self, group: dict[str, Any], springs: Springs) -> list[tuple[int, bool]]:
        """Return the places of those that do, or rest and only settle; and whether they rest."""
        moves = [self._moves(param, springs) for param in group["params"]]
        pulled = [param.requires_grad and param in springs for param in group["params"]]
        return [(i, not m) for i, m in enumerate(moves) if m or pulled[i]]

    def _batches(
        self,
        group: dict[str, Any],
        springs: Springs,
        begun: list[tuple[Tensor, dict[str, Tensor]]],
    ) -> dict[tuple[bool, ...], Batch]:
        """Return the parameters by what they have, those left out that have nothing to do."""
        batches: dict[tuple[bool, ...], Batch] = {}
        for param in group["params"]:
            spring = springs.get(param) if param.requires_grad else None
            rests = not self._moves(param, springs)
            if rests and spring is None:
                continue
            missing = self._make_state(param, group, rests)
            begun.append((param, missing))
            begins = "momentum_buffer" in missing
            key = (rests, spring is not None, self._has_master(param), begins)
            batch = batches.setdefault(key, Batch(rests, begins))
            if param.grad is None and not rests:
                param.grad = torch.zeros_like(param)
            batch.params.append(param)
            batch.grads.append(torch.zeros_like(param) if param.grad is None else param.grad)
            if spring is not None:
                batch.fisher.append(spring[0])
                batch.anchor.append(spring[1])
        return batches

    def _make_state(self, param: Tensor, group: dict[str, Any], rests: bool) -> dict[str, Tensor]:
        """Make the state that a parameter lacks; return it."""
        missing = self._missing_master(param) if rests else self._missing_state(param, group)
        if missing:
            self.state[param].update(missing)
        return missing

    def _undo(self, begun: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        for param, missing in begun:
            for name in missing:
                del self.state[param][name]
            if missing and not self.state[param]:
                del self.state[param]

    def _begin_early(self, *acting: list[tuple[int, bool]]) -> None:
        """Make missing state while a graph is traced, which is then not made again with it there.

        The graph itself looks for state, so that it holds for no other.
        """
        for group, places in zip(self.param_groups, acting, strict=True):
            for place, rests in places if self._begins_with_zeros(group) else ():
                self._make_state(group["params"][place], group, rests)

    # As by torch.compiler.assume_constant_result, which would import the compiler. Without the
    # mark the state is made in the graph, and another graph made where it is there.
    _begin_early._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _check_gradients(self) -> None:
        """Raise for sparse gradients, before any group has begun its step."""
        for param in itertools.chain.from_iterable(g["params"] for g in self.param_groups):
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients: build embeddings "
                    "with sparse=False"
                )

    def _prepare_rest(
        self, group: dict[str, Any], batch: Batch, plan: functional.Plan | None
    ) -> Step:
        """Validate the proximal step alone, of parameters without a gradient: theirs are zeros."""
        options = {**self._options(group, batch), "weight_decay": 0.0}
        return prepare_sgd_step(self._lists(batch), plan=plan, **options)

    def _lists(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Return the operands that all optimizers have."""
        lists = {"params": batch.params, "grads": batch.grads}
        if batch.fisher:
            lists.update(fisher=batch.fisher, anchor=batch.anchor)
        if self._has_master(batch.params[0]):
            lists["master"] = self._states(batch, "master")
        return lists

    def _states(self, batch: Batch, name: str) -> list[Tensor]:
        return [self.state[param][name] for param in batch.params]

    def _options(self, group: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """Return what all optimizers tell their step."""
        options: dict[str, Any] = {
            "lr": group["lr"],
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
        }
        if batch.fisher:
            assert self.ewc is not None
            options.update(mode=self.mode, ewc_lambda=self.ewc.strength)
        if self.stochastic_rounding and any(p.dtype == torch.bfloat16 for p in batch.params):
            drawn = torch.randint(2**32, (), dtype=torch.int64, device="cpu")
            options["rounding_seed"] = drawn
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


def _added(values: list[Tensor], constant: float | Tensor) -> Tensor:
    """Add scalars on the first one's device, for which nobody waits."""
    total = values[0] + constant if values else torch.as_tensor(constant, dtype=torch.float64)
    for value in values[1:]:
        total = total + value.to(total.device)
    return total
