"""Fisher diagonals without ewc_fast: by loops, by torch.func, by BackPACK, by nngeometry."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fisher_case import Diagonal, Estimator, FisherCase, Labels
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Call = Callable[[], Diagonal]

CHUNK = 16  # samples whose gradients vmap holds at once; all 256 take 500 MB and twice the time


def rivals(case: FisherCase, estimator: Estimator, *, slow: bool) -> dict[str, Call]:
    """Return what is installed; ``slow`` adds those that take samples one by one."""
    found: dict[str, Call] = {}
    if slow:
        found["one sample at a time"] = lambda: one_sample_at_a_time(case, estimator)
        found["torch.func, vmap of grad"] = lambda: vmap_of_grad(case, estimator)
    if importlib.util.find_spec("backpack"):
        found["BackPACK"] = backpack(case, estimator)
    if importlib.util.find_spec("nngeometry"):
        found["nngeometry"] = nngeometry(case, estimator)
    return found


def one_sample_at_a_time(case: FisherCase, estimator: Estimator) -> Diagonal:
    """Take a batch of one sample after another, with a backward pass for each label."""
    params = dict(case.model.named_parameters())
    totals = {name: torch.zeros_like(param.detach()) for name, param in params.items()}
    chosen, samples = Labels(estimator), 0
    for inputs, data_labels in case.batches:
        labels = chosen.of(case.model(inputs), data_labels).tolist()
        for sample, label in zip(inputs.split(1), labels, strict=True):
            log_probs = case.model(sample)[0].log_softmax(-1)
            for c in range(len(log_probs)) if estimator == "exact" else [label]:
                weight = log_probs[c].exp().item() if estimator == "exact" else 1.0
                grads = torch.autograd.grad(log_probs[c], list(params.values()), retain_graph=True)
                for total, g in zip(totals.values(), grads, strict=True):
                    total.addcmul_(g, g, value=weight)
        samples += len(inputs)
    return {name: total / samples for name, total in totals.items()}


def vmap_of_grad(case: FisherCase, estimator: Estimator) -> Diagonal:
    """Form per-sample gradients by vectorising the gradient over a chunk of samples."""
    params = {name: param.detach() for name, param in case.model.named_parameters()}
    totals = {name: torch.zeros_like(param) for name, param in params.items()}

    def log_prob(values: Diagonal, sample: Tensor, label: Tensor) -> Tensor:
        return -F.cross_entropy(functional_call(case.model, values, (sample,)), label)

    per_sample = vmap(grad(log_prob), in_dims=(None, 0, 0))
    chosen, samples = Labels(estimator), 0
    for inputs, data_labels in case.batches:
        with torch.no_grad():
            logits = case.model(inputs)
        for weights, labels in _weighted(estimator, logits, chosen.of(logits, data_labels)):
            chunks = inputs.split(CHUNK), labels.split(CHUNK), weights.split(CHUNK)
            for chunk, chunk_labels, chunk_weights in zip(*chunks, strict=True):
                for name, grads in per_sample(params, chunk, chunk_labels).items():
                    totals[name] += torch.einsum("n...,n...,n->...", grads, grads, chunk_weights)
        samples += len(inputs)
    return {name: total / samples for name, total in totals.items()}


def _weighted(estimator: Estimator, logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weights and labels for every sample, as often as the estimator needs."""
    if estimator != "exact":
        return [(torch.ones(len(labels)), labels)]
    columns = enumerate(logits.softmax(-1).unbind(1))
    return [(weights, torch.full_like(labels, c)) for c, weights in columns]


def backpack(case: FisherCase, estimator: Estimator) -> Call:
    """Return BackPACK's: the generalised Gauss-Newton diagonal where exact, else squares."""
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import DiagGGNExact, SumGradSquared

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    model = extend(copy.deepcopy(case.model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    extension = DiagGGNExact() if estimator == "exact" else SumGradSquared()
    field = "diag_ggn_exact" if estimator == "exact" else "sum_grad_squared"

    def call() -> Diagonal:
        totals: Diagonal = {}
        chosen, samples = Labels(estimator), 0
        for inputs, data_labels in case.batches:
            model.zero_grad()
            logits = model(inputs)
            with recording(extension):
                loss(logits, chosen.of(logits, data_labels)).backward()
            for name, param in model.named_parameters():
                totals[name] = totals.get(name, 0) + getattr(param, field)
            samples += len(inputs)
        return {name: total / samples for name, total in totals.items()}

    return call


def nngeometry(case: FisherCase, estimator: Estimator) -> Call:
    """Return nngeometry's diagonal, over batches made beforehand."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader

    model = copy.deepcopy(case.model)
    batches: Any = [(inputs.clone(), labels) for inputs, labels in case.batches]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    samples = sum(len(inputs) for inputs, _ in case.batches)
    shapes = {name: param.shape for name, param in model.named_parameters()}

    def matrix() -> Any:
        if estimator == "exact":
            return FIM(model, loader, PMatDiag)
        chosen = Labels(estimator)

        def log_prob(inputs: Tensor, data_labels: Tensor) -> Tensor:
            logits = model(inputs)
            return logits.log_softmax(-1).gather(1, chosen.of(logits, data_labels)[:, None])

        return PMatDiag(TorchHooksJacobianBackend(model, log_prob), examples=loader)

    def call() -> Diagonal:
        # Given a loader of whole batches, it divides by their number.
        diagonal = matrix().get_diag() * (len(batches) / samples)
        parts = diagonal.split([shape.numel() for shape in shapes.values()])
        return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}

    return call
