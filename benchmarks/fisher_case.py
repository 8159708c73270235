"""A classifier, its data, and what its Fisher diagonals must be: one sample at a time, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from harness import MismatchError
from torch import Tensor, nn

Estimator = Literal["exact", "sampled", "empirical"]
Diagonal = dict[str, Tensor]

ESTIMATORS: tuple[Estimator, ...] = ("exact", "sampled", "empirical")
SEED = 0  # of the labels drawn: every implementation seeds its draw with it
# Of each parameter's largest entry: float32 sums over samples and classes in any order.
TOLERANCE = 1e-4


class FisherCase:
    """A multilayer perceptron, and random inputs and labels in equal batches."""

    def __init__(self, widths: Sequence[int], batch_size: int, batches: int) -> None:
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = perceptron(widths)
        self.batches = [
            (
                torch.randn(batch_size, widths[0], generator=draw),
                torch.randint(widths[-1], (batch_size,), generator=draw),
            )
            for _ in range(batches)
        ]
        self._wanted: dict[Estimator, Diagonal] = {}

    def forward_and_backward(self) -> None:
        """Do what training does with the same data: the ordinary gradient of the summed loss."""
        params = list(self.model.parameters())
        for inputs, labels in self.batches:
            loss = F.cross_entropy(self.model(inputs), labels, reduction="sum")
            torch.autograd.grad(loss, params)

    def check(self, call: Callable[[], Diagonal], estimator: Estimator) -> None:
        """Raise unless ``call`` returns the mean over samples of the squared gradients."""
        if estimator not in self._wanted:
            self._wanted[estimator] = self._one_by_one(estimator)
        found = call()
        for name, want in self._wanted[estimator].items():
            if name not in found:
                raise MismatchError(f"{name}: missing")
            error = ((found[name] - want).abs().amax() / want.abs().amax()).item()
            if not error <= TOLERANCE:
                raise MismatchError(f"{name}: error {error:.1e} of its largest entry")

    def _one_by_one(self, estimator: Estimator) -> Diagonal:
        model = copy.deepcopy(self.model).double()
        params = dict(model.named_parameters())
        totals = {name: torch.zeros_like(param.detach()) for name, param in params.items()}
        chosen, samples = Labels(estimator), 0
        for inputs, data_labels in self.batches:
            labels = chosen.of(self.model(inputs), data_labels).tolist()
            for sample, label in zip(inputs.double(), labels, strict=True):
                log_probs = model(sample).log_softmax(-1)
                for c in range(len(log_probs)) if estimator == "exact" else [label]:
                    weight = log_probs[c].exp().item() if estimator == "exact" else 1.0
                    grads = torch.autograd.grad(
                        log_probs[c], list(params.values()), retain_graph=True
                    )
                    for total, grad in zip(totals.values(), grads, strict=True):
                        total += weight * grad.square()
            samples += len(inputs)
        return {name: total / samples for name, total in totals.items()}


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Labels:
    """The labels that an estimator squares the gradients of: the data's, or the model's own."""

    def __init__(self, estimator: Estimator) -> None:
        self._draw = torch.Generator().manual_seed(SEED) if estimator == "sampled" else None

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the next batch's labels."""
        if self._draw is None:
            return labels
        probabilities = logits.detach().softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self._draw).view(-1)
