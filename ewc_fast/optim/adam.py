"""Adam and AdamW with the EWC penalty inside."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ewc_fast import functional
from ewc_fast._prepare import prepare_adam_step
from ewc_fast._steps import Step
from ewc_fast.ewc import EWC
from ewc_fast.optim.fused import Batch, FusedOptimizer


class _AdamStep(FusedOptimizer):
    """The step that Adam and AdamW share."""

    _decoupled = False

    def _missing_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        missing, state = self._missing_master(param), self.state.get(param, ())
        if "step" not in state:
            missing["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            missing["exp_avg"] = self._moment(param)
            missing["exp_avg_sq"] = self._moment(param)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            missing["max_exp_avg_sq"] = self._moment(param)
        return missing

    def _prepare(self, group: dict[str, Any], batch: Batch, plan: functional.Plan | None) -> Step:
        lists = {
            **self._lists(batch),
            "exp_avgs": self._states(batch, "exp_avg"),
            "exp_avg_sqs": self._states(batch, "exp_avg_sq"),
            "steps": self._states(batch, "step"),
        }
        if group["amsgrad"]:
            lists["max_exp_avg_sqs"] = self._states(batch, "max_exp_avg_sq")
        beta1, beta2 = group["betas"]
        return prepare_adam_step(
            lists,
            betas=(float(beta1), float(beta2)),
            eps=group["eps"],
            decoupled_weight_decay=group.get("decoupled_weight_decay", self._decoupled),
            plan=plan,
            **self._options(group, batch),
        )


class Adam(_AdamStep, torch.optim.Adam):
    r"""torch.optim.Adam with the EWC penalty inside: one pass over memory for all of a step.

    A drop-in: the same arguments, defaults and state; checkpoints load both ways. Without ``ewc``,
    and before its first consolidation, the update is PyTorch's, to rounding.

    ``mode="gradient"`` (default)
        :math:`g \mathrel{+}= \lambda F (\theta - a)` before anything else of the step: the paper's
        form. The penalty goes through the moments, which divide its strength out again where it
        is much larger than the task's gradient.
    ``mode="proximal"``
        :math:`\theta \leftarrow (\theta + \eta\lambda F a) / (1 + \eta\lambda F)` after the update,
        with the group's learning rate :math:`\eta`, apart from the moments as decoupled weight
        decay is: exact and stable for every strength.

    Clipping and ``GradScaler`` see the task's gradient alone, as with
    :class:`~ewc_fast.EWCOptimizer`; ``.grad`` stays the task's. ``maximize`` turns the task's
    gradient around, never the penalty's. A trainable parameter without a gradient still feels its
    spring (with ``mode="gradient"`` it gets a gradient of zeros, and takes a whole step); a frozen
    one doesn't, and without a spring it is skipped, as in PyTorch.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As for torch.optim.Adam; a tensor ``lr`` is read at each step.
    foreach, fused, capturable
        Accepted and kept in the groups, for code that passes them; the step is always fused.
    differentiable
        Refused unless False.
    ewc
        The state, or None. Several optimizers may share it, each applies it to its own parameters.
        Its ``storage`` is ``"float32"`` or ``"bfloat16"``; :class:`~ewc_fast.EWCOptimizer` takes
        any.
    mode
        ``"gradient"`` or ``"proximal"``.
    master_weights
        Keep float32 copies of 16-bit parameters (state ``"master"``), and step these: small updates
        are not lost. The copies are taken at the first step; later changes to the parameters by
        others are overwritten.
    stochastic_rounding
        Round bfloat16 parameters up or down by chance, right on average, instead of keeping copies.
        Draws a seed from PyTorch's default CPU generator for each step.

    With either of the last two the moments of 16-bit parameters are float32: in bfloat16 a second
    moment could not shrink, as 0.999 of it rounds back to itself.

    With ``EWC(importance="si")`` each step also adds to the path integral, in the same pass: the
    gradient as it is when ``step()`` begins times the way that the parameters then go, as with
    :class:`~ewc_fast.EWCOptimizer`. The way is that of the parameters themselves, rounded as they
    are kept, not of their float32 copies.

    ``last_penalty`` is the penalty before the latest step, a float64 scalar.

    ``torch.compile(fullgraph=True)`` takes a step in one graph, with the backward pass where
    PyTorch traces that. New values of lambda, and of a learning rate that is a tensor, recompile
    nothing; a number as learning rate belongs to the graph. Schedulers of PyTorch put a function
    around the optimizer's ``step`` which no graph can hold: compile what calls
    ``step = optimizer.step`` as it was before they were made. Wrong options and gradients raise
    before any group has begun its step; in a graph, numbers in tensors are checked when their group
    takes its.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As torch.optim.Adam does; for an ``ewc`` that tracks none of the parameters, an unknown
        mode, ``differentiable``, both of the last two options, sparse gradients, and parameters
        that are not floating.

    References
    ----------
    Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; Kirkpatrick et al. 2017,
    https://doi.org/10.1073/pnas.1611835114.

    Examples
    --------
    >>> from ewc_fast import EWC
    >>> model = torch.nn.Linear(4, 3)
    >>> ewc = EWC(model, ewc_lambda=400.0)
    >>> optimizer = Adam(model.parameters(), lr=1e-3, ewc=ewc)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        ewc: EWC | None = None,
        mode: Literal["gradient", "proximal"] = "gradient",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        **torch_options: Any,
    ) -> None:
        self._configure(ewc, mode, master_weights, stochastic_rounding)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **torch_options)
        self._take_up(ewc)


class AdamW(_AdamStep, torch.optim.AdamW):
    r"""torch.optim.AdamW with the EWC penalty inside: one pass over memory for all of a step.

    :class:`Adam` with decoupled weight decay (Loshchilov & Hutter 2019,
    https://arxiv.org/abs/1711.05101), 0.01 by default: parameters, errors and the penalty are as
    there. The penalty is that of the parameters before weight decay.

    Examples
    --------
    >>> from ewc_fast import EWC
    >>> model = torch.nn.Linear(4, 3)
    >>> ewc = EWC(model, ewc_lambda=400.0)
    >>> optimizer = AdamW(model.parameters(), lr=1e-3, ewc=ewc, mode="proximal")
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        ewc: EWC | None = None,
        mode: Literal["gradient", "proximal"] = "gradient",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        **torch_options: Any,
    ) -> None:
        self._configure(ewc, mode, master_weights, stochastic_rounding)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **torch_options)
        self._take_up(ewc)
