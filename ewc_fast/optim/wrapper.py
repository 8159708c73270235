"""EWCOptimizer: any PyTorch optimizer, with the EWC penalty applied in its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc_fast._springs import ActiveSprings
from ewc_fast.ewc import EWC
from ewc_fast.importance import ActivePath
from ewc_fast.optim.arguments import check_ewc, check_mode
from ewc_fast.optim.last_step import LastStep

_SHARED_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class EWCOptimizer(Optimizer):
    r"""Wrap an optimizer so that every ``step()`` also pulls towards what old tasks need.

    Use it wherever the inner optimizer was used: schedulers, ``GradScaler``, gradient accumulation,
    hooks and ``state_dict`` work as before. Before the first ``ewc.consolidate`` it does nothing.

    ``mode="gradient"`` (default)
        :math:`g \mathrel{+}= \lambda F(\theta - a)` before the inner step, the paper's form. With
        a closure (LBFGS) the penalty joins each evaluation. Plain SGD diverges once
        :math:`\eta \lambda \max F > 2`.
    ``mode="proximal"``
        :math:`\theta \leftarrow (\theta + \eta\lambda F a)/(1 + \eta\lambda F)` after the inner
        step, with the group's learning rate :math:`\eta`: stable for every strength, and apart
        from the optimizer's moments, as decoupled weight decay is.

    Order with gradient clipping: ``clip_grad_norm_`` between ``backward()`` and ``step()`` clips
    the task's gradient alone, and the penalty is added whole. To clip the sum, call
    ``ewc.add_penalty_grad_()`` yourself (after ``scaler.unscale_(inner)``, if there is a scaler),
    clip, and step the inner optimizer. ``GradScaler`` unscales before the penalty is added, and a
    skipped step adds none.

    ``torch.compile`` takes a whole step, backward pass and wrapper, in one graph
    (``fullgraph=True``) where it takes the inner optimizer's step so. Nothing of EWC's breaks the
    graph, but PyTorch 2.13's optimizers do: on purpose before and after each step (the note on
    graph breaks in torch/optim/optimizer.py says why; without them memory use grows), around steps
    with ``fused=True``, which the compiler leaves alone, and where gradients are made in the same
    graph ("pending mutation on parameter"). Without ``fullgraph`` they compile in pieces; for one
    graph take :class:`~ewc_fast.optim.SGD`, :class:`~ewc_fast.optim.Adam` or
    :class:`~ewc_fast.optim.AdamW`. New values of lambda recompile nothing; a consolidation
    recompiles once. A CUDA graph captures a step with the lambda of its capture.

    With ``EWC(importance="si")`` each step adds to the path integral: the task's gradient as it is
    when ``step()`` begins (clipped, say, but without the penalty) times the way that the parameters
    then go (all of it: moments, decay and penalty). With a closure that is evaluated several times
    a step, each evaluation's gradient counts for the way to the next.

    ``state_dict()`` is the inner optimizer's with one more key, ``"ewc"``: whatever saves the
    optimizer saves Fisher and anchor. Either can load the other's: a plain optimizer ignores the
    key, and this one leaves its EWC alone where the key is missing.

    Parameters
    ----------
    optimizer
        The inner optimizer. Parameters that ``ewc`` does not track are stepped as always.
    ewc
        The state; several optimizers may share it, each applies it to its own parameters.
    mode
        ``"gradient"`` or ``"proximal"``.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind, an unknown mode, an optimizer that holds none of the
        parameters that ``ewc`` tracks, or one that maximizes (``mode="gradient"`` only).

    References
    ----------
    Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114.

    Examples
    --------
    >>> from ewc_fast import EWC
    >>> model = torch.nn.Linear(4, 3)
    >>> ewc = EWC(model, ewc_lambda=400.0)
    >>> optimizer = EWCOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), ewc)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ewc: EWC,
        *,
        mode: Literal["gradient", "proximal"] = "gradient",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        check_mode(mode)
        if mode == "gradient" and any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: maximize=True would turn the penalty's gradient around and push away "
                "from the anchor; minimize the negative instead, or use mode='proximal'"
            )
        check_ewc(ewc, optimizer.param_groups)
        # Not Optimizer.__init__, which would make groups and state of its own.
        self.__setstate__({"optimizer": optimizer, "ewc": ewc, "mode": mode})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["optimizer"] = state["optimizer"]
        for hooks in _SHARED_HOOKS:
            state[hooks] = getattr(self.optimizer, hooks)
        super().__setstate__(state)
        self._springs: list[ActiveSprings] = []
        self._built_for: tuple[int, ...] = ()
        self._path: tuple[tuple[int, ...], ActivePath | None] = ((), None)
        self._last_step = LastStep()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "ewc": self.ewc, "mode": self.mode}

    def __getattr__(self, name: str) -> Any:
        # What only the inner optimizer has, train() and eval() of some, say. Private names stay
        # apart: a fused optimizer's claim to unscale gradients itself must not become ours.
        if name.startswith("_") or name in ("optimizer", "ewc", "mode"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    @property
    def last_penalty(self) -> Tensor | None:
        """The penalty before the last step; None before the first, and in ``mode="proximal"``."""
        return self._last_step.penalty

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; new parameters of the model are taken up."""
        self.ewc.track()
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the inner optimizer under the penalty; return what it returns.

        ``last_penalty`` then holds the penalty before the step (``mode="gradient"`` only).
        """
        result = self._inner_step(closure)
        if self.mode == "proximal":
            for group, springs in zip(self.param_groups, self._current_springs(), strict=True):
                springs.proximal_step_(self.ewc.strength, group["lr"])
        path = self._current_path()
        if path is not None:
            path.end()
        return result

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """Step the inner optimizer; with ``mode="gradient"`` on gradients that have the penalty."""
        if closure is not None:
            return self.optimizer.step(lambda: self._evaluated(closure))
        self._gradients_are_there()
        return self.optimizer.step()

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        penalty = self._gradients_are_there()
        if penalty is None or loss is None:
            return loss
        return loss + (penalty.to(loss) if isinstance(loss, Tensor) else penalty.item())

    def _gradients_are_there(self) -> Tensor | None:
        """Begin the task's paths, and add the penalty to the gradients if that is the mode."""
        path = self._current_path()
        if path is not None:
            path.begin()
        return self._add_penalty_grad_() if self.mode == "gradient" else None

    def _add_penalty_grad_(self) -> Tensor:
        (springs,) = self._current_springs()
        constant = self.ewc.constant_penalty
        penalty = springs.add_penalty_grad_(self.ewc.strength, constant)
        self._last_step.penalty = penalty
        return penalty

    def _current_springs(self) -> list[ActiveSprings]:
        """Return the springs, group by group where the learning rate matters.

        They are looked up anew when the groups or the EWC have changed.
        """
        groups = [group["params"] for group in self.param_groups]
        now, compiling = (self.ewc.version, *map(len, groups)), torch.compiler.is_compiling()
        if now == self._built_for and not compiling:
            return self._springs
        together = [[param for params in groups for param in params]]
        chosen = groups if self.mode == "proximal" else together
        springs = [self.ewc.springs_of(params) for params in chosen]
        if not compiling:  # see EWC._active
            self._springs, self._built_for = springs, now
        return springs

    def _current_path(self) -> ActivePath | None:
        """Return what accumulates the path integral, if this EWC measures that."""
        if self.ewc.importance != "si":
            return None
        groups = [group["params"] for group in self.param_groups]
        now = (self.ewc.version, *map(len, groups))
        if now != self._path[0]:
            params = [param for params in groups for param in params]
            self._path = now, self.ewc.path_of(params)
        return self._path[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state with the EWC's under the key ``"ewc"``."""
        return {**self.optimizer.state_dict(), "ewc": self.ewc.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`, or a plain optimizer's; if anything is wrong, nothing is."""
        ewc_state = state_dict.get("ewc")
        if ewc_state is not None:
            self.ewc.check_state_dict(ewc_state)
        inner = {key: value for key, value in state_dict.items() if key != "ewc"}
        self.optimizer.load_state_dict(inner)
        if ewc_state is not None:
            self.ewc.load_state_dict(ewc_state)
