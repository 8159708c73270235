"""State that stays in the host's memory, and comes to the parameters' device ahead of its use.

Where that is a GPU, the state is pinned and a side stream copies the next piece while the present
one is applied, into one of two lanes of memory::

    side stream   fill lane 0 | fill lane 1 |           fill lane 0 | ...
    main stream               | use lane 0              | use lane 1 | ...

A step must bring 4 bytes a parameter for the anchor and 4, 2 or 1 for the Fisher over the bus,
which takes far longer than the penalty itself: use it where the state would not fit otherwise. On a
CPU the same code makes plain copies, and gains nothing. A step like this can't be captured in a
CUDA graph: it waits for events of the step before. No GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ewc_fast._dispatch import Impl
from ewc_fast._piecewise import Piece, PiecewiseSprings
from ewc_fast._springs import Spring

_ALIGNMENT = 256  # bytes


class _Lane:
    """Memory for one piece on a device, and when it was filled and last used."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy dense tensors here, one behind the other, their strides kept."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if self.memory.numel() < end:
            self.memory = torch.empty(end, dtype=torch.uint8, device=self.memory.device)
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            bytes_ = self.memory[start : start + tensor.numel() * tensor.element_size()]
            copy = bytes_.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            copies.append(copy.copy_(tensor, non_blocking=True))
        return copies


class Prefetch:
    """Copies lists of tensors to a device, always one list ahead of its use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes = [_Lane(device), _Lane(device)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, lists: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Yield the copies of each list, good until the next one is asked for."""
        waiting: tuple[_Lane, list[Tensor]] | None = None
        for number, tensors in enumerate(lists):
            lane = self._lanes[number % 2]
            copies = self._fill(lane, tensors)
            if waiting is not None:
                yield from self._hand_out(*waiting)
            waiting = lane, copies
        if waiting is not None:
            yield from self._hand_out(*waiting)

    def _fill(self, lane: _Lane, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._stream is None:
            return lane.take(tensors)
        user = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(lane.used)  # at once, where it was never recorded
            copies = lane.take(tensors)
            lane.filled.record(self._stream)
        lane.memory.record_stream(user)  # whose work must be done before it is freed
        return copies

    def _hand_out(self, lane: _Lane, copies: list[Tensor]) -> Iterator[list[Tensor]]:
        if self._stream is None:
            yield copies
            return
        user = torch.cuda.current_stream(self._device)
        user.wait_event(lane.filled)
        try:
            yield copies
        finally:
            lane.used.record(user)


class OffloadedSprings(PiecewiseSprings):
    """Springs in the host's memory, in any format."""

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        super().__init__(params, springs, impl)
        self._prefetch = {
            device: Prefetch(device) for device in dict.fromkeys(p.device for p in params)
        }

    def _brought(self, device: torch.device, pieces: Sequence[Piece]) -> Iterator[list[Spring]]:
        prefetch = self._prefetch[device]
        lists = [[t for s in piece.springs for t in _read(s)] for piece in pieces]
        for piece, copies in zip(pieces, prefetch(lists), strict=True):
            left = iter(copies)
            springs = []
            for spring in piece.springs:
                scales = None if spring.scales is None else next(left)
                springs.append(replace(spring, fisher=next(left), anchor=next(left), scales=scales))
            yield springs


def _read(spring: Spring) -> list[Tensor]:
    """Return what a step reads: all but the residual."""
    read = [spring.fisher, spring.anchor]
    return read if spring.scales is None else [spring.scales, *read]
