"""The optimizers' steps with the springs inside: gradient, moments and update in one pass.

Part of :mod:`ewc_fast.functional`, whose words on lists, dtypes, errors, ``impl`` and ``plan`` hold
here too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ewc_fast._dispatch import Impl
from ewc_fast._plan import Plan
from ewc_fast._prepare import Mode, prepare_adam_step, prepare_sgd_step

Tensors = Tensor | Iterable[Tensor]


def adam_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    max_exp_avg_sqs: Tensors | None = None,
    fisher: Tensors | None = None,
    anchor: Tensors | None = None,
    ewc_lambda: float | Tensor = 0.0,
    mode: Mode = "gradient",
    master: Tensors | None = None,
    path: Tensors | None = None,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Tensor:
    r"""Take a step of Adam under the springs, in one pass over memory.

    .. math::
        g &\leftarrow g + \lambda F (\theta - a) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with ``mode="gradient"``; with ``"proximal"`` the springs leave the gradient alone and
    :math:`\theta \leftarrow (\theta + \eta\lambda F a) / (1 + \eta\lambda F)` follows. Without
    ``fisher`` and ``anchor`` it is a plain step. ``maximize`` turns the task's gradient around,
    never the springs'. Returns the penalty
    :math:`\frac\lambda2 \sum_i F_i (\theta_i - a_i)^2` before the step, a float64 scalar.

    ``steps`` counts the steps taken, a float32 scalar for each parameter, and is increased first.
    ``exp_avgs``, ``exp_avg_sqs`` and ``max_exp_avg_sqs`` (given: amsgrad) have the parameters'
    dtype, or are float32 beside 16-bit parameters. ``master`` holds float32 copies of 16-bit
    parameters: the step is taken there, and ``params`` become what it rounds to. Instead, bfloat16
    parameters may be rounded up or down by chance, right on average, from ``rounding_seed``.

    ``path``, float32 (float64 beside float64), becomes :math:`\omega + g (\theta - \theta')`: the
    path integral of synaptic intelligence (Zenke et al. 2017, https://arxiv.org/abs/1703.04200),
    with ``grads`` as they were given, whatever springs, decay and ``maximize`` made of them, and
    :math:`\theta, \theta'` the values of ``params`` before and after, rounded as they are kept.

    ``lr`` may be a scalar on the GPU, which is read there when the step runs: it and ``steps`` are
    all that changes from step to step, so that a CUDA graph of the step follows a schedule.

    Float32 parameters: 36 bytes of memory traffic each, beside 28 for a plain step and 48 for a
    plain step after :func:`~ewc_fast.functional.add_penalty_grad_`; 8 more with a path.

    Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; ``decoupled_weight_decay``: Loshchilov &
    Hutter 2019, https://arxiv.org/abs/1711.05101.

    >>> import torch
    >>> theta, m, v = torch.tensor([1.0, 1.0]), torch.zeros(2), torch.zeros(2)
    >>> value = adam_step_(
    ...     theta, torch.zeros(2), m, v, torch.tensor(0.0), lr=0.5,
    ...     fisher=torch.tensor([0.0, 2.0]), anchor=torch.zeros(2), ewc_lambda=3.0,
    ... )
    >>> value.item(), theta.tolist()
    (3.0, [1.0, 0.5])
    """
    lists = {
        "params": params,
        "grads": grads,
        "fisher": fisher,
        "anchor": anchor,
        "master": master,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "path": path,
        "steps": steps,
    }
    step = prepare_adam_step(
        lists,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        ewc_lambda=ewc_lambda,
        mode=mode,
        rounding_seed=rounding_seed,
        impl=impl,
        plan=plan,
    )
    return step()


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    maximize: bool = False,
    fisher: Tensors | None = None,
    anchor: Tensors | None = None,
    ewc_lambda: float | Tensor = 0.0,
    mode: Mode = "gradient",
    master: Tensors | None = None,
    path: Tensors | None = None,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Tensor:
    r"""Take a step of SGD under the springs, in one pass over memory.

    .. math::
        g \leftarrow g + \lambda F (\theta - a), \qquad
        b \leftarrow \mu b + (1 - d) g, \qquad
        \theta \leftarrow \theta - \eta b

    with momentum :math:`\mu` and dampening :math:`d`, where ``momentum_buffers`` are given; they
    begin as the gradient at the ``first`` step. All else is as in :func:`adam_step_`. Float32
    parameters: 28 bytes of memory traffic each with momentum, 20 without.

    >>> import torch
    >>> theta = torch.tensor([1.0, 1.0])
    >>> value = sgd_step_(
    ...     theta, torch.ones(2), lr=0.5,
    ...     fisher=torch.tensor([0.0, 1.0]), anchor=torch.zeros(2), ewc_lambda=1.0,
    ... )
    >>> value.item(), theta.tolist()
    (0.5, [0.5, 0.0])
    """
    lists = {
        "params": params,
        "grads": grads,
        "fisher": fisher,
        "anchor": anchor,
        "master": master,
        "momentum_buffers": momentum_buffers,
        "path": path,
    }
    step = prepare_sgd_step(
        lists,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        first=first,
        maximize=maximize,
        ewc_lambda=ewc_lambda,
        mode=mode,
        rounding_seed=rounding_seed,
        impl=impl,
        plan=plan,
    )
    return step()
