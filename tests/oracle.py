"""The Fisher diagonal as its definition reads: one sample at a time, one label at a time.

.. math:: F_i = 1/N sum_n E_y [ (d log p(y | x_n) / d theta_i)^2 ]

Slow, in float64, and without a line of the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = Iterable[tuple[Any, Tensor]]
Forward = Callable[[nn.Module, Any], Tensor]

IGNORED = -100  # cross_entropy's label of positions that do not count


def fisher(
    model: nn.Module,
    data: Data,
    likelihood: str = "categorical",
    estimator: str = "exact",
    dtype: torch.dtype = torch.float64,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Return the Fisher diagonal by name.

    ``estimator="exact"`` takes the expectation over the model's own labels; ``"empirical"`` takes
    the labels in ``data``, whoever drew them. ``forward(model, inputs)`` stands in for the usual
    call of the model.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model = copy.deepcopy(getattr(model, "_orig_mod", model)).to(dtype).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    samples = 0
    for inputs, targets in data:
        for n in range(len(targets)):
            sample = _change(inputs, lambda t, n=n: _cast(t[n : n + 1], dtype))
            outputs = (forward or _outputs)(model, sample)
            for weight, term in TERMS[likelihood, estimator](outputs, targets[n : n + 1]):
                model.zero_grad()
                # Not autograd.grad, which reentrant checkpointing does not support.
                term.backward(retain_graph=True)
                for sum_, param in zip(total, params, strict=True):
                    if param.grad is not None:
                        sum_ += weight * param.grad.double().square()
            samples += 1
    return {name: sum_ / samples for name, sum_ in zip(names, total, strict=True)}


Terms = Iterable[tuple[float, Tensor]]


def _categorical_exact(z: Tensor, _: Tensor) -> Terms:
    """Each class of each position, weighted by its probability: other positions cancel out."""
    log_p = F.log_softmax(z, dim=1)[0]
    for log_p_here in log_p.reshape(len(log_p), -1).unbind(1):
        for term in log_p_here:
            yield term.detach().double().exp().item(), term


def _categorical_empirical(z: Tensor, y: Tensor) -> Terms:
    log_p, counts = F.log_softmax(z, dim=1), y != IGNORED
    yield 1.0, log_p.gather(1, (y * counts).unsqueeze(1)).squeeze(1)[counts].sum()


def _bernoulli_exact(z: Tensor, _: Tensor) -> Terms:
    """E (y - p)^2 = p (1 - p); labels of one sample are independent."""
    for logit in z[0].flatten():
        p = logit.detach().double()
        yield (p.sigmoid() * (-p).sigmoid()).item(), logit


def _bernoulli_empirical(z: Tensor, y: Tensor) -> Terms:
    yield 1.0, (F.logsigmoid(z) * y + F.logsigmoid(-z) * (1 - y)).sum()


def _gaussian_exact(z: Tensor, _: Tensor) -> Terms:
    """E (y - mean)^2 = 1."""
    for mean in z[0].flatten():
        yield 1.0, mean


def _gaussian_empirical(z: Tensor, y: Tensor) -> Terms:
    yield 1.0, -((y.to(z.dtype) - z) ** 2).sum() / 2


TERMS: dict[tuple[str, str], Callable[[Tensor, Tensor], Terms]] = {
    ("categorical", "exact"): _categorical_exact,
    ("categorical", "empirical"): _categorical_empirical,
    ("bernoulli", "exact"): _bernoulli_exact,
    ("bernoulli", "empirical"): _bernoulli_empirical,
    ("gaussian", "exact"): _gaussian_exact,
    ("gaussian", "empirical"): _gaussian_empirical,
}


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        result = model(**inputs)
    elif isinstance(inputs, tuple):
        result = model(*inputs)
    else:
        result = model(inputs)
    return result if isinstance(result, Tensor) else result.logits


def _change(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, dict):
        return {key: change(value) for key, value in tree.items()}
    return tuple(map(change, tree)) if isinstance(tree, tuple) else change(tree)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def assert_fisher(
    found: Mapping[str, Tensor],
    model: nn.Module,
    data: Data,
    likelihood: str = "categorical",
    estimator: str = "exact",
) -> None:
    """Assert that a Fisher diagonal is right for the model in its own dtype.

    Allowed for each parameter: four times what this very oracle loses when its passes run in the
    model's dtype (other orders of summation lose other roundings), and 64 roundings of the largest
    entry: 32 for the products on a path through a model of the tests, squared.
    """
    params = dict(model.named_parameters())
    exact = fisher(model, data, likelihood, estimator)
    dtype = next(iter(params.values())).dtype
    low = fisher(model, data, likelihood, estimator, dtype)
    assert list(found) == list(exact)
    for name, values in found.items():
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert values.shape == params[name].shape, name
        assert not values.requires_grad, name
        assert (values >= 0).all(), name  # false for NaN
        if values.numel() == 0:
            continue
        lost = (low[name] - exact[name]).abs().max().item()
        roundings = 64 * torch.finfo(dtype).eps / 2 * exact[name].max().item()
        error = (values.double() - exact[name]).abs().max().item()
        assert error <= 4 * lost + roundings, f"{name}: off by {error:g} of {exact[name].max():g}"
