"""Adam and AdamW with the EWC penalty inside."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ewc_fast import functional
from ewc_fast.ewc import EWC
from ewc_fast.optim.fused import Batch, FusedOptimizer


class _AdamStep(FusedOptimizer):
    """The step that Adam and AdamW share."""

    _decoupled = False

    def _begin(self, param: Tensor, group: dict[str, Any]) -> bool:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = self._moment(param)
            state["exp_avg_sq"] = self._moment(param)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = self._moment(param)
        self._begin_master(param)
        return False

    def _step_batch(self, group: dict[str, Any], batch: Batch, plan: functional.Plan) -> Tensor:
        states = [self.state[param] for param in batch.params]
        options = self._options(group, batch)
        if group["amsgrad"]:
            options["max_exp_avg_sqs"] = [state["max_exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        return functional.adam_step_(
            batch.params,
            batch.grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            betas=(float(beta1), float(beta2)),
            eps=group["eps"],
            decoupled_weight_decay=group.get("decoupled_weight_decay", self._decoupled),
            plan=plan,
            **options,
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

    ``last_penalty`` is the penalty before the latest step, a float64 scalar.

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
