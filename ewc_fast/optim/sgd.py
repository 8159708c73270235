"""SGD with the EWC penalty inside."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ewc_fast import functional
from ewc_fast._prepare import prepare_sgd_step
from ewc_fast._steps import Step
from ewc_fast.ewc import EWC
from ewc_fast.optim.fused import Batch, FusedOptimizer


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""torch.optim.SGD with the EWC penalty inside: one pass over memory for all of a step.

    A drop-in: the same arguments, defaults and state; checkpoints load both ways. ``ewc``,
    ``mode``, ``master_weights`` and ``stochastic_rounding``, and the errors, are those of
    :class:`~ewc_fast.optim.Adam`. With ``mode="gradient"`` plain SGD diverges once
    :math:`\eta \lambda \max F > 2`; ``mode="proximal"`` is stable for every strength. Sparse
    gradients, which torch.optim.SGD takes, are refused.

    References
    ----------
    Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114; momentum as in Sutskever et
    al. 2013, http://proceedings.mlr.press/v28/sutskever13.pdf.

    Examples
    --------
    >>> from ewc_fast import EWC
    >>> model = torch.nn.Linear(4, 3)
    >>> ewc = EWC(model, ewc_lambda=400.0)
    >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, ewc=ewc)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        ewc: EWC | None = None,
        mode: Literal["gradient", "proximal"] = "gradient",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        **torch_options: Any,
    ) -> None:
        self._configure(ewc, mode, master_weights, stochastic_rounding)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **torch_options)
        self._take_up(ewc)

    def _missing_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        missing, state = self._missing_master(param), self.state.get(param, {})
        if group["momentum"] != 0 and state.get("momentum_buffer") is None:
            missing["momentum_buffer"] = self._moment(param)
        return missing

    def _begins_with_zeros(self, group: dict[str, Any]) -> bool:
        return not group["dampening"]  # of which the first gradient is spared

    def _prepare(self, group: dict[str, Any], batch: Batch, plan: functional.Plan | None) -> Step:
        lists = self._lists(batch)
        if group["momentum"]:
            lists["momentum_buffers"] = self._states(batch, "momentum_buffer")
        return prepare_sgd_step(
            lists,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first=batch.begins,
            plan=plan,
            **self._options(group, batch),
        )
