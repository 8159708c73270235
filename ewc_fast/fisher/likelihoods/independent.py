"""Yes-no labels and counts: one number decides each output's distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_fast.fisher.likelihoods.base import Independent, computed, same_shape, total


class Bernoulli(Independent):
    r"""Logits z of independent yes-no labels (multi-label classification).

    .. math:: \log p(y \mid z) = \sum_k y_k \log \sigma(z_k) + (1 - y_k) \log \sigma(-z_k), \qquad
        M = \mathrm{diag}(\sigma(z) \sigma(-z))

    Outputs and targets of one shape (N, ...), targets in [0, 1]. Exact: one backward pass an
    output. Saturated logits keep their relative precision: no 1 - p is ever formed.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model = torch.nn.Linear(3, 2)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> fisher_diagonal(model, [torch.randn(8, 3)], likelihood="bernoulli")["bias"]
    tensor([0.2500, 0.2500])
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return minus the binary cross entropy, summed over labels."""
        z, y = computed(outputs), self._labels(outputs, targets)
        return -total(F.binary_cross_entropy_with_logits(z, y, reduction="none"))

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw each label by its probability."""
        return torch.bernoulli(computed(outputs).sigmoid(), generator=generator)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return y - sigmoid(z), without the difference."""
        z, y = computed(outputs), self._labels(outputs, targets)
        return y * (-z).sigmoid() - (1 - y) * z.sigmoid()

    def root_information(self, outputs: Tensor) -> Tensor:
        """Return sqrt(p (1 - p))."""
        z = computed(outputs)
        # root by root: the product of two is 0 in float32 from |z| = 104 on, with a root of 1e-22
        return z.sigmoid().sqrt() * (-z).sigmoid().sqrt()

    def _labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("bernoulli", targets, tuple(outputs.shape))
        y = targets.to(computed(outputs).dtype)
        if not ((y >= 0) & (y <= 1)).all():
            raise ValueError(
                "targets: expected numbers in [0, 1] for likelihood 'bernoulli', got "
                f"{y.min().item():g} to {y.max().item():g}; use 'categorical' for class indices"
            )
        return y


class Poisson(Independent):
    r"""Log-rates z of independent counts.

    .. math:: \log p(y \mid z) = \sum_k y_k z_k - e^{z_k} - \log y_k!, \qquad
        M = \mathrm{diag}(e^z)

    Outputs and targets of one shape (N, ...), targets >= 0. Exact: one backward pass an output.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model = torch.nn.Linear(3, 2)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> fisher_diagonal(model, [torch.randn(8, 3)], likelihood="poisson")["bias"]
    tensor([1., 1.])
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood, summed over outputs; log y! is left out."""
        z, y = computed(outputs), self._counts(outputs, targets)
        return total(y * z - z.exp())

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw counts at the rates."""
        return torch.poisson(computed(outputs).exp(), generator=generator)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return y - exp(z)."""
        return self._counts(outputs, targets) - computed(outputs).exp()

    def root_information(self, outputs: Tensor) -> Tensor:
        """Return exp(z / 2)."""
        return (computed(outputs) / 2).exp()

    def _counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("poisson", targets, tuple(outputs.shape))
        y = targets.to(computed(outputs).dtype)
        if not (y >= 0).all():
            raise ValueError(
                "targets: expected counts >= 0 for likelihood 'poisson', got "
                f"{y.min().item():g} among them"
            )
        return y
