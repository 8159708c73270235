"""Leaves a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run in eval mode; set back modes, buffers and random state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d.index for d in devices]), _operations_in_sight():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)  # forward may have put another in its place
                buffer.copy_(before)


@contextmanager
def _operations_in_sight() -> Iterator[None]:
    """Run without compilation and checkpointing, which keep operations out of the graph."""
    plain: dict[str, Any] = {"_checkpoint_hook": _NoHook, "CheckpointFunction": _CalledOnce}
    with (
        torch.compiler.set_stance("force_eager"),
        mock.patch.multiple(torch.utils.checkpoint, **plain),
    ):
        yield


class _NoHook(nullcontext[None]):
    """Stands for the hook that drops what operations save."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


class _CalledOnce:
    """Stands for the autograd function that runs a model's part again in the backward pass."""

    @staticmethod
    def apply(run: Any, preserve_rng_state: bool, *args: Any) -> Any:
        """Run it once, as if it were not checkpointed."""
        return run(*args)
