r"""Which sample each entry of a gradient belongs to.

A model may flatten samples into rows, put time first, or send rows elsewhere. What tells is the
gradient itself: where the vectors sent backward are scaled by a power of two of each sample's own,
every entry that belongs to one sample scales by exactly that power, whatever was done to the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# Powers of two keep all roundings as they were; 16 of them stay far from over- and underflow.
LABELS_A_PASS = 16


class Layout(Protocol):
    """Where the samples are in tensors that have a dimension in common."""

    @property
    def dim(self) -> int:
        """The dimension that holds them."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def owners(self, size: int, device: torch.device) -> Tensor:
        """Return the sample of each index of the dimension, of some size."""

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the samples in front and two dimensions in place of theirs."""

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return the tensor with 0 for all other samples."""


@dataclass(frozen=True)
class Regular:
    """Samples along one dimension: index = (before * samples + sample) * after + rest.

    The sample comes first within the dimension (``"major"``: rows flattened from batch-first
    data), last (``"minor"``: from time-first data), or between two lengths.
    """

    dim: int
    samples: int
    within: Literal["major", "minor"] | tuple[int, int]

    def lengths(self, size: int) -> tuple[int, int, int]:
        """Return (before, samples, after) for a dimension of some size."""
        rest = size // self.samples
        if self.within == "major":
            return 1, self.samples, rest
        if self.within == "minor":
            return rest, self.samples, 1
        return self.within[0], self.samples, self.within[1]

    def fits(self, shape: torch.Size) -> bool:
        """Whether a tensor of this shape can be laid out so."""
        if self.dim >= len(shape):
            return False
        before, samples, after = self.lengths(shape[self.dim])
        return before * samples * after == shape[self.dim]

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return (samples, *dims before, before, after, *dims behind); a view."""
        lengths = self.lengths(tensor.shape[self.dim])
        return tensor.unflatten(self.dim, lengths).movedim(self.dim + 1, 0)

    def owners(self, size: int, device: torch.device) -> Tensor:
        """Return the sample of each index of a dimension of some size."""
        lengths = self.lengths(size)
        return torch.arange(self.samples, device=device).view(-1, 1).expand(lengths).reshape(-1)

    def explains(self, gradient: Tensor, scaled: Tensor, scales: Tensor) -> bool:
        """Whether each entry was scaled as its sample here was."""
        scale = scales[self.owners(gradient.shape[self.dim], scales.device)]
        behind = gradient.dim() - self.dim - 1
        expected = gradient * scale.view(-1, *[1] * behind).to(gradient)
        return torch.equal(expected, scaled) or _agree(expected, scaled)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return the tensor with 0 for all other samples."""
        alone = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        self.by_sample(alone)[sample] = self.by_sample(tensor)[sample]
        return alone

    def resized(self, samples: int) -> Regular:
        """Return the same layout for another number of samples."""
        return Regular(self.dim, samples, self.within)


