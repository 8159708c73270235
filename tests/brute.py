"""Scores and their second moments by going through every label there is, in float64.

The scores are PyTorch's own derivatives of log-probabilities as ``torch.distributions`` has them;
continuous labels are integrated numerically. Nothing here is the library's but the objects tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numerics import u
from torch import Tensor, distributions
from torch.func import grad, vmap

from ewc_fast.fisher import (
    Batch,
    Bernoulli,
    Categorical,
    CausalLM,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)
from ewc_fast.fisher.scores import ESTIMATORS, Scores

NO, MOST_COUNTED = -100, 40
VARIANCE = torch.tensor([0.25, 9.0]).double()
ALLOWED = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]).bool()

# The labels of one site of a sample, and their probabilities under the model.
Site = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A likelihood, outputs of three samples, targets, and what they mean for one sample."""

    likelihood: Any
    outputs: Tensor
    targets: Tensor
    log_p: Callable[[int, Tensor, Tensor], Tensor]  # of sample n, its outputs, its labels
    sites: Callable[[int, Tensor], list[Site]]
    labels: Callable[[Tensor], Tensor] = torch.flatten  # those of the sites, from one's targets

    def batch(self, weights: Tensor | None = None) -> Batch:
        """Return the three samples as a batch; the likelihood is given the outputs."""
        return Batch(self.outputs, self.targets, weights, len(self.outputs))

    def score(self, n: int) -> Tensor:
        """Return the derivative of one sample's log-probability at its targets, flat."""
        labels = self.labels(self.targets[n])
        return grad(lambda z: self.log_p(n, z, labels))(self.outputs[n]).flatten()

    def information(self, n: int) -> Tensor:
        """Return E[s s^T] of one sample over all combinations of labels of its sites."""
        z = self.outputs[n]
        sites = self.sites(n, z)
        labels = torch.cartesian_prod(*[values for values, _ in sites]).view(-1, len(sites))
        p = torch.cartesian_prod(*[p for _, p in sites]).view(-1, len(sites)).prod(1)
        assert abs(p.sum() - 1) < 1e-12
        scores = vmap(grad(lambda z, y: self.log_p(n, z, y)), in_dims=(None, 0))(z, labels)
        scores = scores.reshape(len(labels), -1)
        return scores.t() @ (p[:, None] * scores)


def softmax_case(
    likelihood: Any,
    outputs: Tensor,
    targets: Tensor,
    logits: Callable[[int, Tensor], Tensor] = lambda n, z: z.view(len(z), -1).t(),
    labels: Callable[[Tensor], Tensor] = torch.flatten,
) -> Case:
    """Return a case whose sites are softmaxes; ``logits`` gives them by rows."""

    def log_p(n: int, z: Tensor, y: Tensor) -> Tensor:
        counts = labels(targets[n]) != NO
        y = torch.where(counts, y, 0).long()
        rows = torch.where(counts[:, None], logits(n, z), 0)
        log_p = rows.log_softmax(1).gather(1, y[:, None])[:, 0]
        return (log_p * counts).sum()

    def sites(n: int, z: Tensor) -> list[Site]:
        return [(torch.arange(len(row)), row.softmax(0)) for row in logits(n, z)]

    return Case(likelihood, outputs, targets, log_p, sites, labels)


def only_allowed(n: int, z: Tensor) -> Tensor:
    return torch.where(ALLOWED[n], z, -torch.inf)[None]


def independent_case(
    likelihood: Any,
    outputs: Tensor,
    targets: Tensor,
    distribution: Callable[[Tensor], distributions.Distribution],
    sites: Callable[[int, Tensor], list[Site]],
) -> Case:
    def log_p(n: int, z: Tensor, y: Tensor) -> Tensor:
        return distribution(z.flatten()).log_prob(y.to(z)).sum()

    return Case(likelihood, outputs, targets, log_p, sites)


def normal_sites(distribution: Callable[[Tensor], distributions.Distribution]) -> Any:
    """Return sites at the nodes of a Gauss-Hermite rule, exact for polynomials below degree 16."""
    nodes, p = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(8))

    def sites(n: int, z: Tensor) -> list[Site]:
        d = distribution(z.flatten())
        means, deviations = d.mean.expand(d.mean.shape), d.stddev.expand(d.mean.shape)
        return [(m + s * nodes, p / p.sum()) for m, s in zip(means, deviations, strict=True)]

    return sites


def two_labels(n: int, z: Tensor) -> list[Site]:
    return [(torch.tensor([0.0, 1.0]), torch.stack([1 - p, p])) for p in z.flatten().sigmoid()]


def counts(n: int, z: Tensor) -> list[Site]:
    values = torch.arange(MOST_COUNTED).double()
    return [(values, distributions.Poisson(r).log_prob(values).exp()) for r in z.flatten().exp()]


def unit_normal(z: Tensor) -> distributions.Distribution:
    return distributions.Normal(z, torch.ones_like(z), validate_args=False)


def normal(z: Tensor) -> distributions.Distribution:
    return distributions.Normal(z, VARIANCE.sqrt(), validate_args=False)


def own_normal(z: Tensor) -> distributions.Distribution:
    half = len(z) // 2
    return distributions.Normal(z[:half], (z[half:] / 2).exp(), validate_args=False)


def bernoulli(z: Tensor) -> distributions.Distribution:
    return distributions.Bernoulli(logits=z, validate_args=False)


