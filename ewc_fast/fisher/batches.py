"""What a batch is: inputs, perhaps targets and weights, samples in dimension 0 of every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TARGETS, WEIGHTS = "labels", "sample_weight"  # keys of a mapping that are not passed to the model


@dataclass(frozen=True)
class Batch:
    """Inputs for the model's forward pass; targets and weights, shape (size,), if there are any."""

    inputs: Any
    targets: Tensor | None
    weights: Tensor | None
    size: int

    def samples(self, start: int, stop: int) -> Batch:
        """Return some of the samples, as a batch."""
        stop = min(stop, self.size)
        return self._changed(lambda t: t[start:stop], stop - start)

    def parts(self, count: int) -> Iterator[Batch]:
        """Yield the samples in parts of about the same size."""
        for part in range(count):
            yield self.samples(part * self.size // count, (part + 1) * self.size // count)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return self._changed(lambda t: t.to(device), self.size)

    def _changed(self, change: Callable[[Tensor], Tensor], size: int) -> Batch:
        return Batch(
            inputs=_map_tensors(self.inputs, change),
            targets=None if self.targets is None else change(self.targets),
            weights=None if self.weights is None else change(self.weights),
            size=size,
        )


def read_batches(
    batches: Iterable[Any], max_samples: int | None, device: torch.device
) -> Iterator[Batch]:
    """Yield non-empty batches on ``device``, the last one cut where ``max_samples`` is reached.

    A batch is ``(inputs,)``, ``(inputs, targets)``, ``(inputs, targets, weights)``, a tensor of
    inputs, or a mapping of inputs that may have ``"labels"`` and ``"sample_weight"``. So a tuple of
    two tensors is always inputs and targets: two inputs without targets are ``((x1, x2),)``.
    """
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


def with_progress(
    read: Iterable[Batch], batches: Iterable[Any], max_samples: int | None
) -> Iterator[Batch]:
    """Pass on what is read from ``batches``, and show how far that is.

    Samples are counted up to ``max_samples``; without it batches, up to their number if known.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    total, unit = max_samples, "sample"
    if total is None:
        total, unit = len(batches) if isinstance(batches, Sized) else None, "batch"
    with tqdm(total=total, desc="Fisher", unit=unit) as bar:
        for batch in read:
            yield batch
            bar.update(batch.size if unit == "sample" else 1)


def _read(raw: Any, name: str) -> Batch:
    inputs, targets, weights = _parts(raw, name)
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
    size = next(iter(sizes.values()))
    if weights is not None:
        _check_weights(weights, size, f"{name} weights")
    return Batch(inputs, targets, weights, size)


def _parts(raw: Any, name: str) -> tuple[Any, Any, Any]:
    """Return inputs, targets and weights."""
    if isinstance(raw, Mapping):
        inputs = {key: value for key, value in raw.items() if key not in (TARGETS, WEIGHTS)}
        return inputs, raw.get(TARGETS), raw.get(WEIGHTS)
    if isinstance(raw, Tensor):
        return raw, None, None
    if isinstance(raw, (tuple, list)) and len(raw) in (1, 2, 3) and not hasattr(raw, "_fields"):
        return (*raw, None, None)[:3]
    raise TypeError(
        f"{name}: expected (inputs, targets), (inputs, targets, weights), inputs alone, or a "
        f"mapping that may have {TARGETS!r} and {WEIGHTS!r}, got {_described(raw)}"
    )


def _described(raw: Any) -> str:
    kind = type(raw).__name__
    if hasattr(raw, "_fields"):
        names = tuple(raw._fields)
    elif dataclasses.is_dataclass(raw):
        names = tuple(field.name for field in dataclasses.fields(raw))
    elif isinstance(raw, (tuple, list)):
        return f"{kind} of length {len(raw)}"
    else:
        return kind
    return (
        f"{kind} with the fields {', '.join(names)}, of which nothing says what they are; yield "
        f"(batch.<inputs>, batch.<targets>), or a mapping with the key {TARGETS!r}"
    )


def _check_weights(weights: Any, size: int, name: str) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weights).__name__}")
    if weights.shape != (size,):
        raise ValueError(
            f"{name}: expected one for each sample, shape ({size},), got shape "
            f"{tuple(weights.shape)}; several inputs go in one tuple, ((x1, x2), targets)"
        )
    if weights.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {weights.dtype}")
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        raise ValueError(
            f"{name}: expected finite numbers >= 0, got {weights[wrong][0].item()!r} for sample "
            f"{int(wrong.nonzero()[0])}"
        )


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


def run_model(
    forward: Callable[[Any, Any], Any], model: Callable[..., Any], batch: Batch
) -> Tensor:
    """Return the outputs for a batch; samples must be in dimension 0 of them."""
    outputs = output_tensor(forward(model, batch.inputs))
    if outputs.shape[0] != batch.size:
        raise ValueError(
            f"outputs: expected {batch.size} samples in dimension 0 like the inputs, got "
            f"shape {tuple(outputs.shape)}"
        )
    return outputs
