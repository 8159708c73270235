r"""The specification of the optimizers' fused steps, in plain PyTorch.

All lists run in parallel: entry ``i`` of each belongs to parameter ``i``. Arithmetic is in float32
(float64 for float64 parameters), each result rounded once to the dtype it is kept in. Operations
stand in the order of PyTorch's own optimizers on one tensor after another (``foreach=False``); the
compiled steps give the same bits (float64: but for PyTorch's square root). With :math:`\theta` from
``master`` where there is one:

==============  ====================================================================
gradient        :math:`g = \pm g`, minus to maximize
springs         :math:`g \mathrel{+}= \lambda F (\theta - a)` (``proximal=False``)
weight decay    :math:`g \mathrel{+}= w \theta`, or decoupled:
                :math:`\theta \leftarrow (1 - \eta w) \theta`
Adam            :math:`m' = m + (1 - \beta_1)(g - m)`, :math:`v' = \beta_2 v + (1 - \beta_2) g^2`,
                :math:`\theta \leftarrow \theta - \frac{\eta}{1 - \beta_1^t} m' /
                (\sqrt{v'} / \sqrt{1 - \beta_2^t} + \epsilon)`
SGD             :math:`b' = \mu b + (1 - d) g`, :math:`\theta \leftarrow \theta - \eta b'`
springs         :math:`\theta \leftarrow (\theta + \eta\lambda F a) / (1 + \eta\lambda F)`
                (``proximal=True``)
path            :math:`\omega \mathrel{+}= g (\theta - \theta')`, g as it was given, and
                :math:`\theta, \theta'` the parameter as it is kept, before and after
==============  ====================================================================

Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter 2019 (decoupled weight
decay), https://arxiv.org/abs/1711.05101; Reddi et al. 2018 (amsgrad),
https://arxiv.org/abs/1904.09237; Sutskever et al. 2013 (Nesterov's momentum); Zenke et al. 2017
(the path integral), https://arxiv.org/abs/1703.04200.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ewc_fast import reference
from ewc_fast.reference import Tensors


class AdamOptions(NamedTuple):
    """What a step of Adam is told, besides tensors."""

    lr: float
    weight_decay: float
    ewc_lambda: float
    maximize: bool
    proximal: bool
    rounding_seed: int | None  # bfloat16 parameters are rounded by chance where there is one
    beta1: float
    beta2: float
    eps: float
    decoupled: bool  # weight decay as in AdamW


class SgdOptions(NamedTuple):
    """What a step of SGD is told, besides tensors."""

    lr: float
    weight_decay: float
    ewc_lambda: float
    maximize: bool
    proximal: bool
    rounding_seed: int | None
    momentum: float
    dampening: float
    nesterov: bool
    first: bool  # the momentum buffers hold nothing yet: they begin as the gradient, undamped


@torch.no_grad()
def adam_step_(
    options: AdamOptions,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    max_exp_avg_sqs: Tensors | None = None,
    fisher: Tensors | None = None,
    anchor: Tensors | None = None,
    master: Tensors | None = None,
    path: Tensors | None = None,
    ordinals: Sequence[int] | None = None,
) -> Tensor:
    """Take a step of Adam; return the springs' penalty before it, a float64 scalar."""
    springs = _Springs(fisher, anchor, options)
    for i in range(len(params)):
        steps[i] += 1
        t = steps[i].item()
        theta, before = _read(params, master, i), _kept(params[i]).clone()
        grad = springs.pulled(i, _signed(grads[i], theta, options), theta)
        if options.decoupled:
            kept = theta * (1 - options.lr * options.weight_decay)
        else:
            kept, grad = theta, _decayed(grad, theta, options)
        first = exp_avgs[i].to(theta.dtype)
        first = _moved_towards(1 - options.beta1, first, grad)
        second = exp_avg_sqs[i].to(theta.dtype) * options.beta2
        second = second + (1 - options.beta2) * grad * grad
        used = second
        if max_exp_avg_sqs is not None:
            used = torch.maximum(max_exp_avg_sqs[i].to(theta.dtype), second)
            max_exp_avg_sqs[i].copy_(used)
        root = _square_root(used) / (1 - options.beta2**t) ** 0.5 + options.eps
        moved = kept - options.lr / (1 - options.beta1**t) * first / root
        exp_avgs[i].copy_(first)
        exp_avg_sqs[i].copy_(second)
        _write(params, master, i, springs.settled(i, moved), options, ordinals)
        if path is not None:
            path[i].add_(grads[i].to(before.dtype) * (before - _kept(params[i])))
    return springs.value()


