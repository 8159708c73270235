"""Which classes are possible: indices or masks, for all samples or for each."""

from __future__ import annotations

import torch
from torch import Tensor


def as_tensor(classes: object) -> Tensor:
    """Return indices or a mask as a tensor."""
    try:
        found = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "classes: expected indices, a mask, or a function of the batch that returns one, got "
            f"{type(classes).__name__}"
        ) from None
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"classes: expected integers or a mask of bool, got {found.dtype}")
    return found


def check_choice(classes: Tensor, samples: int | None = None) -> None:
    """Raise unless classes are left to choose from.

    A mask for each sample must leave one, and be of this batch of ``samples``.
    """
    each = classes.dim() == 2 and classes.dtype == torch.bool and len(classes) == samples
    if classes.dim() != 1 and not each:
        batch = "(N, C)" if samples is None else f"({samples}, C)"
        raise ValueError(
            "classes: expected indices, or a mask of shape (C,), or a function of the batch that "
            f"returns such or a mask of shape {batch}, got {classes.dtype} of shape "
            f"{tuple(classes.shape)}"
        )
    if each:
        if not classes.any(1).all():
            none = int((~classes.any(1)).nonzero()[0])
            raise ValueError(f"classes: expected one or more for each sample, got none for {none}")
        return
    indices = classes.nonzero() if classes.dtype == torch.bool else classes
    if indices.unique().numel() != indices.numel() or indices.numel() < 2 or (indices < 0).any():
        raise ValueError(
            f"classes: expected two or more different classes >= 0, got {classes.tolist()}"
        )


def mask_of(classes: Tensor, outputs: Tensor, dim: int) -> Tensor:
    """Return the mask of possible classes on the outputs' device, (1, C) or (N, C)."""
    count = outputs.shape[dim]
    if classes.dtype != torch.bool:
        if int(classes.max()) >= count:
            raise ValueError(
                f"classes: expected indices below {count}, the size of dimension {dim} of the "
                f"outputs, got {int(classes.max())}"
            )
        mask = torch.zeros(1, count, dtype=torch.bool)
        mask[0, classes.cpu()] = True
        return mask.to(outputs.device)
    if classes.shape[-1] != count or (classes.dim() == 2 and len(classes) != len(outputs)):
        raise ValueError(
            f"classes: expected a mask of shape ({count},) or ({len(outputs)}, {count}) for "
            f"outputs of shape {tuple(outputs.shape)}, got {tuple(classes.shape)}"
        )
    return classes.view(-1, count).to(outputs.device)
