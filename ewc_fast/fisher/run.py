"""One run over the data: the model as it is for measuring, batches read, sums divided."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ewc_fast import _checks
from ewc_fast.fisher.batches import call_model, read_batches, run_model, with_progress
from ewc_fast.fisher.isolation import left_as_it_was
from ewc_fast.fisher.passes import Pass, SentBackward
from ewc_fast.fisher.recorder.recorder import Recorder
from ewc_fast.fisher.report import FisherDiagonal


def mean_over_samples(
    model: nn.Module,
    batches: Iterable[Any],
    sent_backward: SentBackward,
    *,
    recorder: type[Recorder] = Recorder,
    max_samples: int | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    progress: bool,
    verify: bool,
) -> FisherDiagonal:
    """Return the mean over samples of what ``recorder`` takes of their gradients.

    The arguments are those of :func:`~ewc_fast.fisher_diagonal`.
    """
    if max_samples is not None:
        _checks.positive_integer("max_samples", max_samples)
    params = _checks.trainable_parameters(model)
    inside = getattr(model, "_orig_mod", model)  # a compiled module hides its operations
    run = Pass(
        partial(run_model, forward or call_model, inside),
        params,
        sent_backward,
        verify=verify,
        recorder=recorder,
    )
    device = next(iter(params.values())).device
    with left_as_it_was(model), torch.enable_grad():
        read = read_batches(batches, max_samples, device)
        for batch in with_progress(read, batches, max_samples) if progress else read:
            run.add(batch)
    return run.mean()
