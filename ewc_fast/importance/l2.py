"""Uniform importance: every parameter is worth as much as any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype


def uniform_importance(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return 1 for every parameter that is not frozen, by name, in float32 (or float64).

    The baseline "L2" of Kirkpatrick et al. 2017 (figure 2A). With it the penalty after T tasks is

    .. math:: \frac\lambda2 \sum_t \|\theta - \theta_t\|^2
        = \frac{\lambda T}{2} \Big\|\theta - \frac1T \sum_t \theta_t\Big\|^2 + \text{const}

    for ``EWC(anchor="merged")``: the anchor is the mean of the tasks' solutions, the importance T.
    With ``anchor="latest"`` the importance is T too, and the anchor the last solution.

    >>> model = torch.nn.Linear(2, 1)
    >>> uniform_importance(dict(model.named_parameters()))
    {'weight': tensor([[1., 1.]]), 'bias': tensor([1.])}
    """
    return {
        name: torch.ones_like(param, dtype=state_dtype(param.dtype), requires_grad=False)
        for name, param in params.items()
        if param.requires_grad
    }
