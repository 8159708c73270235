"""Finds a plan on the first samples of a batch, and holds it to one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.recorder.graph import Graph
from ewc_fast.fisher.recorder.plan import Plan, make_plan
from ewc_fast.fisher.recorder.recorder import Recorder
from ewc_fast.fisher.recorder.watch import Watch

CANCELLED = 64  # roundings
SAMPLES_TRIED = 3  # with two, more layouts would look alike

Forward = Callable[[Batch], Tensor]
Key = tuple[int, bool]  # a graph's signature, and whether rows were selected by value


def watched(
    forward: Forward, batch: Batch, params: Mapping[str, Tensor]
) -> tuple[Tensor, Graph, Watch]:
    """Run the model; return its outputs, their graph and what else there was to see."""
    with Watch() as watch:
        outputs = forward(batch)
    return outputs, Graph(outputs, params), watch


def key_of(graph: Graph, selected_from: int | None) -> Key:
    """Return what batches must have in common to share a plan."""
    return graph.signature, selected_from is None


def try_samples(
    forward: Forward,
    batch: Batch,
    params: Mapping[str, Tensor],
    *,
    verify: bool,
    recorder: type[Recorder] = Recorder,
) -> tuple[Key, Plan]:
    """Return a plan made on a batch's first samples, and the key of the batches it holds for."""
    few = batch.samples(0, SAMPLES_TRIED)
    outputs, graph, watch = watched(forward, few, params)
    if not outputs.requires_grad:
        return key_of(graph, watch.selected_from), Plan(unused=set(params))
    plan = make_plan(graph, outputs, params, watch.selected_from)
    if verify:
        _verify(recorder, plan, graph, outputs, forward, few, params)
    return key_of(graph, watch.selected_from), plan


def zeros_for(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums to start from."""
    return {
        name: torch.zeros(param.shape, dtype=state_dtype(param.dtype), device=param.device)
        for name, param in params.items()
    }


def _verify(
    kind: type[Recorder],
    plan: Plan,
    graph: Graph,
    outputs: Tensor,
    forward: Forward,
    batch: Batch,
    params: Mapping[str, Tensor],
) -> None:
    """Distrust what differs from single samples' own gradients; raise if samples mix."""
    probe = torch.Generator().manual_seed(2)
    vector = torch.randn(outputs.shape, generator=probe, dtype=torch.float64).to(outputs)
    left = zeros_for(params)  # what was recorded, less what single samples give
    recorder = kind(graph, plan, outputs, params, left)
    recorder.add([vector], 1)
    plan.keeps_graph = recorder.had_to_wait
    largest = {name: _largest(values) for name, values in left.items()}
    coarsest = graph.coarsest_dtypes()
    dtypes = {outputs.dtype, *coarsest.values()}
    outputs_allowed = _tolerance(max(torch.finfo(dtype).eps for dtype in dtypes))
    for n in range(batch.size):
        alone = _alone(forward, batch.samples(n, n + 1))
        _check_apart(outputs[n : n + 1], alone, outputs_allowed)
        grads = torch.autograd.grad(alone, [*params.values()], vector[n : n + 1], allow_unused=True)
        for values, grad in zip(left.values(), grads, strict=True):
            if grad is not None:
                grad = grad.to_dense().to(values.dtype)  # embeddings may give sparse ones
                kind.subtract_formed(values, grad)
        del grads
    most = max(filter(math.isfinite, largest.values()), default=0.0)
    for name, values in left.items():
        epsilon = torch.finfo(coarsest.get(name, params[name].dtype)).eps
        # A gradient that is 0 by cancellation keeps roundings of its terms.
        cancelled = (CANCELLED * epsilon) ** kind.power * most
        difference = _largest(values)
        allowed = _tolerance(epsilon) * max(largest[name], difference) + cancelled
        right = difference <= allowed  # false for NaN
        if (name in recorder.unresolved or not right) and name not in plan.slow:
            plan.distrust(name, "its recorded squares differed from single samples'")


def _alone(forward: Forward, sample: Batch) -> Tensor:
    try:
        return forward(sample)
    except ValueError as error:  # batch norm's own, of which the model's author knows nothing
        raise ValueError(
            "model: runs on three samples, but not on one of them alone, so a sample has no "
            f"gradient of its own (batch statistics?): {error}"
        ) from error


def _check_apart(together: Tensor, alone: Tensor, tolerance: float) -> None:
    if alone.shape == together.shape:
        difference = _largest((alone - together).detach())
        if not difference > tolerance * max(_largest(together.detach()), 1e-6):
            return
    raise ValueError(
        "model: a sample's outputs depend on the other samples of its batch, or on chance, so it "
        "has no gradient of its own (batch statistics, sums over the batch, random numbers in eval "
        "mode?); use batches of one sample, or verify=False if the difference is meant"
    )


def _largest(values: Tensor) -> float:
    if values.numel() == 0:
        return 0.0
    if values.is_complex():
        return values.abs().amax().item()
    low, high = values.aminmax()  # without a temporary; not a number where an entry is none
    return torch.maximum(-low, high).item()


def _tolerance(epsilon: float) -> float:
    """Return what rounding may make of squares, relative to the largest; wrong is a factor."""
    return 4 * math.sqrt(epsilon)