@torch.no_grad()
def sgd_step_(
    options: SgdOptions,
    params: Tensors,
    grads: Tensors,
    *,
    momentum_buffers: Tensors | None = None,
    fisher: Tensors | None = None,
    anchor: Tensors | None = None,
    master: Tensors | None = None,
    path: Tensors | None = None,
    ordinals: Sequence[int] | None = None,
) -> Tensor:
    """Take a step of SGD; return the springs' penalty before it, a float64 scalar."""
    springs = _Springs(fisher, anchor, options)
    for i in range(len(params)):
        theta, before = _read(params, master, i), _kept(params[i]).clone()
        grad = springs.pulled(i, _signed(grads[i], theta, options), theta)
        grad = direction = _decayed(grad, theta, options)
        if momentum_buffers is not None:
            buffer = momentum_buffers[i].to(theta.dtype) * options.momentum
            buffer = grad if options.first else buffer + (1 - options.dampening) * grad
            direction = grad + options.momentum * buffer if options.nesterov else buffer
            momentum_buffers[i].copy_(buffer)
        moved = theta - options.lr * direction
        _write(params, master, i, springs.settled(i, moved), options, ordinals)
        if path is not None:
            path[i].add_(grads[i].to(before.dtype) * (before - _kept(params[i])))
    return springs.value()


class _Springs:
    """The springs of one call, in the gradient or after the update; without any, nothing."""

    def __init__(
        self,
        fisher: Tensors | None,
        anchor: Tensors | None,
        options: AdamOptions | SgdOptions,
    ) -> None:
        self._fisher, self._anchor, self._options = fisher, anchor, options
        self._terms: list[Tensor] = []

    def pulled(self, i: int, grad: Tensor, theta: Tensor) -> Tensor:
        """Return the gradient with the spring's pull in it; add to the penalty's value."""
        if self._fisher is None or self._anchor is None:
            return grad
        spring = [theta], [self._fisher[i]], [self._anchor[i]]
        strength = self._options.ewc_lambda
        self._terms.append(reference.penalty(*spring, ewc_lambda=strength))
        if self._options.proximal:
            return grad
        return grad + reference.penalty_grad(*spring, ewc_lambda=strength)[0]

    def settled(self, i: int, theta: Tensor) -> Tensor:
        """Return the parameter after the proximal step."""
        if self._fisher is None or self._anchor is None or not self._options.proximal:
            return theta
        reference.proximal_step_(
            [theta],
            [self._fisher[i]],
            [self._anchor[i]],
            ewc_lambda=self._options.ewc_lambda,
            lr=self._options.lr,
        )
        return theta

    def value(self) -> Tensor:
        """Return the penalty before the step."""
        return reference.add_scalars(self._terms)


def _read(params: Tensors, master: Tensors | None, i: int) -> Tensor:
    """Return the parameter in the dtype that is computed in."""
    if master is not None:
        return master[i].clone()
    return _kept(params[i])


def _kept(param: Tensor) -> Tensor:
    return param.to(torch.float64 if param.dtype == torch.float64 else torch.float32)


def _signed(grad: Tensor, theta: Tensor, options: AdamOptions | SgdOptions) -> Tensor:
    return -grad.to(theta.dtype) if options.maximize else grad.to(theta.dtype)


def _decayed(grad: Tensor, theta: Tensor, options: AdamOptions | SgdOptions) -> Tensor:
    return grad + options.weight_decay * theta if options.weight_decay else grad


def _square_root(values: Tensor) -> Tensor:
    """Return the square root, rounded right: PyTorch's may be one off in the last place."""
    return values.double().sqrt().to(values.dtype)


def _moved_towards(share: float, origin: Tensor, goal: Tensor) -> Tensor:
    """Return what ``torch.lerp`` does, without the one rounding less that it has in places."""
    share = torch.tensor(share, dtype=origin.dtype).item()
    if share < 0.5:
        return origin + share * (goal - origin)
    return goal - (goal - origin) * (torch.tensor(1.0, dtype=origin.dtype) - share).item()


def _write(
    params: Tensors,
    master: Tensors | None,
    i: int,
    theta: Tensor,
    options: AdamOptions | SgdOptions,
    ordinals: Sequence[int] | None,
) -> None:
    if master is not None:
        master[i].copy_(theta)
    if options.rounding_seed is not None and params[i].dtype == torch.bfloat16:
        ordinal = i if ordinals is None else ordinals[i]
        reference.write_stochastically(params[i], theta, options.rounding_seed, ordinal)
    else:
        params[i].copy_(theta)