class Ragged:
    """Entries along one dimension, each of some sample, in any order and number."""

    def __init__(self, labels: Tensor, samples: int, dim: int) -> None:
        counts = torch.bincount(labels, minlength=samples)
        order = labels.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
        self.dim, self.samples, self._labels = dim, samples, labels
        self._shape = (samples, int(counts.max()) if len(labels) else 0)
        self._target = (labels[order], places)
        self._order = order

    def owners(self, size: int, device: torch.device) -> Tensor:
        """Return the sample of each index of the dimension."""
        return self._labels

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return (samples, *dims before, 1, most entries, *dims behind), filled up with zeros."""
        entries = tensor.movedim(self.dim, 0)
        filled = tensor.new_zeros((*self._shape, *entries.shape[1:]))
        filled[self._target] = entries[self._order]
        return filled.movedim(1, self.dim + 1).unsqueeze(self.dim + 1)

    def only(self, tensor: Tensor, sample: int) -> Tensor:
        """Return the tensor with 0 for all other samples."""
        chosen = (self._labels == sample).view(-1, *[1] * (tensor.dim() - self.dim - 1))
        return torch.where(chosen, tensor, 0)


Found = Regular | Literal["zero", "irregular", "mixed"]


def infer(gradient: Tensor, scaled: Sequence[Tensor], scales: Sequence[Tensor]) -> Found:
    """Return the layout of a gradient, given it again with every sample scaled by its own powers.

    ``"zero"``: nothing to see. ``"irregular"``: each index of some dimension belongs to one sample,
    in no order that could be foretold. ``"mixed"``: several samples contribute to one entry.
    """
    gradient, scaled = _real(gradient), [_real(again) for again in scaled]
    if not any(again.any() for again in scaled):
        return "zero"
    pairs = list(zip(scaled, scales, strict=True))
    for layout in _candidates(gradient.shape, len(scales[0])):
        if all(layout.explains(gradient, again, scale) for again, scale in pairs):
            return layout
    powers = powers_of_two(gradient.device)
    return "mixed" if labels(gradient, scaled, powers) is None else "irregular"


def powers_of_two(device: torch.device) -> Tensor:
    """Return the power for each digit."""
    return torch.exp2(torch.arange(LABELS_A_PASS, dtype=torch.float64)).to(device)


def scaled_by_sample(vector: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each digit of the samples' numbers a vector so scaled, and the scales."""
    powers = powers_of_two(vector.device)
    scales = [powers[digit.to(vector.device)] for digit in digits(len(vector))]
    return [(vector.movedim(0, -1) * s.to(vector)).movedim(-1, 0) for s in scales], scales


def labels(gradient: Tensor, scaled: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, int] | None:
    """Return the sample of each index of a dimension, and which dimension; or ``None``."""
    gradient, scaled = _real(gradient), [_real(again) for again in scaled]
    for dim in range(gradient.dim()):
        found = _labels(gradient.movedim(dim, 0), [s.movedim(dim, 0) for s in scaled], scales)
        if found is not None:
            return found, dim
    return None


def _labels(gradient: Tensor, scaled: list[Tensor], scales: Tensor) -> Tensor | None:
    """Return the label of each index of dimension 0, digit by digit; ``None`` if they are mixed.

    Indices without a gradient are given label 0: nothing depends on it.
    """
    found = torch.zeros(len(gradient), dtype=torch.long, device=gradient.device)
    if gradient.numel() == 0:
        return found
    rows = gradient.reshape(len(gradient), -1).double()
    largest = rows.abs().argmax(1, keepdim=True)
    for again in scaled:
        others = again.reshape(len(gradient), -1).double()
        ratio = (others.gather(1, largest) / rows.gather(1, largest)).nan_to_num(1.0)
        digit = (ratio - scales.to(ratio)).abs().argmin(1)
        if not _agree(rows * scales.to(rows)[digit, None], others):
            return None
        found = found * len(scales) + digit
    return found


def digits(samples: int) -> Tensor:
    """Return the digits of each sample's number to base 16, (places, samples), highest first."""
    places = max(1, (max(samples - 1, 1).bit_length() + 3) // 4)
    number = torch.arange(samples)
    return torch.stack([(number >> 4 * place) % LABELS_A_PASS for place in range(places)][::-1])


def _candidates(shape: torch.Size, samples: int) -> list[Regular]:
    found: list[Regular] = []
    for dim, size in enumerate(shape):
        if size and size % samples == 0:
            rest = size // samples
            found.append(Regular(dim, samples, "major"))
            if rest > 1:
                found.append(Regular(dim, samples, "minor"))
                between = [b for b in range(2, rest) if rest % b == 0]
                found += [Regular(dim, samples, (b, rest // b)) for b in between]
    return sorted(found, key=lambda layout: shape[layout.dim] != samples)


def _real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs, in a last dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients are equal but for orders of summation; a wrong power is a factor 2."""
    slack = 1e-6 * expected.abs().amax()
    return bool(((found - expected).abs() <= 0.01 * expected.abs() + slack).all())
