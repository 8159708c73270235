r"""How far a model has drifted from its old tasks, tensor by tensor: for logs and plots.

The drift of a parameter tensor :math:`\theta` is its distance from the anchor, weighted by Fisher:

.. math:: d(\theta) = \sqrt{\sum_i F_i (\theta_i - a_i)^2}

so that :math:`\frac\lambda2 d^2` is its part of the penalty, and :math:`\frac12 d^2` is, to second
order in the distance and with the Fisher information's diagonal only, the KL divergence in nats
between the model's outputs at the anchor and now, a sample (after one task; summed over tasks after
more). Squares add up: a layer's drift is the root of the sum of its tensors' :math:`d^2`.

Each tensor is read once (12 bytes a float32 parameter, 10 with a bfloat16 Fisher), by the kernel of
:func:`ewc_fast.functional.penalty`, which sums in float64. On a GPU nothing waits: the results are
views of one tensor, and the first read of any is what synchronises. To read all in one transfer:
``dict(zip(parts, torch.stack([*parts.values()]).tolist()))``.

Reference: Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114, equation 3; Martens
2020, https://jmlr.org/papers/v21/17-678.html, section 6, for the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast._springs import ActiveSprings

Springs = Mapping[str, ActiveSprings]
"""Each parameter's spring by its name."""


def drifts(springs: Springs) -> dict[str, Tensor]:
    """Return each parameter's drift, a float64 scalar."""
    if not springs:
        return {}
    return dict(zip(springs, _squared(springs).sqrt(), strict=True))


def penalties(springs: Springs, ewc_lambda: float) -> dict[str, Tensor]:
    """Return each parameter's part of the penalty, a float64 scalar."""
    if not springs:
        return {}
    return dict(zip(springs, 0.5 * ewc_lambda * _squared(springs), strict=True))


def per_layer(parts: Mapping[str, Tensor], *, depth: int = 1) -> dict[str, Tensor]:
    """Add up parts of parameters that share the first ``depth`` components of their names.

    A parameter's own name is no layer: what stands directly in the module that ``depth`` leads to
    counts for that module, and the model's own parameters for ``""``.

    >>> parts = {"a.0.weight": torch.tensor(1.0), "a.1.bias": torch.tensor(2.0)}
    >>> per_layer(parts), per_layer(parts, depth=2)
    ({'a': tensor(3.)}, {'a.0': tensor(1.), 'a.1': tensor(2.)})
    """
    _checks.positive_integer("depth", depth)
    layers: dict[str, list[Tensor]] = {}
    for name, part in parts.items():
        layers.setdefault(".".join(name.split(".")[:-1][:depth]), []).append(part)
    return {layer: torch.stack(members).sum() for layer, members in layers.items()}


@torch.no_grad()
def _squared(springs: Springs) -> Tensor:
    """Return all squared drifts in one tensor: penalties at a strength of 2, whose half is 1."""
    values = [spring.penalty(2.0) for spring in springs.values()]
    return torch.stack([value.to(values[0].device) for value in values])
