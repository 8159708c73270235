"""Where a call's tensors are: the table that the kernels read, kept on the device between calls.

The i-th tensors of all lists are a row. A launch takes the rows of one combination of dtypes; in
the table each row has a record, and each chunk of it an entry that names both. The records are
copied to the device when an address has changed, from pinned memory and without waiting; all else
depends on shapes alone. A launch with one row needs no table, as its addresses are arguments. While
a CUDA graph is captured nothing is copied: rows that are not on the device are launched one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ewc_fast._checks import Operation, TensorList

CHUNK = 16384
"""Elements that one program works on."""

OPERANDS = 5
"""Addresses in a record; operations with fewer repeat one, which nobody reads."""

STEP_OPERANDS = 10
"""The same for optimizers' steps, whose operands have places of their own (csrc/optimizer.h)."""

NUMEL, SAMPLES, SAMPLE_STRIDE, ORDINAL, ALIGNED, FIRST_ADDRESS = range(6)
"""Columns of a record before the addresses, and where these begin."""

COLUMNS = FIRST_ADDRESS + OPERANDS
STEP_COLUMNS = FIRST_ADDRESS + STEP_OPERANDS
"""Columns of a record."""


class Row(NamedTuple):
    """What is known of a row but its addresses."""

    numel: int
    samples: int  # per-sample gradients stacked in front
    sample_stride: int  # elements from one sample's gradient to the next
    ordinal: int  # its place in the call's lists, which may be split up


@dataclass(frozen=True)
class Launch:
    """Rows whose operands have the same dtypes."""

    dtypes: tuple[torch.dtype, ...]
    rows: list[int]  # places in the table
    first_chunk: int
    chunks: int

    @property
    def vector(self) -> int:
        """Elements that a thread moves at once: 16 bytes of the widest dtype up to 8 bytes."""
        return 2 if torch.float64 in self.dtypes else 4


class Table:
    """The rows of one call: their shapes for good, their addresses until they change.

    A CUDA graph reads the table at each replay: what one was captured with is never written again,
    and stays in ``read_by_graphs``.
    """

    def __init__(
        self, operation: Operation, lists: Sequence[TensorList], ordinals: Sequence[int]
    ) -> None:
        self.device: torch.device | None = lists[0][0].device if lists[0] else None
        self.read_by_graphs: list[Tensor] = []
        self._stacked = [operand.stacked for operand in operation.operands]
        self._are_counts = [operand.role == "count" for operand in operation.operands]
        self._slots = [operand.slot for operand in operation.operands]
        tensors = list(zip(*lists, strict=True))
        self.rows = [self._row(*row) for row in zip(tensors, ordinals, strict=True)]
        self.launches = self._split(tensors)
        self.chunks = sum(launch.chunks for launch in self.launches)
        self._addresses: list[list[int]] = []
        self._aligned: dict[int, int] = {}
        self._records: Tensor | None = None
        self._entries: Tensor | None = None
        self._is_current = False  # whether the records on the device have the latest addresses
        self._is_read_by_graph = False
        self.take([[t.data_ptr() for t in row] for row in tensors])

    def take(self, addresses: list[list[int]]) -> None:
        """Take over the addresses of each row's operands."""
        self._addresses = addresses
        self._aligned = {
            i: self._is_aligned(i, launch) for launch in self.launches for i in launch.rows
        }
        self._is_current = False

    def on_device(self) -> tuple[Tensor, Tensor] | None:
        """Return records and the chunks' entries; None where they can't be copied now."""
        assert self.device is not None
        capturing = _capturing(self.device)
        if not self._is_current:
            if capturing:
                return None
            self._copy_records(self.device)
        assert self._records is not None
        assert self._entries is not None
        if capturing and not self._is_read_by_graph:
            self._is_read_by_graph = True
            self.read_by_graphs += [self._records, self._entries]
        return self._records, self._entries

    def one_by_one(self, launch: Launch) -> Iterator[Launch]:
        """Split a launch into one for each row."""
        first = launch.first_chunk
        for row in launch.rows:
            chunks = _chunks_of(self.rows[row])
            yield Launch(launch.dtypes, [row], first, chunks)
            first += chunks

    def only_row(self, launch: Launch) -> tuple[list[int], Row, int]:
        """Return addresses and shape of a launch's one row, and whether it is aligned (1 or 0)."""
        (row,) = launch.rows
        return self.placed(row), self.rows[row], self._aligned[row]

    def _row(self, tensors: Sequence[Tensor], ordinal: int) -> Row:
        single = tensors[self._stacked.index(False)]
        for tensor, stacked in zip(tensors, self._stacked, strict=True):
            if stacked and tensor.dim() == single.dim() + 1:
                return Row(single.numel(), tensor.shape[0], tensor.stride(0), ordinal)
        return Row(single.numel(), 1, 0, ordinal)

    def _split(self, tensors: Sequence[Sequence[Tensor]]) -> list[Launch]:
        """Return the launches: one for each combination of dtypes."""
        kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
        for i, row in enumerate(tensors):
            if self.rows[i].numel * self.rows[i].samples > 0:
                kinds.setdefault(tuple(t.dtype for t in row), []).append(i)
        launches: list[Launch] = []
        first = 0
        for dtypes, rows in kinds.items():
            chunks = sum(_chunks_of(self.rows[i]) for i in rows)
            launches.append(Launch(dtypes, rows, first, chunks))
            first += chunks
        return launches

    def _copy_records(self, device: torch.device) -> None:
        records = torch.tensor([self._record(i) for i in range(len(self.rows))], dtype=torch.int64)
        if self._entries is None:
            self._entries = _upload(self._entries_of_chunks(), device)
        if self._records is None or self._is_read_by_graph:
            self._records, self._is_read_by_graph = _upload(records, device), False
        else:
            self._records.copy_(_staged(records, device), non_blocking=True)
        self._is_current = True

    def _entries_of_chunks(self) -> Tensor:
        """Return which chunk of which row each program works on."""
        return torch.cat(
            [
                torch.arange(_chunks_of(self.rows[i])) + (i << 32)
                for launch in self.launches
                for i in launch.rows
            ]
        )

    def _record(self, row: int) -> list[int]:
        return [*self.rows[row], self._aligned.get(row, 0), *self.placed(row)]

    def placed(self, row: int) -> list[int]:
        """Return a row's addresses where kernels look for them, with its first in the gaps."""
        first = self._addresses[row][:1]
        if self._slots[0] is None:
            return self._addresses[row] + first * (OPERANDS - len(self._slots))
        placed = first * STEP_OPERANDS
        for slot, address in zip(self._slots, self._addresses[row], strict=True):
            assert slot is not None
            placed[slot] = address
        return placed

    def _is_aligned(self, row: int, launch: Launch) -> int:
        """Whether threads can move whole vectors of every operand: 1 or 0."""
        vector = launch.vector
        starts = zip(self._addresses[row], launch.dtypes, self._are_counts, strict=True)
        return int(
            all(a % (vector * dtype.itemsize) == 0 or is_count for a, dtype, is_count in starts)
            and self.rows[row].sample_stride % vector == 0
        )


def _chunks_of(row: Row) -> int:
    return -(-row.numel // CHUNK)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _staged(values: Tensor, device: torch.device) -> Tensor:
    """Return the values in pinned memory: new each time, as an earlier copy may still be read."""
    return values if device.type == "cpu" else values.pin_memory()


def _upload(values: Tensor, device: torch.device) -> Tensor:
    return _staged(values, device).to(device, non_blocking=True)
