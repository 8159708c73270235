r"""Synaptic intelligence: how much of the loss's fall each parameter's way accounts for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast._checks import state_dtype

PATH_FIELDS = ("omega", "start")


@dataclass
class Path:
    """What one parameter has earned on its way since ``start``; both of its shape."""

    omega: Tensor
    start: Tensor

    @classmethod
    def from_here(cls, param: Tensor) -> Path:
        """Return a path that begins where the parameter is."""
        start = param.detach().to(dtype=state_dtype(param.dtype), copy=True)
        return cls(omega=torch.zeros_like(start), start=start)

    def grown(self, param: Tensor) -> Path:
        """Return the path of a parameter that gained rows, which begin where they are."""
        path, rows = Path.from_here(param), self.omega.shape[0]
        path.omega[:rows], path.start[:rows] = self.omega, self.start
        return path


class PathIntegral:
    r"""The paths of a model's parameters through the task that is being learned.

    .. math::
        \omega_i = -\sum_t g_i(t) \, (\theta_i(t+1) - \theta_i(t)), \qquad
        \Omega_i = \frac{\max(\omega_i, 0)}{(\theta_i^{end} - \theta_i^{start})^2 + \xi}

    with g the gradient of the task's own loss, without the penalty (Zenke et al. 2017, equations 3
    to 5). A path begins with a parameter's first step in a task and ends with the consolidation.
    Negative omegas (steps up the loss, by noise) count for 0, task by task.

    References
    ----------
    Zenke et al. 2017, https://arxiv.org/abs/1703.04200.
    """

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}

    def importance(self, params: Mapping[str, Tensor], *, xi: float = 0.1) -> dict[str, Tensor]:
        r"""Return :math:`\Omega` of the paths so far, for all parameters that are not frozen.

        ``xi`` is the damping :math:`\xi > 0`: 0.1 for the paper's permuted MNIST. A parameter that
        never had a gradient is worth 0.
        """
        xi = _checks.non_negative("xi", xi)
        if xi == 0:
            raise ValueError("xi: expected a number > 0, since a parameter may not have moved")
        if not any(name in self.paths for name in params):
            raise ValueError(
                "importance: 'si' is measured while training, and no step was taken since the "
                "last task; train through EWCOptimizer(optimizer, ewc) or an optimizer of "
                "ewc_fast.optim, which accumulate it"
            )
        return {
            name: _importance(self.paths[name], param, xi)
            if name in self.paths
            else torch.zeros_like(param, dtype=state_dtype(param.dtype), requires_grad=False)
            for name, param in params.items()
            if param.requires_grad
        }

    def fit(self, params: Mapping[str, Tensor]) -> None:
        """Grow the paths of parameters that gained rows."""
        for name, path in self.paths.items():
            if name in params and params[name].shape != path.omega.shape:
                self.paths[name] = path.grown(params[name])

    def restart(self) -> None:
        """Begin the next task's paths, each with its parameter's next step."""
        self.paths = {}

    def to(self, device: torch.device | str) -> None:
        """Move what there is to another device."""
        self.paths = {
            name: Path(path.omega.to(device), path.start.to(device))
            for name, path in self.paths.items()
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return ``omega`` and ``start`` by parameter name; they are the live tensors."""
        return {
            field: {name: getattr(path, field) for name, path in self.paths.items()}
            for field in PATH_FIELDS
        }

    def load_state_dict(
        self, state: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]
    ) -> None:
        """Take over a checked :meth:`state_dict` as copies, beside the parameters."""
        loaded = {}
        for name, omega in state["omega"].items():
            path = Path.from_here(params.get(name, omega))
            path.omega.copy_(omega)
            path.start.copy_(state["start"][name])
            loaded[name] = path
        self.paths = loaded


def _importance(path: Path, param: Tensor, xi: float) -> Tensor:
    distance = param.detach().to(path.start.dtype) - path.start
    return path.omega.clamp(min=0).div_(distance.square_().add_(xi))


class ActivePath:
    r"""Accumulates the paths of a fixed set of parameters, step by step.

    :meth:`begin` when the task's gradients are there, :meth:`end` when the parameters have moved;
    in between gradients may be changed (by a penalty, by an optimizer). A closure that is called
    several times a step begins again each time, which ends what came before.

    A float32 parameter's step moves 44 bytes: copies of parameter and gradient (16), the way since
    the copy (12), its product with the gradient added to omega (16): on one CPU thread at a copy's
    speed. Fused into the penalty's pass and one after the step it would be 36. The optimizers of
    :mod:`ewc_fast.optim` add the path in their own pass, for 8.
    Memory is 16 bytes a parameter, 8 of them (the copies) kept only for speed, not in the state.
    """

    def __init__(self, paths: PathIntegral, params: Iterable[tuple[str, Tensor]]) -> None:
        self._paths, self._params = paths, list(params)
        self._names = {param: name for name, param in self._params}
        self._moving: list[tuple[str, Tensor]] = []  # those on their way
        self._places: dict[str, Tensor] = {}  # copies, used again each step
        self._gradients: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Keep parameters and gradients as they are now; without gradient there is no way."""
        self.end()
        moving = [(name, param) for name, param in self._params if param.grad is not None]
        with torch.no_grad():  # not a decorator: compiled code can't call a decorated method
            for name, param in moving:
                self._make_room(name, param)
            if moving:
                gradients = [param.grad for _, param in moving if param.grad is not None]
                torch._foreach_copy_(_of(self._places, moving), [param for _, param in moving])
                torch._foreach_copy_(_of(self._gradients, moving), gradients)
        self._moving = moving

    def end(self) -> None:
        r"""Add :math:`-g \, \delta\theta` since :meth:`begin`; nothing if there was none."""
        if not self._moving:
            return
        back = _of(self._places, self._moving)
        omegas = [self._paths.paths[name].omega for name, _ in self._moving]
        with torch.no_grad():
            torch._foreach_sub_(back, [param for _, param in self._moving])
            torch._foreach_addcmul_(omegas, back, _of(self._gradients, self._moving))
        self._moving = []

    def omega(self, param: Tensor) -> Tensor | None:
        """Return what a step that has the path inside must add to; None if this is not of the set.

        A path that is missing begins where the parameter is.
        """
        name = self._names.get(param)
        return None if name is None else self._begun(name, param).omega

    def _begun(self, name: str, param: Tensor) -> Path:
        if name not in self._paths.paths:
            self._paths.paths[name] = Path.from_here(param)
        return self._paths.paths[name]

    def _make_room(self, name: str, param: Tensor) -> None:
        if param.grad is not None and param.grad.layout != torch.strided:
            _checks.kind(f"gradient of parameter {name!r}", param.grad)  # raises
        path = self._begun(name, param)
        if name not in self._places:
            self._places[name] = torch.empty_like(path.omega)
            self._gradients[name] = torch.empty_like(path.omega)


def _of(tensors: Mapping[str, Tensor], moving: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    return [tensors[name] for name, _ in moving]
