"""fisher_diagonal: runs the model over the data and adds up squared per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ewc_fast import _checks
from ewc_fast.fisher.batches import call_model, read_batches, run_model
from ewc_fast.fisher.isolation import left_as_it_was
from ewc_fast.fisher.likelihoods import Likelihood
from ewc_fast.fisher.recorder.trial import try_samples
from ewc_fast.fisher.report import FisherDiagonal, FisherReport
from ewc_fast.fisher.run import mean_over_samples
from ewc_fast.fisher.scores import Estimator, Scores


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    likelihood: str | Likelihood = "categorical",
    estimator: Estimator = "exact",
    max_samples: int | None = None,
    draws: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    verify: bool = True,
) -> FisherDiagonal:
    r"""Return the diagonal Fisher information of every trainable parameter, by name.

    .. math:: F_i = \frac1N \sum_n E_{y}\left[\left(
        \frac{\partial \log p(y \mid x_n, \theta)}{\partial \theta_i}\right)^2\right]

    a MEAN over samples of squared gradients, each sample's gradient squared by itself: the square
    of a batch gradient is something else, and depends on the batch size. The result does not, so
    long as the model treats samples apart.

    Parameters
    ----------
    model
        Runs in eval mode: dropout off, batch norm by its running statistics. It comes back as it
        was: mode, gradients, ``requires_grad``, buffers, random state.
    batches
        Iterable of ``(inputs, targets)``, of ``(inputs, targets, weights)``, of inputs alone, or of
        mappings that may have ``"labels"`` and ``"sample_weight"``; samples in dimension 0 of every
        tensor, batches of any size. Tensors are moved to the model's device. Inputs that are a
        tuple or mapping are passed to the model by position or keyword. A tuple ``(a, b)`` is
        always read as inputs and targets: two inputs without targets are ``((a, b),)``. With
        weights :math:`w_n \ge 0`, shape (N,), the result is the weighted mean
        :math:`\sum_n w_n E[g_n^2] / \sum_n w_n`.
    likelihood
        What the outputs mean: ``"categorical"`` (logits, classes in dimension 1), ``"causal_lm"``
        (logits (N, T, V), targets the input ids), ``"bernoulli"`` (logits of independent labels),
        ``"gaussian"`` (means, unit variance), ``"heteroscedastic_gaussian"`` (means, then
        log-variances), ``"poisson"`` (log-rates); an object of :mod:`ewc_fast.fisher` with other
        options, as ``Categorical(dim=-1, classes=[2, 3])``; or an object of your own, see
        :class:`~ewc_fast.fisher.Likelihood`.
    estimator
        ``"exact"``: expectation over the model's own labels in closed form, C - 1 backward passes
        for C classes. ``"sampled"``: labels drawn from the model, unbiased for ``exact``.
        ``"rademacher"``: the vectors of ``exact`` with random signs in one backward pass, unbiased
        for it too. ``"empirical"``: the data's labels; not the Fisher information, though often
        used for it. ``"batched"``: the mean over batches of the square of the gradient of a
        batch's MEAN log-likelihood, at the data's labels, as in GMvandeVen/continual-learning with
        ``fisher_batch`` (which then divides by one batch too few): BIASED, near an optimum too
        small by about the batch size b, and kept only to reproduce results. Times :math:`b^2` it is
        the square of the summed gradient.
    max_samples
        Stop after so many samples.
    draws
        Backward passes to average, ``estimator="sampled"`` and ``"rademacher"`` only.
    forward
        ``forward(model, inputs) -> outputs`` where the usual call does not fit.
    generator
        Source of the drawn labels or signs, on the model's device. Without it the global one is
        used and set back afterwards, so that equal calls draw equal labels.
    progress
        Show a progress bar (needs tqdm).
    verify
        Compare what is recorded of the first samples with these samples one at a time, at the cost
        of a few backward passes over single samples; a parameter that differs takes the slow way.

    Returns
    -------
    FisherDiagonal
        A dict of name to tensor of the parameter's shape and device, float32 (float64 for float64
        parameters), all >= 0, and its ``report``. Frozen parameters are left out; one without
        influence is 0.

    Cost: about one forward and backward pass a vector over whole batches, whatever the operations
    and wherever they have the samples; a parameter of which this can't be told takes one sample at
    a time. ``print(fisher.report)`` says which did, and why.
    Memory: the Fisher itself, no gradient for each sample. Gradient checkpointing and compilation
    are off meanwhile: where memory is short use smaller batches, the result is the same. On the CPU
    a batch that would make tensors of 16 MiB and more is run in parts, which is also faster.

    Raises
    ------
    TypeError, ValueError
        For data without samples or batch dimension, missing or impossible labels, bad weights,
        unknown names, ``"exact"`` with more than 1,000 directions, or a model in which samples of
        a batch influence each other.

    References
    ----------
    Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114; van de Ven 2025 on the
    estimators, https://arxiv.org/abs/2502.11756.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    >>> fisher = fisher_diagonal(model, data)
    >>> {name: tuple(values.shape) for name, values in fisher.items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    return mean_over_samples(
        model,
        batches,
        Scores(likelihood, estimator, draws, generator),
        max_samples=max_samples,
        forward=forward,
        progress=progress,
        verify=verify,
    )


def fisher_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> FisherReport:
    """Return which parameters :func:`fisher_diagonal` would record, tried on a few samples.

    A look before a long run: takes the first three samples of the first batch and compares what is
    recorded of them with these samples one at a time. ``model``, ``batches`` and ``forward`` are
    those of :func:`fisher_diagonal`, and so are the errors. Parameters that are not recorded take
    one sample at a time: right, but slow.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    >>> print(fisher_report(model, [torch.randn(8, 4)]))
    4 of 4 parameters recorded
    """
    params = _checks.trainable_parameters(model)
    inside = getattr(model, "_orig_mod", model)
    device = next(iter(params.values())).device
    with left_as_it_was(model), torch.enable_grad():
        for batch in read_batches(batches, None, device):
            if batch.size == 1:  # its gradient is that of the sample, and nothing to be learned
                continue
            _, plan = try_samples(
                partial(run_model, forward or call_model, inside), batch, params, verify=True
            )
            return FisherReport({name: plan.ways()[name] for name in params})
    raise ValueError("batches: expected one of two or more samples, got none")
