"""The network: one for all tasks, but for biases and gains of each task's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .worlds import Suite


class OfTask(nn.Module):
    r"""A layer with biases and gains for each task c (Kirkpatrick et al. 2017, supplement).

    .. math:: y_i = \left(\sum_j W_{ij} x_j + b_i^c\right) g_i^c

    with :math:`b^c = 0` and :math:`g^c = 1` at first. For a convolution i is a channel.
    """

    def __init__(self, weights: nn.Conv2d | nn.Linear, tasks: int) -> None:
        super().__init__()
        self.weights = weights
        width = weights.weight.shape[0]
        shape = (width, 1, 1) if isinstance(weights, nn.Conv2d) else (width,)
        self.biases = nn.ParameterList(torch.zeros(shape) for _ in range(tasks))
        self.gains = nn.ParameterList(torch.ones(shape) for _ in range(tasks))

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Return y, the layer's outputs before the nonlinearity."""
        return (self.weights(x) + self.biases[task]) * self.gains[task]


class QNetwork(nn.Module):
    """Values of all actions, (N, actions), of frames (N, channels, height, width) in a task."""

    def __init__(self, suite: Suite, tasks: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convolutions, hidden = _layers(suite)
            self.convolutions = nn.ModuleList(OfTask(layer, tasks) for layer in convolutions)
            self.hidden = OfTask(hidden, tasks)
            self.values = OfTask(nn.Linear(hidden.out_features, suite.actions, bias=False), tasks)
        self._scale = suite.scale

    def forward(self, frames: Tensor, task: int) -> Tensor:
        """Return the value of each action."""
        x = frames.float() * self._scale
        for layer in self.convolutions:
            x = relu(layer(x, task))
        return self.values(relu(self.hidden(x.flatten(1), task)), task)


def _layers(suite: Suite) -> tuple[Sequence[nn.Conv2d], nn.Linear]:
    """Return the layers below the values: half of Young and Tian's for MinAtar, or the paper's."""
    channels = suite.frame[0]
    if suite.name == "minatar":
        small = [nn.Conv2d(channels, 16, 3, bias=False)]
        return small, nn.Linear(16 * 8 * 8, 64, bias=False)
    large = [
        nn.Conv2d(channels, 32, 8, stride=4, bias=False),
        nn.Conv2d(32, 64, 4, stride=2, bias=False),
        nn.Conv2d(64, 128, 3, bias=False),
    ]
    return large, nn.Linear(128 * 7 * 7, 1024, bias=False)
