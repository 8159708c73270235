"""Sequences of tasks made of one set of digits: a few classes each, or the pixels permuted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from . import mnist
from .mnist import CLASSES, Images, Mnist


@cache
def five_thousand() -> Mnist:
    """Return the 5,000 images, read once for all trainings of a process."""
    return mnist.five_thousand()


def split(digits: Mnist, classes: int, seed: int) -> list[Mnist]:
    """Return tasks of so many digits each, which ones by the seed; labels are 0 to classes - 1."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    return [_each_part(digits, partial(_only, digits=some)) for some in order.split(classes)]


def permuted(digits: Mnist, tasks: int, seed: int) -> list[Mnist]:
    """Return tasks of all digits, in each of which the pixels have another order, by the seed."""
    draw = torch.Generator().manual_seed(seed)
    pixels = digits.train.pixels.shape[1]
    orders = [torch.randperm(pixels, generator=draw) for _ in range(tasks)]
    return [_each_part(digits, partial(_reordered, order=order)) for order in orders]


def relabelled(task: Mnist, first: int) -> Mnist:
    """Return the task with ``first`` added to its labels: the outputs that stand for them."""
    return _each_part(task, lambda part: Images(part.pixels, part.digits + first))


def joined(parts: list[Images]) -> Images:
    """Return the images of several tasks as one set."""
    return Images(
        torch.cat([part.pixels for part in parts]), torch.cat([part.digits for part in parts])
    )


def _only(part: Images, digits: Tensor) -> Images:
    """Return the images of these digits, labelled by their position among them."""
    is_label = part.digits[:, None] == digits
    rows = is_label.any(dim=1)
    return Images(part.pixels[rows], is_label[rows].long().argmax(dim=1))


def _reordered(part: Images, order: Tensor) -> Images:
    return Images(part.pixels[:, order], part.digits)


def _each_part(task: Mnist, change: Callable[[Images], Images]) -> Mnist:
    return replace(
        task,
        train=change(task.train),
        validation=change(task.validation),
        test=change(task.test),
    )
