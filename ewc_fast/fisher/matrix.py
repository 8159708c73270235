"""The whole Fisher information matrix of a small model, for study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast import _checks
from ewc_fast.fisher.batches import Batch, call_model, read_batches, run_model
from ewc_fast.fisher.isolation import left_as_it_was
from ewc_fast.fisher.likelihoods import Likelihood
from ewc_fast.fisher.scores import Estimator, Scores

MOST_PARAMETERS = 20_000  # 3.2 GB of float64


def fisher_matrix(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    likelihood: str | Likelihood = "categorical",
    estimator: Estimator = "exact",
    max_samples: int | None = None,
    draws: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the Fisher information matrix of all trainable parameters together.

    .. math:: F = \frac1N \sum_n E_y[g_n g_n^\top], \qquad
        g_n = \nabla_\theta \log p(y \mid x_n, \theta)

    One sample at a time: for study, and for models of up to 20,000 parameters. Its diagonal is
    :func:`~ewc_fast.fisher_diagonal`. Where the model is linear in its parameters up to the
    logits, it is the Hessian of the loss; elsewhere the Hessian's expectation over the model's own
    labels: :math:`F = E[-\nabla^2_\theta \log p]`.

    Parameters
    ----------
    model, batches, likelihood, estimator, max_samples, draws, forward, generator
        As for :func:`~ewc_fast.fisher_diagonal`. Labels and signs are drawn sample by sample, so
        that other ones come from equal seeds.

    Returns
    -------
    Tensor
        Shape (P, P), float64, on the model's device. Rows and columns are the entries of the
        trainable parameters in the order of ``model.named_parameters()``, each flattened;
        :func:`parameter_slices` says which are whose.

    Raises
    ------
    TypeError, ValueError
        As :func:`~ewc_fast.fisher_diagonal`, and for more than 20,000 parameters.

    References
    ----------
    Aich 2021, "Elastic Weight Consolidation (EWC): Nuts and Bolts", eq. 9,
    https://arxiv.org/abs/2105.04093.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> matrix = fisher_matrix(model, [torch.randn(8, 4)])
    >>> matrix.shape, parameter_slices(model)
    (torch.Size([15, 15]), {'weight': slice(0, 12, None), 'bias': slice(12, 15, None)})
    """
    scores = Scores(likelihood, estimator, draws, generator)
    if max_samples is not None:
        _checks.positive_integer("max_samples", max_samples)
    params = list(_checks.trainable_parameters(model).values())
    size = sum(param.numel() for param in params)
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"model: expected at most {MOST_PARAMETERS:,} trainable parameters for a whole matrix, "
            f"got {size:,} ({8e-9 * size**2:,.0f} GB); use fisher_diagonal, or freeze layers"
        )
    device = params[0].device
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    samples = 0.0
    with left_as_it_was(model), torch.enable_grad():
        for batch in read_batches(batches, max_samples, device):
            for part in [batch] if scores.batched else _one_by_one(batch):
                outputs = run_model(forward or call_model, model, part)
                vectors = scores.vectors(outputs, part)
                rows = [_gradient(outputs, params, vector) for vector in vectors]
                if rows:
                    gradients = torch.stack(rows)
                    matrix.addmm_(gradients.t(), gradients)
                samples += scores.samples(outputs, part)
    if samples == 0:
        raise ValueError("batches: expected at least one sample, got none that counts")
    return matrix.div_(samples)


def parameter_slices(model: nn.Module) -> dict[str, slice]:
    """Return which rows of :func:`fisher_matrix` belong to which parameter, by name.

    Examples
    --------
    >>> parameter_slices(torch.nn.Linear(4, 3, bias=False))
    {'weight': slice(0, 12, None)}
    """
    slices, start = {}, 0
    for name, param in _checks.trainable_parameters(model).items():
        slices[name] = slice(start, start + param.numel())
        start += param.numel()
    return slices


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    for n in range(batch.size):
        yield batch.samples(n, n + 1)


def _gradient(outputs: Tensor, params: list[nn.Parameter], vector: Tensor) -> Tensor:
    """Return the gradient with respect to all parameters, flat, in float64."""
    if not outputs.requires_grad:
        return torch.zeros(
            sum(p.numel() for p in params), dtype=torch.float64, device=params[0].device
        )
    grads = torch.autograd.grad(
        outputs, params, vector, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return torch.cat([grad.flatten().double() for grad in grads])
