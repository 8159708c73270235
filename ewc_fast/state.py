"""What an EWC holds: springs by name, settings, where the parameters are now; moved and saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ewc_fast import _checks, persistence
from ewc_fast._dispatch import Impl
from ewc_fast._encoded import active_springs
from ewc_fast._springs import ActiveSprings, Spring
from ewc_fast.formats import Storage, StorageName
from ewc_fast.importance import ActivePath, PathIntegral
from ewc_fast.strength import Strength

FORMAT = 2  # of states with a Fisher in 8 bits; all others are of format 1

Self = TypeVar("Self", bound="EWCState")


class EWCState(Strength):
    """The state of :class:`~ewc_fast.EWC`, which measures and applies it."""

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        *,
        ewc_lambda: float,
        gamma: float = 1.0,
        anchor: Literal["merged", "latest"] = "merged",
        importance: Literal["fisher", "mas", "si", "l2"] = "fisher",
        impl: Impl = "auto",
        storage: StorageName = "float32",
    ) -> None:
        _checks.one_of("anchor", anchor, ("merged", "latest"))
        _checks.one_of("importance", importance, _checks.IMPORTANCES)
        _checks.impl(impl)
        self.ewc_lambda = ewc_lambda
        self.gamma = gamma
        self._rule = anchor
        self._importance = importance
        self._paths = PathIntegral() if importance == "si" else None
        self._impl = impl
        self._storage = Storage.named(storage)
        self._model = model if isinstance(model, nn.Module) else None
        self._springs: dict[str, Spring] = {}
        self._constant = 0.0
        self._tasks = 0
        self._version = 0
        self._cached: ActiveSprings | None = None
        self.track(model)

    # What can be read and set

    @property
    def gamma(self) -> float:
        """Decay of the old Fisher information at the next consolidation."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = _checks.gamma(value)

    @property
    def fisher(self) -> dict[str, Tensor]:
        """Accumulated Fisher diagonal by parameter name; empty before the first task.

        As views; decoded copies where it is kept in 8 bits.
        """
        return {name: spring.fisher_values().detach() for name, spring in self._springs.items()}

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Anchor by parameter name, as views; empty before the first task."""
        return {name: spring.anchor.detach() for name, spring in self._springs.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The tracked parameters by name."""
        return dict(self._params)

    @property
    def importance(self) -> str:
        """What is measured of a task: ``"fisher"``, ``"mas"``, ``"si"`` or ``"l2"``."""
        return self._importance

    @property
    def tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._tasks

    @property
    def storage(self) -> str:
        """How the state is kept."""
        return self._storage.name

    @property
    def bytes_per_parameter(self) -> float:
        """Memory of the state for each value of the tracked parameters; 0 before the first task."""
        tensors = [t for spring in self._springs.values() for t in spring.tensors()]
        values = sum(spring.anchor.numel() for spring in self._springs.values())
        return sum(t.numel() * t.element_size() for t in tensors) / max(values, 1)

    def __repr__(self) -> str:
        values = sum(param.numel() for param in self._params.values())
        importance = "" if self.importance == "fisher" else f", importance={self.importance!r}"
        storage = "" if self.storage == "float32" else f", storage={self.storage!r}"
        return (
            f"EWC(parameters={len(self._params)} ({values:,} values), tasks={self._tasks}, "
            f"ewc_lambda={self.ewc_lambda:g}, gamma={self.gamma:g}, anchor={self._rule!r}"
            f"{importance}{storage})"
        )

    # For optimizers

    def springs_of(self, params: Iterable[Tensor]) -> ActiveSprings:
        """Return the springs of those among ``params`` that are tracked (for optimizers)."""
        wanted = {id(param) for param in params}
        names = [n for n, p in self._params.items() if id(p) in wanted and n in self._springs]
        return active_springs(
            [self._params[n] for n in names],
            [self._springs[n] for n in names],
            self._impl,
            on_cpu=self._storage.on_cpu,
        )

    def path_of(self, params: Iterable[Tensor]) -> ActivePath | None:
        """Return what accumulates the tracked ones' paths (for optimizers); ``None`` but for SI."""
        if self._paths is None:
            return None
        wanted = {id(param) for param in params}
        tracked = [(name, p) for name, p in self._params.items() if id(p) in wanted]
        return ActivePath(self._paths, tracked)

    @property
    def constant_penalty(self) -> float | Tensor:
        r"""The part of the penalty that no parameter moves, :math:`\lambda R`."""
        return self.strength * self._constant

    @property
    def version(self) -> int:
        """Changes whenever springs obtained by :meth:`springs_of` become out of date."""
        return self._version

    # The parameters as they are now

    def track(self, model: nn.Module | Iterable[tuple[str, nn.Parameter]] | None = None) -> None:
        """Take up the parameters as they are now; needed after a layer was added or replaced.

        :meth:`consolidate` and :class:`~ewc_fast.EWCOptimizer` do this by themselves. New
        parameters start with F = 0, and so do rows added to dimension 0 of a parameter. What is
        known of parameters that are no longer there is kept, and used again if they return.

        Raises
        ------
        ValueError
            If a parameter's shape changed in any other way.
        """
        params = self._tracked(self._model if model is None else model)
        self._springs = self._fitting(params)
        if self._paths is not None:
            self._paths.fit(params)
        self._use(params)

    def _tracked(
        self, model: nn.Module | Iterable[tuple[str, nn.Parameter]] | None
    ) -> dict[str, nn.Parameter]:
        if model is None:
            return self._params
        pairs = model.named_parameters() if isinstance(model, nn.Module) else model
        return _checks.named_parameters(pairs)

    def _fitting(self, params: Mapping[str, Tensor]) -> dict[str, Spring]:
        """Return the springs, grown where parameters gained rows."""
        fitting = dict(self._springs)
        for name, spring in self._springs.items():
            param = params.get(name)
            if param is None or param.shape == spring.fisher.shape:
                continue
            _checks.grown_shape(name, tuple(spring.fisher.shape), tuple(param.shape))
            fitting[name] = spring.grown(param, self._storage)
        return fitting

    def _use(self, params: dict[str, nn.Parameter]) -> None:
        self._params = params
        precise = any(param.dtype == torch.float64 for param in params.values())
        self._value_dtype = torch.float64 if precise else torch.float32
        self._cached = None
        self._version += 1

    # Moving, saving, copying

    def to(self: Self, device: torch.device | str) -> Self:
        """Move Fisher and anchor to the device that the parameters were moved to.

        State that is kept on the CPU stays there.
        """
        if not self._storage.on_cpu:
            self._springs = {name: spring.to(device) for name, spring in self._springs.items()}
        if self._paths is not None:
            self._paths.to(device)
        self._use(self._params)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart, as tensors and plain values.

        Like a module's, it refers to the live tensors: copy it to keep it. It can be saved by
        ``torch.save`` and read with ``weights_only=True``. A Fisher in 8 bits is there as it is
        kept, by codes (``"fisher"``) and ``"scales"``; see :mod:`ewc_fast.formats`.
        """
        springs = self._springs.items()
        scales = {name: s.scales for name, s in springs if s.scales is not None}
        return {
            "format": FORMAT if scales else 1,
            "storage": self.storage,
            "scales": scales,
            "ewc_lambda": self.ewc_lambda,
            "gamma": self.gamma,
            "rule": self._rule,
            "importance": self._importance,
            "constant": self._constant,
            "tasks": self._tasks,
            **{
                field: {name: getattr(s, field).detach() for name, s in springs}
                for field in _checks.STATE_FIELDS
            },
            **({} if self._paths is None else self._paths.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Take over a :meth:`state_dict`, values and settings; training resumes bit for bit.

        Values are converted to this object's ``storage``, as a module's are to its dtype and
        device: rounded to nearest where they came from another.

        Raises
        ------
        ValueError
            For a state that is truncated, of a newer format, of another importance, or of another
            model (a name or shape that this one lacks; with ``strict=False`` unknown names are
            kept for later). The object is then as before.
        """
        self.check_state_dict(state, strict)
        springs = {}
        for name in state["fisher"]:
            saved = Spring(*(state[field][name] for field in _checks.STATE_FIELDS))
            saved.scales = state.get("scales", {}).get(name)
            param = self._params.get(name, saved.anchor)
            springs[name] = Spring.slack(param, self._storage)
            springs[name].copy_(saved)
        self.ewc_lambda, self.gamma = state["ewc_lambda"], state["gamma"]
        self._rule = state["rule"]
        self._constant, self._tasks = float(state["constant"]), int(state["tasks"])
        self._springs = springs
        if self._paths is not None:
            self._paths.load_state_dict(state, self._params)
        self._use(self._params)

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Raise what :meth:`load_state_dict` would raise, and change nothing."""
        _checks.ewc_state(state, self._params, strict=strict, newest=FORMAT)
        _checks.state_importance(state, self._importance, self._params, strict=strict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all: :mod:`ewc_fast.persistence`.

        :meth:`load` makes an EWC of it. The file says what it is to whoever opens it.
        """
        persistence.write(self.state_dict(), path)

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike[str],
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    ) -> Self:
        """Return the EWC that :meth:`save` wrote, with its settings and storage, for ``model``.

        For other settings make an EWC with them, and let it ``load_state_dict`` this one's.

        Raises
        ------
        ValueError
            For a file that is truncated, altered, no EWC's, of a newer version of ewc_fast, or of
            another model.
        ImportError
            Without the package safetensors.
        """
        state = persistence.read(path)
        importance = state.get("importance", "fisher")
        ewc = cls(model, ewc_lambda=1.0, importance=importance, storage=state["storage"])
        ewc.load_state_dict(state)
        return ewc

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}
