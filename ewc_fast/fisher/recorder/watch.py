"""What the autograd graph does not tell about a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ewc_fast.fisher.recorder import recurrent

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# Functions that may send rows elsewhere by their values.
SELECTING = {
    "__getitem__", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_put",
    "index_put_", "index_select", "masked_scatter", "masked_scatter_", "masked_select", "nonzero",
    "_pack_padded_sequence", "__setitem__", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "scatter_reduce", "scatter_reduce_", "sort", "take", "take_along_dim", "topk", "unique",
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes when rows were first selected by value, and opens up fused recurrent layers.

    ``selected_from`` is the sequence number of the first autograd node made afterwards. Fused
    recurrent layers show the graph one node for all their steps; run otherwise they show the
    products they consist of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selected_from: int | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``."""
        name = getattr(func, "__name__", "")
        if name in RECURRENT:
            if recurrent.can_run(args, kwargs or {}):
                return recurrent.run(name, args)
            return _step_by_step(func, args, kwargs or {})
        if (
            self.selected_from is None
            and name in SELECTING
            and _by_value(name, [*args, *(kwargs or {}).values()])
        ):
            self.selected_from = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


def _by_value(name: str, args: list[Any]) -> bool:
    """Whether a selection concerns numbers of samples, and where it goes depends on values."""
    if not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    if isinstance(args[0], torch.nn.Parameter):  # a table looked up
        return False
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor) and part.dim() > 0 for part in index)
    return True


def _step_by_step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fused = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    cudnn = torch._C._get_cudnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch._C._set_cudnn_enabled(cudnn)
