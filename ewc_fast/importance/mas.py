"""Memory aware synapses: how much a model's outputs react to each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ewc_fast.fisher import Batch, FisherDiagonal
from ewc_fast.fisher.recorder.absolute import AbsoluteRecorder
from ewc_fast.fisher.run import mean_over_samples


def mas_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_samples: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = False,
    verify: bool = True,
) -> FisherDiagonal:
    r"""Return the MAS importance of every trainable parameter, by name.

    .. math:: \Omega_i = \frac1N \sum_n \left|
        \frac{\partial \, \|f(x_n; \theta)\|_2^2}{\partial \theta_i}\right|

    (Aljundi et al. 2018, equations 3 and 4): a mean over samples of absolute values, each sample's
    by itself. The absolute value of a batch's mean gradient, as many implementations take it, is
    something else: in it samples cancel. No labels are needed. The norm is that of all of a
    sample's outputs, whatever their shape; outputs are taken as the model returns them (logits, not
    probabilities; ``forward`` may return something else).

    Their penalty is :math:`\lambda \sum_i \Omega_i (\theta_i - \theta_i^*)^2`, without the one
    half: their lambda is ``ewc_lambda / 2``. They keep the latest anchor, which is
    ``EWC(anchor="latest")``.

    Parameters
    ----------
    model, batches, max_samples, forward, progress, verify
        As for :func:`ewc_fast.fisher_diagonal`; targets may be missing and are not read. With
        weights the result is :math:`\sum_n w_n |g_n| / \sum_n w_n`.

    Returns
    -------
    FisherDiagonal
        A dict of name to tensor of the parameter's shape and device, float32 (float64 for float64
        parameters), all >= 0, and its ``report``; frozen parameters are left out.

    Cost: one forward and backward pass over whole batches, and what per-sample absolute values
    need: nothing more for linear layers at one position, scales, biases and embeddings; for linear
    layers at several positions and for convolutions each sample's gradient is formed, a few at a
    time (see :mod:`ewc_fast.fisher.recorder.absolute`).

    For the mean of SQUARES of the same gradients, at the price of the empirical Fisher, give
    :func:`ewc_fast.fisher_diagonal` an own likelihood with ``log_prob`` returning
    ``outputs.flatten(1).square().sum(1)``, and ``estimator="empirical"`` (with any targets).

    Raises
    ------
    TypeError, ValueError
        As :func:`ewc_fast.fisher_diagonal`.

    References
    ----------
    Aljundi et al. 2018, https://arxiv.org/abs/1711.09601.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> mas_importance(model, [torch.tensor([[1.0], [-3.0]])])  # |2 w x^2|: 4 and 36
    {'weight': tensor([[20.]])}
    """
    return mean_over_samples(
        model,
        batches,
        _SquaredNorm(),
        recorder=AbsoluteRecorder,
        max_samples=max_samples,
        forward=forward,
        progress=progress,
        verify=verify,
    )


class _SquaredNorm:
    r"""Sends back :math:`w_n \, \partial \|f_n\|^2 / \partial f_n = 2 w_n f_n`."""

    batched = False

    def vectors(self, outputs: Tensor, batch: Batch) -> list[Tensor]:
        """Return the one vector, of the outputs' shape and dtype."""
        if not outputs.is_floating_point():
            raise TypeError(
                f"outputs: expected floating-point numbers from the model, got {outputs.dtype}; "
                "pass forward=lambda model, inputs: ... to return others"
            )
        doubled = 2 * outputs.detach()
        if batch.weights is not None:
            weights = batch.weights.view(-1, *[1] * (outputs.dim() - 1))
            doubled = (doubled * weights).to(outputs.dtype)
        return [doubled]

    def count(self, outputs: Tensor, batch: Batch) -> int:
        """Return that there is one."""
        return 1

    def samples(self, outputs: Tensor, batch: Batch) -> float:
        """Return the samples of the batch, or their weights."""
        return float(batch.size if batch.weights is None else batch.weights.double().sum())
