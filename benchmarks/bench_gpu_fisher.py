"""Fisher diagonals of whole models on a GPU, beside plain forward and backward passes.

The plain pass is what training does with the same data: the loss summed over the batch, in float32,
and the gradients of all parameters. Each call takes several batches, so that what is checked once a
call weighs as it does in use.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from gpu_models import Batch, GpuWorkload, workloads
from gpu_product_case import multiplied
from gpu_timing import (
    NO_ROOM,
    OURS,
    TRIED_OUT,
    Budget,
    Clock,
    Effort,
    device_for,
    measure,
    peak_bytes,
    script,
)
from harness import Claim, MismatchError, Provider, Result
from torch import Tensor, nn

from ewc_fast import fisher_diagonal

PLAIN = "forward and backward"
ESTIMATORS = ("empirical", "sampled")
BATCHES = 4
ROOM = 1.1  # of plain's peak and the Fisher together, promised
SECONDS = 150.0
EFFORT = Effort(seconds=3.0, rounds=5)
# Of a parameter's Frobenius norm, beside one sample at a time in the same precision: a batch of two
# takes other orders of summation, and in bfloat16 rounds activations and their gradients elsewhere.
FLOAT32, TF32, BFLOAT16 = 1e-4, 1e-2, 5e-2
CANCELLED = 1e-3  # of the largest norm: below it a parameter's gradient is rounding alone


@dataclass
class Case:
    """A model on a device with its data."""

    workload: GpuWorkload
    device: torch.device

    def __post_init__(self) -> None:
        with torch.random.fork_rng(), self.device:
            torch.manual_seed(0)
            self.model = self.workload.make().to(self.workload.dtype).eval()
            self.batches = [self._in_dtype(self.workload.data(self.workload.samples))] * BATCHES
            self.few = self._in_dtype(self.workload.few())

    def _in_dtype(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return (inputs.to(self.workload.dtype) if inputs.is_floating_point() else inputs), targets

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits."""
        with self.workload.precision(self.device):
            logits: Tensor = model(inputs)
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy, summed over samples and positions."""
        logits = self.outputs(self.model, inputs)
        if self.workload.words:
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def plain(self) -> None:
        """Do what training does: all gradients, of each batch by itself."""
        for batch in self.batches:
            self.model.zero_grad(set_to_none=True)
            self.loss(*batch).backward()

    def fisher(self, estimator: str, batches: list[Batch] | None = None) -> Mapping[str, Tensor]:
        """Return this library's Fisher diagonal."""
        return fisher_diagonal(
            self.model,
            self.batches if batches is None else batches,
            likelihood="causal_lm" if self.workload.words else "categorical",
            estimator=estimator,  # type: ignore[arg-type]
            forward=self.outputs,
            generator=torch.Generator(self.device).manual_seed(0),
        )

    def check(self) -> None:
        """Raise unless the empirical Fisher of a few samples is that of one sample at a time."""
        found = self.fisher("empirical", [self.few])
        largest, worst = 0.0, []
        for name, exact in self._one_by_one().items():
            if name not in found:
                raise MismatchError(f"missing parameter: {name}")
            norm = exact.norm().item()
            largest = max(largest, norm)
            worst.append(((found[name].float() - exact).norm().item(), norm, name))
        for error, norm, name in worst:
            if not error <= self._tolerance() * max(norm, CANCELLED * largest):
                raise MismatchError(f"{name}: off by {error / norm:.1e} of its norm")

    def _tolerance(self) -> float:
        if self.workload.rounds_to_bfloat16:
            return BFLOAT16
        return TF32 if self.device.type == "cuda" else FLOAT32

    def _one_by_one(self) -> dict[str, Tensor]:
        params = dict(self.model.named_parameters())
        totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        inputs, targets = self.few
        for sample in zip(inputs.split(1), targets.split(1), strict=True):
            grads = torch.autograd.grad(self.loss(*sample), list(params.values()))
            for total, grad in zip(totals.values(), grads, strict=True):
                total.addcmul_(grad.float(), grad.float(), value=1 / len(inputs))
        return totals


def suite(quick: bool, budget: Budget) -> Iterator[Result]:
    """Measure model by model, until time is up."""
    clock = Clock(device_for(quick))
    for workload in workloads(quick):
        if budget.spent:
            yield Result(refused={workload.title: "not reached: time was up"})
            continue
        with multiplied("tf32"):
            yield measured(workload, clock, TRIED_OUT if quick else EFFORT)
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(workload: GpuWorkload, clock: Clock, effort: Effort) -> Result:
    """Measure one model: time, then memory."""
    result = Result()
    try:
        case = Case(workload, clock.device)
    except torch.OutOfMemoryError:
        return Result(refused={workload.title: NO_ROOM})
    calls: dict[str, Callable[[], object]] = {PLAIN: case.plain}
    calls |= {f"{OURS}, {kind}": partial(case.fisher, kind) for kind in ESTIMATORS}
    providers = {
        name: Provider(call, case.plain if name == PLAIN else case.check)
        for name, call in calls.items()
    }
    timings = measure(providers, clock, effort, ahead=False)
    if PLAIN not in timings.seconds:
        return Result(refused={workload.title: timings.refused[PLAIN]})
    result.add(workload.title, timings, (PLAIN,))
    peaks = {name: _peak(case, calls[name]) for name in timings.seconds}
    own = sum(4 * param.numel() for param in case.model.parameters())
    for row in result.rows:
        row |= {"batches": BATCHES, "peak_bytes": peaks[row["provider"]], "fisher_bytes": own}
        if row["provider"] != PLAIN:
            result.claims += claims(workload, row, peaks[PLAIN])
    return result


def _peak(case: Case, call: Callable[[], object]) -> int | None:
    case.model.zero_grad(set_to_none=True)
    gc.collect()
    found = peak_bytes(call, case.device)
    case.model.zero_grad(set_to_none=True)
    return found


def claims(workload: GpuWorkload, row: dict[str, object], plain: int | None) -> list[Claim]:
    """Return what a row says of the promises: time and memory."""
    if workload.bound is None or plain is None:
        return []
    title = f"{workload.title}, {row['provider']}"
    ratio, peak, own = row["ratios"][PLAIN], row["peak_bytes"], row["fisher_bytes"]  # type: ignore[index]
    memory = peak / (plain + own)  # type: ignore[operator]
    return [
        Claim(f"{title}: time in units of plain's", ratio, workload.bound, at_least=False),
        Claim(f"{title}: peak memory over plain's and the Fisher", memory, ROOM, at_least=False),
    ]


if __name__ == "__main__":
    script(suite, SECONDS)
