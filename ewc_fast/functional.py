r"""The stateless operations: validate, choose an implementation, call it. All but one in place.

Every operation takes lists of tensors that run in parallel (entry ``i`` of each belongs to
parameter ``i``), or single tensors, a flat buffer say. Shapes are the parameters'. Parameters and
gradients are float32, bfloat16, float16 or float64; ``fisher`` and ``anchor`` are float32, or
float64 beside float64 parameters. Arithmetic is in the state's dtype, sums and merges in float64.
Sums repeat bit for bit for any number of threads. Nothing is written before all operands have
been checked.

Beside parameters other than float64 a ``fisher`` may be bfloat16, by itself or with others of
float32, for 2 bytes less to keep and to read for each parameter. (``anchor`` and ``new_fisher`` may
not: bfloat16 puts an anchor 2^-8 of its size off, often further than the parameter is from it.)
What writes such a Fisher rounds each entry up or down by chance, right on average, so that many
small addends are not lost in a large sum, as they would be by rounding to nearest. One write is
less than 2^-7 off, relative. Addends far below that make a sum's relative standard deviation
2^-3.5 at most, however many they are: accumulate in float32, and merge into bfloat16 once a task.

The chance depends on ``seed``, on a tensor's place in the list and on an element's place in memory:
implementations and numbers of threads agree. ``seed=None`` draws one from PyTorch's default CPU
generator, but only if a Fisher written is bfloat16: ``torch.manual_seed`` makes runs repeat. A
compiled graph draws anew each time it runs; a CUDA graph repeats the seed it was captured with.

``impl`` chooses the implementation as :mod:`ewc_fast._dispatch` tabulates: ``"auto"``, ``"cpu"``,
``"cuda"``, ``"triton"`` or ``"reference"``. A :class:`Plan` given to every call of a loop keeps
validation and addresses between calls. The operations work inside
``torch.compile(fullgraph=True)``; a strength or learning rate that changes between calls of the
graph should be a scalar tensor on the CPU, whose value no graph depends on. (Elsewhere a tensor is
read like a number.)

Errors, with the argument and index, what was expected and what came:
``TypeError`` for objects that are no dense floating tensors or have the wrong dtype;
``ValueError`` for wrong lengths, shapes, devices, numbers out of range, an unknown ``impl``, or a
written tensor that shares memory with another operand; ``RuntimeError`` for a backend asked for
by name that can't run.

Reference: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 114
(2017), https://doi.org/10.1073/pnas.1611835114, equation 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ewc_fast import _checks, _engine
from ewc_fast._checks import as_list
from ewc_fast._dispatch import Impl
from ewc_fast._ops import EagerPenalty
from ewc_fast._plan import Plan
from ewc_fast.products import accumulate_squared_convolution_, accumulate_squared_product_
from ewc_fast.steps import adam_step_, sgd_step_

__all__ = [
    "Plan",
    "accumulate_square_",
    "accumulate_squared_convolution_",
    "accumulate_squared_product_",
    "adam_step_",
    "add_penalty_grad_",
    "merge_",
    "merge_online_",
    "penalty",
    "proximal_step_",
    "sgd_step_",
]

Tensors = Tensor | Iterable[Tensor]


def penalty(
    params: Tensors,
    fisher: Tensors,
    anchor: Tensors,
    *,
    ewc_lambda: float | Tensor,
) -> Tensor:
    r"""Return :math:`\frac\lambda2 \sum_i F_i (\theta_i - a_i)^2`, differentiable in ``params``.

    A float64 scalar on the first parameter's device. The backward pass forms
    :math:`\lambda F (\theta - a)` in one pass; it can be differentiated again.

    >>> import torch
    >>> theta = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> value = penalty(theta, torch.tensor([2.0, 1.0]), torch.zeros(2), ewc_lambda=10.0)
    >>> value.item(), torch.autograd.grad(value, theta)[0].tolist()
    (55.0, [20.0, 30.0])
    """
    lists = as_list("params", params), as_list("fisher", fisher), as_list("anchor", anchor)
    if torch.compiler.is_compiling():
        strength = _checks.in_graph("ewc_lambda", ewc_lambda)
        value: Tensor = torch.ops.ewc_fast.penalty(*lists, strength)
    else:
        number = _checks.non_negative("ewc_lambda", ewc_lambda)
        value = EagerPenalty.apply(*lists[1:], number, *lists[0])
    return value


def add_penalty_grad_(
    grads: Tensors,
    params: Tensors,
    fisher: Tensors,
    anchor: Tensors,
    *,
    ewc_lambda: float | Tensor,
    constant: float | Tensor = 0.0,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> Tensor:
    r"""Add :math:`\lambda F (\theta - a)` to ``grads``; return the penalty from the same read.

    The value is :math:`\frac\lambda2 \sum_i F_i (\theta_i - a_i)^2` plus ``constant`` (what
    :func:`merge_` left of the penalties before), a float64 scalar on the first parameter's device.
    20 bytes of memory traffic for each float32 parameter.

    >>> import torch
    >>> grad, theta = torch.zeros(2), torch.tensor([1.0, 3.0])
    >>> value = add_penalty_grad_(
    ...     grad, theta, torch.tensor([2.0, 1.0]), torch.zeros(2), ewc_lambda=10.0
    ... )
    >>> value.item(), grad.tolist()
    (55.0, [20.0, 30.0])
    """
    lists = (
        as_list("grads", grads),
        as_list("params", params),
        as_list("fisher", fisher),
        as_list("anchor", anchor),
    )
    if torch.compiler.is_compiling():
        strength = _checks.in_graph("ewc_lambda", ewc_lambda)
        with torch.no_grad():
            value: Tensor = torch.ops.ewc_fast.add_penalty_grad_(*lists, strength)
            return value + constant
    ewc_lambda = _checks.non_negative("ewc_lambda", ewc_lambda)
    return _engine.add_penalty_grad_(*lists, ewc_lambda, constant, impl=impl, plan=plan)


def accumulate_square_(
    fisher: Tensors,
    grads: Tensors,
    *,
    weight: float = 1.0,
    seed: int | None = None,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> None:
    r"""Add ``weight`` times squared gradients: :math:`F \mathrel{+}= w\,g^2`.

    An entry of ``grads`` may be a chunk of per-sample gradients of shape ``(samples, *shape)``;
    then :math:`F \mathrel{+}= w \sum_n g_n^2`, without a temporary. ``seed``: see above.

    >>> import torch
    >>> fisher = torch.zeros(2)
    >>> accumulate_square_(fisher, torch.tensor([[1.0, 2.0], [3.0, 0.0]]), weight=0.5)
    >>> fisher.tolist()
    [5.0, 2.0]
    """
    lists = as_list("fisher", fisher), as_list("grads", grads)
    weight = _checks.non_negative("weight", weight)
    _checks.seed(seed)
    if torch.compiler.is_compiling():
        torch.ops.ewc_fast.accumulate_square_(*lists, weight, seed)
    else:
        _engine.accumulate_square_(*lists, weight, seed, impl=impl, plan=plan)


def merge_(
    fisher: Tensors,
    anchor: Tensors,
    residual: Tensors,
    new_fisher: Tensors,
    params: Tensors,
    *,
    gamma: float = 1.0,
    seed: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Merge the penalty of a new task into the one of all tasks before it.

    .. math::
        F' = \gamma F + F_t, \qquad a' = a + \frac{F_t}{F'}(\theta - a)
        \quad (a' = \theta \text{ where } \gamma F = 0)

    With ``gamma=1`` the merged quadratic is the sum of the two, up to the constant
    :math:`R = \frac12 \sum \gamma F F_t / F' (\theta - a)^2`, which is returned as a float64
    scalar: :math:`\sum_t \frac12 F_t (\theta - \theta_t)^2 = \frac12 F'(\theta - a')^2 + R`.
    Time and memory do not grow with the number of tasks.

    ``anchor + residual`` is the exact anchor: ``residual`` (bfloat16) keeps what ``anchor`` rounds
    away, so that rounding does not pile up over tasks. Arithmetic is in float64. ``seed``: see
    above.

    >>> import torch
    >>> F, a, r = torch.tensor([1.0]), torch.tensor([0.0]), torch.zeros(1, dtype=torch.bfloat16)
    >>> merge_(F, a, r, torch.tensor([3.0]), torch.tensor([4.0])).item()
    6.0
    >>> F.item(), a.item()
    (4.0, 3.0)
    """
    lists = (
        as_list("fisher", fisher),
        as_list("anchor", anchor),
        as_list("residual", residual),
        as_list("new_fisher", new_fisher),
        as_list("params", params),
    )
    gamma = _checks.gamma(gamma)
    _checks.seed(seed)
    if torch.compiler.is_compiling():
        constant: Tensor = torch.ops.ewc_fast.merge_(*lists, gamma, seed)
        return constant
    return _engine.merge_(*lists, gamma, seed, impl=impl)


