"""fisher_diagonal: runs the model over the data and adds up squared per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ewc_fast import _checks
from ewc_fast.fisher.batches import Batch, call_model, output_tensor, read_batches
from ewc_fast.fisher.isolation import left_as_it_was
from ewc_fast.fisher.likelihoods import Likelihood
from ewc_fast.fisher.passes import Pass
from ewc_fast.fisher.report import FisherDiagonal
from ewc_fast.fisher.scores import Scores

Estimator = Literal["exact", "sampled", "empirical"]


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
        Iterable of ``(inputs, targets)``, of inputs alone, or of mappings that may have
        ``"labels"``; samples in dimension 0 of every tensor, batches of any size. Tensors are
        moved to the model's device. Inputs that are a tuple or mapping are passed to the model by
        position or keyword.
    likelihood
        ``"categorical"`` (logits, classes in dimension 1), ``"bernoulli"`` (logits of independent
        labels), ``"gaussian"`` (means, unit variance), or an object with
        ``log_prob(outputs, targets) -> (N,)`` and ``sample(outputs, generator)``.
    estimator
        ``"exact"``: expectation over the model's own labels in closed form, C - 1 backward passes
        for C classes. ``"sampled"``: labels drawn from the model, unbiased for ``exact``.
        ``"empirical"``: the data's labels; not the Fisher information, though often used for it.
    max_samples
        Stop after so many samples.
    draws
        Labels drawn for each sample, ``estimator="sampled"`` only.
    forward
        ``forward(model, inputs) -> outputs`` where the usual call does not fit.
    generator
        Source of the drawn labels. Without it the global one is used and set back afterwards, so
        that equal calls draw equal labels.
    progress
        Show a progress bar (needs tqdm).

    Returns
    -------
    dict
        Name to tensor of the parameter's shape and device, float32 (float64 for float64
        parameters), all >= 0. Frozen parameters are left out; one without influence is 0.

    Cost: for networks of ``nn.Linear`` layers with one position a sample, about one forward and
    backward pass a direction over whole batches; other parameters take one sample at a time.
    On the first batch what is recorded is compared with single samples; a parameter that differs
    takes the slow way.

    Raises
    ------
    TypeError, ValueError
        For data without samples or batch dimension, missing labels, unknown names, or ``"exact"``
        with more than 1,000 directions.

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
    _checks.one_of("estimator", estimator, ("exact", "sampled", "empirical"))
    _checks.positive_integer("draws", draws)
    if draws != 1 and estimator != "sampled":
        raise ValueError(f"draws: only estimator='sampled' draws labels, got {estimator!r}")
    if max_samples is not None:
        _checks.positive_integer("max_samples", max_samples)
    params = _checks.trainable_parameters(model)
    scores = Scores(likelihood, estimator, draws, generator)
    run = Pass(_forward(model, forward or call_model), params, scores, verify=verify)
    device = next(iter(params.values())).device
    with left_as_it_was(model), torch.enable_grad():
        shown = _with_progress(batches) if progress else batches
        for batch in read_batches(shown, max_samples, device):
            run.add(batch)
    return run.mean()


def _forward(
    model: nn.Module, call: Callable[[nn.Module, Any], Any]
) -> Callable[[Batch], Tensor]:
    """Return the function from batches to outputs."""
    inside = getattr(model, "_orig_mod", model)  # a compiled module hides its operations

    def outputs_of(batch: Batch) -> Tensor:
        outputs = output_tensor(call(inside, batch.inputs))
        if outputs.shape[0] != batch.size:
            raise ValueError(
                f"outputs: expected {batch.size} samples in dimension 0 like the inputs, got "
                f"shape {tuple(outputs.shape)}"
            )
        return outputs

    return outputs_of


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    bar: Iterable[Any] = tqdm(batches, desc="Fisher", unit="batch")
    return bar