def poisson(z: Tensor) -> distributions.Distribution:
    return distributions.Poisson(z.exp(), validate_args=False)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class OwnExponential:
    """Log-rates of exponential waiting times: E (1 - r y)^2 = 1. A user's own, with directions."""

    def log_prob(self, outputs, targets):
        return (outputs - outputs.exp() * targets).flatten(1).sum(1)

    def sample(self, outputs, generator):
        u = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype)
        return -torch.log1p(-u) * (-outputs).exp()

    def directions(self, outputs):
        for k in range(outputs.shape[1]):
            direction = torch.zeros_like(outputs)
            direction[:, k] = 1
            yield direction


def exponential(z: Tensor) -> distributions.Distribution:
    return distributions.Exponential(z.exp(), validate_args=False)


def waiting_times(n: int, z: Tensor) -> list[Site]:
    """Gauss-Laguerre nodes, exact for polynomials below degree 16."""
    nodes, p = map(torch.from_numpy, np.polynomial.laguerre.laggauss(8))
    return [(nodes / rate, p) for rate in z.flatten().exp()]


IDS = torch.tensor([[0, 1, 2, 0], [2, 2, NO, NO], [NO, NO, 1, 0]])
MAPS = torch.tensor([[[0], [1], [2]], [[NO], [2], [NO]], [[NO], [NO], [NO]]])

CASES: dict[str, Case] = {
    "categorical": softmax_case("categorical", randn(3, 4), torch.tensor([0, 3, 1])),
    "categorical_of_two": softmax_case(Categorical(), randn(3, 2), torch.tensor([0, 1, 1])),
    "categorical_ignoring_one": softmax_case(
        Categorical(), randn(3, 4), torch.tensor([0, NO, 1])
    ),
    "categorical_map": softmax_case("categorical", randn(3, 3, 3, 1), MAPS),
    "categorical_classes_last": softmax_case(
        Categorical(dim=-1), randn(3, 3, 1, 3), MAPS, lambda n, z: z.view(-1, 3)
    ),
    "categorical_some_classes": softmax_case(
        Categorical(classes=[3, 0, 2]), randn(3, 4), torch.tensor([0, 3, 2]),
        lambda n, z: only_allowed(0, z),
    ),
    "categorical_some_classes_last": softmax_case(
        Categorical(dim=-1, classes=ALLOWED[0]), randn(3, 2, 4),
        torch.tensor([[0, 3], [2, NO], [3, 3]]),
        lambda n, z: torch.where(ALLOWED[0], z, -torch.inf),
    ),
    "categorical_each_sample_its_classes": softmax_case(
        Categorical(classes=lambda batch: ALLOWED[:batch.size]), randn(3, 4),
        torch.tensor([2, 1, 0]), only_allowed,
    ),
    "causal_lm": softmax_case(
        "causal_lm", randn(3, 4, 3), IDS, lambda n, z: z[:-1], lambda ids: ids[1:]
    ),
    "causal_lm_per_token": softmax_case(
        CausalLM(per="token"), randn(3, 4, 3), IDS, lambda n, z: z[:-1], lambda ids: ids[1:]
    ),
    "bernoulli": independent_case(
        "bernoulli", randn(3, 3), torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]]),
        bernoulli, two_labels,
    ),
    "bernoulli_map": independent_case(
        Bernoulli(), randn(3, 1, 2), torch.tensor([[[0, 1]], [[1, 0]], [[1, 1]]]),
        bernoulli, two_labels,
    ),
    "gaussian": independent_case(
        "gaussian", randn(3, 2), randn(5, 2)[2:], unit_normal, normal_sites(unit_normal)
    ),
    "gaussian_of_known_variances": independent_case(
        Gaussian(variance=VARIANCE), randn(3, 2), randn(5, 2)[2:], normal, normal_sites(normal)
    ),
    "heteroscedastic_gaussian": independent_case(
        "heteroscedastic_gaussian", randn(3, 4), randn(5, 2)[2:],
        own_normal, normal_sites(own_normal),
    ),
    "heteroscedastic_gaussian_map": independent_case(
        HeteroscedasticGaussian(), randn(3, 2, 2), randn(5, 1, 2)[2:],
        own_normal, normal_sites(own_normal),
    ),
    "poisson": independent_case(
        "poisson", randn(3, 2), torch.tensor([[0, 3], [1, 1], [2, 0]]), poisson, counts
    ),
    "poisson_without_output_dimension": independent_case(
        Poisson(), randn(3), torch.tensor([0, 3, 1]), poisson, counts
    ),
    "own": independent_case(
        OwnExponential(), randn(3, 2), randn(3, 2).abs(), exponential, waiting_times
    ),
}  # fmt: skip

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def vectors(
    case: Case, estimator: str, weights: Tensor | None = None, seed: int = 0, draws: int = 1
) -> list[Tensor]:
    """Return an estimator's vectors for a case; there must be as many as announced."""
    generator = torch.Generator().manual_seed(seed)
    scores = Scores(case.likelihood, estimator, draws, generator)
    batch = case.batch(weights)
    found = list(scores.vectors(case.outputs, batch))
    assert len(found) == scores.count(case.outputs, batch)
    assert all(v.shape == case.outputs.shape and v.dtype == case.outputs.dtype for v in found)
    return found


def second_moments(found: Iterable[Tensor]) -> Tensor:
    """Return sum_k v_k v_k^T for each sample, over the flattened outputs."""
    stacked = torch.stack([v.double().reshape(len(v), -1) for v in found])
    return torch.einsum("kni,knj->nij", stacked, stacked)


def rounding(expected: Tensor) -> Tensor:
    """Allow 64 roundings, of a product's larger possible size where there is cancellation."""
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    return 64 * u(torch.float64) * (scale.unsqueeze(-1) * scale.unsqueeze(-2) + 1e-3 * scale.max())
