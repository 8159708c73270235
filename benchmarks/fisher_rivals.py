"""Fisher diagonals without ewc_fast, in PyTorch alone: one by one, and by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fisher_case import (
    Diagonal,
    Estimator,
    FisherCase,
    Labels,
    add_squares,
    losses,
    weighted_log_probs,
)
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], Diagonal]

CHUNK = 16  # samples whose gradients vmap holds at once

ONE_BY_ONE = "one sample at a time"
VMAP = "vmap of grad"
VMAP_IN_CHUNKS = f"vmap of grad, chunks of {CHUNK}"


def plain_rivals(case: FisherCase, estimator: Estimator) -> dict[str, Call]:
    """Return what needs no library."""
    whole = len(case.batches[0][0])
    return {
        ONE_BY_ONE: lambda: one_sample_at_a_time(case, estimator),
        VMAP: lambda: vmap_of_grad(case, estimator, whole),
        VMAP_IN_CHUNKS: lambda: vmap_of_grad(case, estimator, CHUNK),
    }


def one_sample_at_a_time(case: FisherCase, estimator: Estimator) -> Diagonal:
    """Take a batch of one sample after another, with a backward pass for each label."""
    params = dict(case.model.named_parameters())
    totals = {name: torch.zeros_like(param.detach()) for name, param in params.items()}
    chosen = Labels(estimator)
    for inputs, data_labels in case.batches:
        labels = data_labels
        if estimator == "sampled":
            with torch.no_grad():
                labels = chosen.of(case.model(inputs), data_labels)
        for sample, label in zip(inputs.split(1), labels.split(1), strict=True):
            for weight, log_prob in weighted_log_probs(case.model, sample, label, estimator):
                grads = torch.autograd.grad(log_prob, list(params.values()), retain_graph=True)
                for total, g in zip(totals.values(), grads, strict=True):
                    total.addcmul_(g, g, value=weight)
    return {name: total / case.samples for name, total in totals.items()}


def vmap_of_grad(case: FisherCase, estimator: Estimator, chunk: int) -> Diagonal:
    """Form per-sample gradients by vectorising the gradient over a chunk of samples."""
    params = {name: param.detach() for name, param in case.model.named_parameters()}
    totals = {name: torch.zeros_like(param) for name, param in params.items()}

    def loss(values: Diagonal, sample: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(case.model, values, (sample[None],))
        return losses(logits, label[None])[0]

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    chosen = Labels(estimator)
    for inputs, data_labels in case.batches:
        logits = None
        if estimator != "empirical":
            with torch.no_grad():
                logits = case.model(inputs)
        for weights, labels in _weighted(estimator, logits, chosen, data_labels):
            chunks = inputs.split(chunk), labels.split(chunk), weights.split(chunk)
            for part, part_labels, part_weights in zip(*chunks, strict=True):
                with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
                    gradients = per_sample(params, part, part_labels)
                for name, grads in gradients.items():
                    add_squares(totals[name], grads, part_weights.tolist())
    return {name: total / case.samples for name, total in totals.items()}


def _weighted(
    estimator: Estimator, logits: Tensor | None, chosen: Labels, labels: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return weights and labels for every sample, as often as the estimator needs."""
    if logits is None:
        return [(torch.ones(len(labels)), labels)]
    if estimator == "sampled":
        return [(torch.ones(len(labels)), chosen.of(logits, labels))]
    columns = enumerate(logits.softmax(-1).unbind(1))
    return [(weights, torch.full_like(labels, c)) for c, weights in columns]
