"""What a batch is: inputs, perhaps targets, with the samples in dimension 0 of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs for the model's forward pass, and targets if there are any."""

    inputs: Any
    targets: Tensor | None
    size: int

    def samples(self, start: int, stop: int) -> Batch:
        """Return some of the samples, as a batch."""
        stop = min(stop, self.size)
        return Batch(
            inputs=_map_tensors(self.inputs, lambda t: t[start:stop]),
            targets=None if self.targets is None else self.targets[start:stop],
            size=stop - start,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return Batch(
            inputs=_map_tensors(self.inputs, lambda t: t.to(device)),
            targets=None if self.targets is None else self.targets.to(device),
            size=self.size,
        )


def read_batches(
    batches: Iterable[Any], max_samples: int | None, device: torch.device
) -> Iterator[Batch]:
    """Yield non-empty batches on ``device``, the last one cut where ``max_samples`` is reached."""
    left = max_samples
    for index, raw in enumerate(batches):
        batch = _read(raw, f"batches[{index}]")
        if left is not None:
            batch = batch.samples(0, left)
            left -= batch.size
        if batch.size > 0:
            yield batch.to(device)
        if left == 0:
            return


def _read(raw: Any, name: str) -> Batch:
    if isinstance(raw, Mapping):
        inputs: Any = {key: value for key, value in raw.items() if key != "labels"}
        targets = raw.get("labels")
    elif isinstance(raw, Tensor):
        inputs, targets = raw, None
    elif isinstance(raw, (tuple, list)) and len(raw) in (1, 2):
        inputs, targets = raw[0], raw[1] if len(raw) == 2 else None
    else:
        raise TypeError(
            f"{name}: expected (inputs, targets), inputs alone, or a mapping that may have "
            f"'labels', got {type(raw).__name__}"
            + (f" of length {len(raw)}" if isinstance(raw, (tuple, list)) else "")
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"{name}: expected targets to be a tensor, got {type(targets).__name__}")
    sizes: dict[str, int] = {}
    _collect_sizes(inputs, f"{name} inputs", sizes)
    if not sizes:
        raise TypeError(f"{name}: expected at least one input tensor, got none")
    if targets is not None:
        _collect_sizes(targets, f"{name} targets", sizes)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(
            f"{name}: expected the samples in dimension 0 of every tensor, as many in each, "
            f"got {found}"
        )
    return Batch(inputs, targets, next(iter(sizes.values())))


def _collect_sizes(tree: Any, path: str, sizes: dict[str, int]) -> None:
    if isinstance(tree, Tensor):
        if tree.dim() == 0:
            raise ValueError(
                f"{path}: expected a batch dimension, got a tensor without dimensions; "
                "add one with .unsqueeze(0)"
            )
        sizes[path] = tree.shape[0]
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            _collect_sizes(value, f"{path}[{key!r}]", sizes)
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            _collect_sizes(value, f"{path}[{index}]", sizes)


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        changed = [_map_tensors(value, change) for value in tree]
        return type(tree)(*changed) if hasattr(tree, "_fields") else type(tree)(changed)
    return tree


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model the usual way: a mapping by keywords, a sequence by position."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def output_tensor(result: Any) -> Tensor:
    """Return the outputs that the likelihood is over: a tensor, ``.logits``, or the first item."""
    found = getattr(result, "logits", result)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() == 0:
        raise TypeError(
            "the model must return a tensor with the samples in dimension 0 (or an object with "
            f".logits), got {type(result).__name__}; pass forward=lambda model, inputs: ..."
        )
    return found