def merge_online_(
    fisher: Tensors,
    anchor: Tensors,
    new_fisher: Tensors,
    params: Tensors,
    *,
    gamma: float = 1.0,
    seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    r"""Online EWC: :math:`F' = \gamma F + F_t` and :math:`a' = \theta`.

    With ``gamma=1`` this is the single penalty at the latest parameters that Huszar
    (https://arxiv.org/abs/1712.03847) derives; with ``gamma < 1`` the online EWC of Schwarz et al.
    (https://arxiv.org/abs/1805.06370). ``seed``: see above.

    >>> import torch
    >>> F, a = torch.tensor([1.0]), torch.tensor([0.0])
    >>> merge_online_(F, a, torch.tensor([3.0]), torch.tensor([4.0]), gamma=0.5)
    >>> F.item(), a.item()
    (3.5, 4.0)
    """
    lists = (
        as_list("fisher", fisher),
        as_list("anchor", anchor),
        as_list("new_fisher", new_fisher),
        as_list("params", params),
    )
    gamma = _checks.gamma(gamma)
    _checks.seed(seed)
    if torch.compiler.is_compiling():
        torch.ops.ewc_fast.merge_online_(*lists, gamma, seed)
    else:
        _engine.merge_online_(*lists, gamma, seed, impl=impl)


def proximal_step_(
    params: Tensors,
    fisher: Tensors,
    anchor: Tensors,
    *,
    ewc_lambda: float | Tensor,
    lr: float | Tensor,
    impl: Impl = "auto",
    plan: Plan | None = None,
) -> None:
    r"""Take the proximal step of the penalty, stable for every strength.

    .. math:: \theta \leftarrow \frac{\theta + \eta\lambda F a}{1 + \eta\lambda F}

    the minimum of :math:`\frac\lambda2 F(\theta' - a)^2 + \frac1{2\eta}(\theta' - \theta)^2`.
    The explicit gradient step diverges once :math:`\eta\lambda F > 2`; this one moves at most to
    the anchor.

    >>> import torch
    >>> theta = torch.tensor([4.0, 4.0])
    >>> proximal_step_(theta, torch.tensor([0.0, 3.0]), torch.zeros(2), ewc_lambda=1.0, lr=1.0)
    >>> theta.tolist()
    [4.0, 1.0]
    """
    lists = as_list("params", params), as_list("fisher", fisher), as_list("anchor", anchor)
    if torch.compiler.is_compiling():
        numbers = _checks.in_graph("ewc_lambda", ewc_lambda), _checks.in_graph("lr", lr)
        with torch.no_grad():
            torch.ops.ewc_fast.proximal_step_(*lists, *numbers)
    else:
        ewc_lambda = _checks.non_negative("ewc_lambda", ewc_lambda)
        lr = _checks.non_negative("lr", lr)
        _engine.proximal_step_(*lists, ewc_lambda, lr, impl=impl, plan=plan)
