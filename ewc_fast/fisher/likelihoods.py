r"""What a model's outputs mean: log-probabilities, samples, and exact Fisher directions.

The Fisher information of the outputs :math:`z` of one sample is a matrix
:math:`M = E_y[\nabla_z \log p\, \nabla_z \log p^\top]`. Any vectors with
:math:`\sum_k v_k v_k^\top = M` give the exact diagonal for the parameters by one backward pass
each: :math:`F_i = \sum_k (J^\top v_k)_i^2` with the Jacobian :math:`J = dz / d\theta`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(Protocol):
    """What a likelihood must offer; shapes are (samples, ...)."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood of each sample, shape (samples,)."""

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw targets from the model's own distribution."""


class ExactLikelihood(Likelihood, Protocol):
    """A likelihood with a closed-form Fisher information of the outputs."""

    def count(self, outputs: Tensor) -> int:
        """Return how many directions there are: backward passes for the exact Fisher."""

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the vectors v_k, each of the outputs' shape."""


class Categorical:
    """Logits with classes in dimension 1, as ``cross_entropy`` takes them."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return minus the cross entropy, summed over positions."""
        _check_classes(outputs)
        return -_per_sample(F.cross_entropy(outputs, targets, reduction="none"))

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw classes from the softmax."""
        _check_classes(outputs)
        probabilities = outputs.movedim(1, -1).softmax(-1)
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        drawn = torch.multinomial(flat, 1, generator=generator)
        return drawn.view(probabilities.shape[:-1])

    def count(self, outputs: Tensor) -> int:
        """Return C - 1 for each position: diag(p) - p p^T has rank C - 1."""
        _check_classes(outputs)
        return (outputs.shape[1] - 1) * outputs[:1, 0].numel()

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        r"""Yield the columns of the Cholesky factor of diag(p) - p p^T, position by position.

        With tail sums :math:`q_j = \sum_{k > j} p_k` it is known in closed form (Tanabe and Sagae
        1992): :math:`L_{jj} = \sqrt{p_j q_j / q_{j-1}}`, :math:`L_{ij} = -L_{jj} p_i / q_j`.
        """
        p = outputs.double().softmax(1)
        from_here = p.flip(1).cumsum(1).flip(1)  # q_{j-1}
        beyond = torch.cat([from_here[:, 1:], torch.zeros_like(p[:, :1])], dim=1)  # q_j
        diagonal = (p * beyond / from_here).clamp_min(0).nan_to_num().sqrt()
        positions = outputs[0, 0].numel()
        for j in range(outputs.shape[1] - 1):
            column = torch.zeros_like(p)
            column[:, j] = diagonal[:, j]
            share = (p[:, j + 1 :] / beyond[:, j : j + 1]).nan_to_num()
            column[:, j + 1 :] = -diagonal[:, j : j + 1] * share
            column = column.to(outputs.dtype)
            if positions == 1:
                yield column
            else:
                yield from _one_position_at_a_time(column)


class Bernoulli:
    """Logits of independent binary labels (multi-label classification)."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return minus the binary cross entropy, summed over labels."""
        target = targets.to(outputs.dtype)
        return -_per_sample(F.binary_cross_entropy_with_logits(outputs, target, reduction="none"))

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw each label by its probability."""
        return torch.bernoulli(outputs.sigmoid(), generator=generator)

    def count(self, outputs: Tensor) -> int:
        """Return one direction for each output."""
        return outputs[0].numel()

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield sqrt(p (1 - p)) for one output at a time."""
        # sigmoid(-z), not 1 - sigmoid(z), which is 0 from z = 17 on in float32
        yield from _one_output_at_a_time((outputs.sigmoid() * (-outputs).sigmoid()).sqrt())


class Gaussian:
    """Means of independent Gaussians of unit variance (regression)."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return minus half the squared error, summed over outputs; constants left out."""
        return -0.5 * _per_sample((targets - outputs).square())

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw from the Gaussian."""
        noise = torch.randn(
            outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device
        )
        return outputs + noise

    def count(self, outputs: Tensor) -> int:
        """Return one direction for each output."""
        return outputs[0].numel()

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield 1 for one output at a time."""
        yield from _one_output_at_a_time(torch.ones_like(outputs))


NAMED: dict[str, ExactLikelihood] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
}


def _check_classes(outputs: Tensor) -> None:
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        raise ValueError(
            "likelihood: 'categorical' needs logits of two or more classes in dimension 1, got "
            f"outputs of shape {tuple(outputs.shape)}; use 'bernoulli' for the logits of yes-no "
            "labels, 'gaussian' for regression"
        )


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _one_output_at_a_time(scale: Tensor) -> Iterator[Tensor]:
    flat = scale.reshape(len(scale), -1)
    for k in range(flat.shape[1]):
        direction = torch.zeros_like(flat)
        direction[:, k] = flat[:, k]
        yield direction.view_as(scale)


def _one_position_at_a_time(column: Tensor) -> Iterator[Tensor]:
    flat = column.flatten(2)
    for position in range(flat.shape[2]):
        direction = torch.zeros_like(flat)
        direction[:, :, position] = flat[:, :, position]
        yield direction.view_as(column)
