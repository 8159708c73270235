"""One output layer for several tasks: training and accuracy where only some outputs are allowed.

``allowed`` is a mask over the outputs, shape (C,), or one for each image, (N, C). The softmax is
over allowed outputs: the logits of the others count as minus infinity, and have no gradient.
``ewc_fast.fisher.Categorical(classes=allowed)`` is the likelihood that fits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .mnist import Images


def mask(classes: range, outputs: int) -> Tensor:
    """Return the mask that allows these of so many outputs."""
    allowed = torch.zeros(outputs, dtype=torch.bool)
    allowed[list(classes)] = True
    return allowed


def train_steps(
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    allowed: Tensor,
    order: torch.Generator,
    *,
    steps: int,
    batch: int,
) -> None:
    """Take so many steps, each on a minibatch drawn from ``order``, with replacement."""
    for rows in torch.randint(len(images), (steps, batch), generator=order):
        optimizer.zero_grad()
        logits = model(images.pixels[rows])
        cross_entropy(_masked(logits, allowed, rows), images.digits[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, allowed: Tensor) -> float:
    """Return the share of images recognised, in percent, with a choice of the allowed outputs."""
    predicted = _masked(model(images.pixels), allowed, slice(None)).argmax(dim=1)
    return 100 * (predicted == images.digits).double().mean().item()


def _masked(logits: Tensor, allowed: Tensor, rows: Tensor | slice) -> Tensor:
    return logits.masked_fill(~(allowed if allowed.dim() == 1 else allowed[rows]), -torch.inf)
