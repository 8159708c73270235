"""The step that the optimizers with the penalty inside share: who takes part, all validated."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ewc_fast import functional
from ewc_fast._prepare import prepare_sgd_step
from ewc_fast._steps import Step
from ewc_fast.optim.state import FusedState, Held


@dataclass
class Batch:
    """Parameters of one group that take the step in one call."""

    rests: bool  # without a gradient; only the proximal step is taken
    begins: bool  # its momentum
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    fisher: list[Tensor] = field(default_factory=list)
    anchor: list[Tensor] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)


class FusedOptimizer(FusedState):
    """Base of :class:`SGD`, :class:`Adam`, :class:`AdamW`, beside PyTorch's class of that name."""

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
        held = self._current()
        if torch.compiler.is_compiling():
            self._begin_early(*(self._acting(group, held) for group in self.param_groups))
        begun: list[tuple[Tensor, dict[str, Tensor]]] = []
        try:
            return [
                step
                for index, group in enumerate(self.param_groups)
                for step in self._group_steps(index, group, held, begun)
            ]
        except BaseException:
            self._undo(begun)
            raise

    def _group_steps(
        self,
        index: int,
        group: dict[str, Any],
        held: Held,
        begun: list[tuple[Tensor, dict[str, Tensor]]],
    ) -> list[Step]:
        """Return the steps of a group's batches, their state made where missing."""
        steps = []
        for key, batch in self._batches(group, held, begun).items():
            prepare = self._prepare_rest if batch.rests else self._prepare
            steps.append(prepare(group, batch, self._plan(index, *key)))
        return steps

    def _plan(self, *key: int) -> functional.Plan | None:
        """Return what a batch's call keeps; graphs keep nothing of the kind."""
        if torch.compiler.is_compiling():
            return None
        return self._plans.setdefault(key, functional.Plan(pinned=("fisher", "anchor")))

    def _current(self) -> Held:
        """Return what the EWC has, looked up anew when it or the groups have changed."""
        if self.ewc is None:
            return self._held
        params = [param for group in self.param_groups for param in group["params"]]
        now, compiling = (self.ewc.version, len(params)), torch.compiler.is_compiling()
        if now == self._held_for and not compiling:
            return self._held
        rows = zip(*self.ewc.springs_of(params).operands, strict=True)
        springs = {param: (fisher, anchor) for param, fisher, anchor in rows}
        held = Held(springs, self.ewc.path_of(params))
        if not compiling:  # see EWC._active
            self._held, self._held_for = held, now
            self._plans.clear()
        return held

    def _moves(self, param: Tensor, held: Held) -> bool:
        """Whether a parameter takes a step: as in PyTorch, or as a spring pulls in its gradient."""
        pulled = self.mode == "gradient" and param.requires_grad and param in held.springs
        return param.grad is not None or pulled

    def _acting(self, group: dict[str, Any], held: Held) -> list[tuple[int, bool]]:
        """Return the places of those that do, or rest and only settle; and whether they rest."""
        moves = [self._moves(param, held) for param in group["params"]]
        pulled = [param.requires_grad and param in held.springs for param in group["params"]]
        return [(i, not m) for i, m in enumerate(moves) if m or pulled[i]]

    def _batches(
        self,
        group: dict[str, Any],
        held: Held,
        begun: list[tuple[Tensor, dict[str, Tensor]]],
    ) -> dict[tuple[bool, ...], Batch]:
        """Return the parameters by what they have, those left out that have nothing to do."""
        batches: dict[tuple[bool, ...], Batch] = {}
        for param in group["params"]:
            spring = held.springs.get(param) if param.requires_grad else None
            rests = not self._moves(param, held)
            if rests and spring is None:
                continue
            missing = self._make_state(param, group, rests)
            begun.append((param, missing))
            begins = "momentum_buffer" in missing
            omega = self._omega(param, held)
            springs, path = spring is not None, omega is not None
            key = (rests, springs, self._has_master(param), begins, path)
            batch = batches.setdefault(key, Batch(rests, begins))
            if param.grad is None and not rests:
                param.grad = torch.zeros_like(param)
            batch.params.append(param)
            batch.grads.append(torch.zeros_like(param) if param.grad is None else param.grad)
            if spring is not None:
                batch.fisher.append(spring[0])
                batch.anchor.append(spring[1])
            if omega is not None:
                batch.path.append(omega)
        return batches

    def _omega(self, param: Tensor, held: Held) -> Tensor | None:
        """Return the path integral that a parameter's step adds to, if there is one."""
        # Without a gradient of the task's there is no way.
        return None if held.path is None or param.grad is None else held.path.omega(param)

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
            moving = [group["params"][place] for place, rests in places if not rests]
            path = None if self.ewc is None else self.ewc.path_of(moving)
            if path is not None:
                for param in moving:
                    path.omega(param)

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
        if batch.path:
            lists["path"] = batch.path
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


def _added(values: list[Tensor], constant: float | Tensor) -> Tensor:
    """Add scalars on the first one's device, for which nobody waits."""
    total = values[0] + constant if values else torch.as_tensor(constant, dtype=torch.float64)
    for value in values[1:]:
        total = total + value.to(total.device)
    return total
