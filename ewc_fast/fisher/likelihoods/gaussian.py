"""Regression: Gaussians of known variance, and of a variance that the model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast.fisher.likelihoods.base import Independent, computed, same_shape, total


class Gaussian(Independent):
    r"""Means z of independent Gaussians of known variance (regression).

    .. math:: \log p(y \mid z) = -\sum_k (y_k - z_k)^2 / (2 \sigma_k^2) + \mathrm{const}, \qquad
        M = \mathrm{diag}(1 / \sigma^2)

    Outputs and targets of one shape (N, ...). Exact: one backward pass an output. A loss that is
    the mean squared error over K outputs corresponds to a variance of K / 2.

    Parameters
    ----------
    variance
        A number > 0, or a tensor of them that broadcasts to the shape of one sample's outputs.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model, data = torch.nn.Linear(3, 2), [torch.randn(8, 3)]
    >>> noise = torch.tensor([0.5, 4.0])
    >>> fisher_diagonal(model, data, likelihood=Gaussian(variance=noise))["bias"]
    tensor([2.0000, 0.2500])
    """

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        try:
            values = torch.as_tensor(variance, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"variance: expected a number or a tensor, got {type(variance).__name__}"
            ) from None
        if not (values.isfinite() & (values > 0)).all():
            raise ValueError(f"variance: expected finite numbers > 0, got {variance}")
        self.variance = values

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return minus half the squared error over the variance, summed; constants left out."""
        return -0.5 * total(self._distance(outputs, targets).square() / self._variance(outputs))

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw from the Gaussian."""
        means = computed(outputs)
        return means + _noise(means, generator) * self._variance(outputs).sqrt()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (y - z) / variance."""
        return self._distance(outputs, targets) / self._variance(outputs)

    def root_information(self, outputs: Tensor) -> Tensor:
        """Return 1 / sqrt(variance)."""
        return self._variance(outputs).rsqrt().expand(outputs.shape)

    def _distance(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("gaussian", targets, tuple(outputs.shape))
        means = computed(outputs)
        return targets.to(means.dtype) - means

    def _variance(self, outputs: Tensor) -> Tensor:
        one, values = tuple(outputs.shape[1:]), self.variance
        if values.dim() > len(one) or any(
            size not in (1, whole)
            for size, whole in zip(reversed(values.shape), reversed(one), strict=False)
        ):
            raise ValueError(
                f"variance: expected a shape that broadcasts to one sample's outputs {one}, got "
                f"{tuple(values.shape)}"
            )
        return values.to(outputs.device, computed(outputs).dtype)


class HeteroscedasticGaussian(Independent):
    r"""Means m and log-variances s of independent Gaussians, both given by the model.

    .. math:: \log p(y \mid m, s) = -\tfrac12 \sum_k s_k + (y_k - m_k)^2 e^{-s_k} + \log 2 \pi,
        \qquad M = \mathrm{diag}(e^{-s}, \tfrac12)

    Outputs (N, 2 D, ...): the D means, then the D log-variances, along dimension 1; targets
    (N, D, ...). Exact: one backward pass an output; mean and variance have no covariance.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model = torch.nn.Linear(3, 2)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> data = [torch.randn(8, 3)]
    >>> fisher_diagonal(model, data, likelihood="heteroscedastic_gaussian")["bias"]
    tensor([1.0000, 0.5000])
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood, summed over outputs; log 2 pi is left out."""
        _, log_variance = self._halves(outputs)
        error = self._standard_error(outputs, targets)
        return -0.5 * total(log_variance + error.square())

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw from the Gaussian."""
        mean, log_variance = self._halves(outputs)
        return mean + _noise(mean, generator) * (log_variance / 2).exp()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (e exp(-s / 2), (e^2 - 1) / 2) with e = (y - m) exp(-s / 2)."""
        _, log_variance = self._halves(outputs)
        error = self._standard_error(outputs, targets)
        by_variance = (error - 1) * (error + 1) / 2
        return torch.cat([error * (-log_variance / 2).exp(), by_variance], dim=1)

    def root_information(self, outputs: Tensor) -> Tensor:
        """Return (exp(-s / 2), sqrt(1 / 2))."""
        _, log_variance = self._halves(outputs)
        root_half = torch.full_like(log_variance, 0.5**0.5)
        return torch.cat([(-log_variance / 2).exp(), root_half], dim=1)

    def _standard_error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = self._halves(outputs)
        same_shape("heteroscedastic_gaussian", targets, tuple(mean.shape))
        return (targets.to(mean.dtype) - mean) * (-log_variance / 2).exp()

    def _halves(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.dim() < 2 or outputs.shape[1] % 2 or outputs.shape[1] == 0:
            raise ValueError(
                "likelihood: 'heteroscedastic_gaussian' needs outputs (N, 2 D): D means, then D "
                f"log-variances, got shape {tuple(outputs.shape)}"
            )
        mean, log_variance = computed(outputs).chunk(2, dim=1)
        return mean, log_variance


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
