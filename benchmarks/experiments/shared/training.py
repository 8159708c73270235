"""Networks and training as the paper has them: multilayer perceptrons, ReLU, minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .mnist import Images

BATCH = 100


def perceptron(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Return a network of layers this wide, input and output included, its weights by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    order: torch.Generator,
    batch: int = BATCH,
) -> None:
    """Take one step for each minibatch, in an order drawn from ``order``."""
    for rows in torch.randperm(len(images), generator=order).split(batch):
        optimizer.zero_grad()
        cross_entropy(model(images.pixels[rows]), images.digits[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images recognised, in percent, without dropout."""
    training = model.training
    predicted = model.eval()(images.pixels).argmax(dim=1)
    model.train(training)
    return 100 * (predicted == images.digits).double().mean().item()
