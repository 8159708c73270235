r"""What a likelihood offers, and what the library asks of one.

The Fisher information of the outputs :math:`z` of one sample is a matrix
:math:`M = E_y[\nabla_z \log p\, \nabla_z \log p^\top]`. Any vectors with
:math:`\sum_k v_k v_k^\top = M` give the exact diagonal for the parameters by one backward pass
each: :math:`F_i = \sum_k (J^\top v_k)_i^2` with the Jacobian :math:`J = dz / d\theta`. Their sum
with random signs, :math:`v = \sum_k \pm v_k`, gives it in expectation by one backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.batches import Batch

MOST_EXACT_PASSES = 1000


class Likelihood(Protocol):
    """What a likelihood of the user's own must offer; shapes are (samples, ...).

    Outputs arrive detached, in float32 or float64. An object may have ``directions`` too, as
    :class:`ExactLikelihood`, for the estimators ``"exact"`` and ``"rademacher"``.

    Examples
    --------
    >>> class Laplace:
    ...     def log_prob(self, outputs, targets):
    ...         return -(targets - outputs).abs().sum(1)
    ...     def sample(self, outputs, generator):
    ...         u = torch.rand(outputs.shape, generator=generator) - 0.5
    ...         return outputs - u.sign() * (1 - 2 * u.abs()).log()
    >>> from ewc_fast import fisher_diagonal
    >>> model, data = torch.nn.Linear(3, 2), [torch.randn(8, 3)]
    >>> fisher = fisher_diagonal(model, data, likelihood=Laplace(), estimator="sampled")
    >>> fisher["bias"]  # the score is +-1 wherever y is not the very median
    tensor([1., 1.])
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood of each sample, shape (samples,), up to a constant."""

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw targets from the model's own distribution."""


class ExactLikelihood(Likelihood, Protocol):
    """A likelihood with a closed-form Fisher information of the outputs.

    ``count(outputs)``, the number of directions, may be left out: they are then counted.
    """

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the vectors v_k, each of the outputs' shape, as many for every batch entry."""


class Known(ABC):
    """A likelihood of the library: beside the public methods, what estimators ask for."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood of each sample, shape (samples,), up to a constant."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw targets from the model's own distribution."""

    @abstractmethod
    def count(self, outputs: Tensor) -> int:
        """Return how many directions there are: backward passes for the exact Fisher."""

    @abstractmethod
    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the vectors v_k, each of the outputs' shape."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return d log p / d outputs, each sample's own, without the cancellations of autograd."""

    def drawn_score(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the score of targets drawn from the model."""
        return self.score(outputs, self.sample(outputs, generator))

    @abstractmethod
    def random_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the sum of the directions with random signs, other ones for each sample."""

    def for_batch(self, batch: Batch) -> Known:
        """Return the likelihood as it is for the samples of this batch."""
        return self

    def observed(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return where outputs count, broadcasting to their shape; None for everywhere."""
        return None

    def per_sample(self, observed: Tensor | None) -> Tensor | None:
        """Return how many samples each entry of the batch counts for; None for one each."""
        return None

    def part_count(self, observed: Tensor | None) -> int:
        """Return how many vectors :meth:`parts` yields."""
        return 1

    def parts(self, score: Tensor, observed: Tensor | None) -> Iterator[Tensor]:
        """Yield the parts of a score whose gradients are squared apart."""
        yield score


class Own(Known):
    """A likelihood of the user's own; scores by autograd."""

    def __init__(self, likelihood: Any) -> None:
        self._own = likelihood
        self._name = type(likelihood).__name__

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what the user's says, if it is one number a sample."""
        found = self._own.log_prob(outputs, targets)
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:1]:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
            raise ValueError(
                f"likelihood: {self._name}.log_prob must return one number for each sample, shape "
                f"({len(outputs)},), got {got}; sum over all dimensions but the first"
            )
        return found

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw as the user's does."""
        drawn: Tensor = self._own.sample(computed(outputs), generator)
        return drawn

    def count(self, outputs: Tensor) -> int:
        """Return the number of directions; counted, they are at most one too many for exact."""
        if hasattr(self._own, "count"):
            return int(self._own.count(computed(outputs)))
        directions = self._own.directions(computed(outputs))
        return sum(1 for _ in islice(directions, MOST_EXACT_PASSES + 1))

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the user's."""
        for direction in self._own.directions(computed(outputs)):
            if direction.shape != outputs.shape:
                raise ValueError(
                    f"likelihood: {self._name}.directions must yield vectors of the outputs' "
                    f"shape {tuple(outputs.shape)}, got {tuple(direction.shape)}"
                )
            yield direction

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return d log p / d outputs by autograd."""
        with torch.enable_grad():
            leaf = computed(outputs).detach().requires_grad_()
            value = self.log_prob(leaf, targets)
            if not value.requires_grad:
                raise ValueError(
                    f"likelihood: {self._name}.log_prob must be differentiable in the outputs, got "
                    "a result that does not depend on them"
                )
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient

    def random_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the signed sum, direction by direction."""
        signed = torch.zeros_like(computed(outputs))
        for direction in self.directions(outputs):
            signs = random_signs((len(outputs),), generator, signed)
            signed += direction.detach() * per_entry(signs, signed)
        return signed


class Independent(Known):
    r"""A likelihood whose outputs are independent given the inputs: M is diagonal."""

    @abstractmethod
    def root_information(self, outputs: Tensor) -> Tensor:
        r"""Return the root of the diagonal of M, in the outputs' shape."""

    def count(self, outputs: Tensor) -> int:
        """Return one direction for each output."""
        return outputs[0].numel()

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the root of the information, one output at a time."""
        root = self.root_information(outputs)
        flat = root.reshape(len(root), -1)
        for k in range(flat.shape[1]):
            direction = torch.zeros_like(flat)
            direction[:, k] = flat[:, k]
            yield direction.view_as(root)

    def random_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the root of the information with random signs."""
        root = self.root_information(outputs)
        return root * random_signs(tuple(root.shape), generator, root)


def computed(outputs: Tensor) -> Tensor:
    """Return outputs in the dtype that scores are computed in: float32, or float64 as they are."""
    return outputs.to(state_dtype(outputs.dtype))


def total(values: Tensor) -> Tensor:
    """Return the sum over all dimensions but the first."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def per_entry(values: Tensor, outputs: Tensor) -> Tensor:
    """Return values, one for each entry of the batch, as they broadcast over the outputs."""
    return values.view(-1, *[1] * (outputs.dim() - 1))


def random_signs(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Return independent signs, +1 or -1 with equal probability."""
    bits = torch.randint(2, shape, generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)


def same_shape(name: str, targets: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless targets have the shape; broadcasting would pair each with all others."""
    if targets.shape != expected:
        raise ValueError(
            f"targets: expected shape {expected} for likelihood {name!r}, got "
            f"{tuple(targets.shape)}; reshape them, .view{expected} say"
        )
