"""One pass over the data: sums of squares, and how each parameter's are taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.recorder.graph import Graph
from ewc_fast.fisher.recorder.plan import Kind, Plan, make_plan
from ewc_fast.fisher.recorder.recorder import Recorder
from ewc_fast.fisher.recorder.trial import Forward, Key, key_of, try_samples, watched, zeros_for
from ewc_fast.fisher.report import NO_GRADIENT, RECORDED, FisherDiagonal, FisherReport

BATCHES_IN_A_SUM = 256
LARGE = 16 * 2**20  # bytes of a tensor, from which on the system's pages for it take longest
PART = 4 * 2**20  # bytes that the allocator keeps and caches hold
FEWEST_IN_A_PART = 16  # samples: with fewer, products lose more than memory gains
UNRESOLVED = "its samples could not be told apart in every batch"


def parts_of(samples: int, bytes_a_sample: int) -> int:
    """Return in how many parts a batch is run on the CPU; the Fisher does not depend on it.

    A model whose largest tensor has ``bytes_a_sample`` for each sample. A CNN with tensors of
    16 MiB took 0.7 of the time in parts of 4 MiB, one of 32 MiB 0.56. Also, the exact estimator
    keeps a part's activations through all its passes.
    """
    if samples * bytes_a_sample < LARGE:
        return 1
    return max(1, samples // max(FEWEST_IN_A_PART, PART // bytes_a_sample))


class SentBackward(Protocol):
    """What is sent backward from a batch's outputs: for the Fisher, its scores."""

    batched: bool  # whether the whole batch's gradient counts as one

    def vectors(self, outputs: Tensor, batch: Batch) -> Iterable[Tensor]:
        """Return vectors like the outputs, one row for each sample."""

    def count(self, outputs: Tensor, batch: Batch) -> int:
        """Return how many vectors there are."""

    def samples(self, outputs: Tensor, batch: Batch) -> float:
        """Return by how much the sums are divided for this batch."""


class Pass:
    """Sums over batches of a power of per-sample gradients: squares, as ``recorder`` takes them."""

    def __init__(
        self,
        forward: Forward,
        params: Mapping[str, nn.Parameter],
        scores: SentBackward,
        *,
        verify: bool,
        recorder: type[Recorder] = Recorder,
    ) -> None:
        self._forward, self._params, self._scores, self._verify = forward, params, scores, verify
        self._recorder = recorder
        self._on_cpu = next(iter(params.values())).device.type == "cpu"
        self._plans: dict[Key, Plan] = {}
        self._tried: set[Key] = set()  # graphs of batches whose first samples were tried
        self._sums: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}
        self._batches = 0
        self._samples = 0.0
        self._ways = dict.fromkeys(params, NO_GRADIENT)

    def add(self, batch: Batch) -> None:
        """Add the squares of every sample of the batch."""
        whole = batch.size == 1 or self._scores.batched
        first = not whole and not self._plans
        if first:
            self._try(batch)
        if whole or not self._on_cpu or len(self._plans) > 1:
            self._add(batch, whole, first)
            return
        (plan,) = self._plans.values()
        for part in batch.parts(parts_of(batch.size, plan.bytes_a_sample)):
            self._add(part, part.size == 1, first)
            first = False

    def _add(self, batch: Batch, whole: bool, first: bool) -> None:
        self._make_room()
        outputs, graph, watch = watched(self._forward, batch, self._params)
        vectors = self._scores.vectors(outputs, batch)
        self._samples += self._scores.samples(outputs, batch)
        if not outputs.requires_grad:
            return
        if whole:
            self._add_gradients(set(self._params), outputs, vectors)
            return
        if first:
            self._tried.add(key_of(graph, watch.selected_from))
        self._record(batch, outputs, graph, vectors, watch.selected_from)

    def mean(self) -> FisherDiagonal:
        """Return the mean over all samples."""
        if self._samples == 0:
            raise ValueError("batches: expected at least one sample, got none that counts")
        for name, earlier in self._earlier.items():
            self._sums[name].add_(earlier)
        found = FisherDiagonal(
            {name: total.div_(self._samples) for name, total in self._sums.items()}
        )
        found.report = FisherReport(self._ways)
        return found

    def _record(
        self,
        batch: Batch,
        outputs: Tensor,
        graph: Graph,
        vectors: Iterable[Tensor],
        selected_from: int | None,
    ) -> None:
        key = key_of(graph, selected_from)
        if key not in self._plans and key not in self._tried:
            self._try(batch)
            self._tried.add(key)
        plan = self._plans.get(key) or self._plan_of_its_own(graph, outputs, selected_from)
        recorder = self._recorder(graph, plan, outputs, self._params, self._sums)
        if plan.slow or plan.dormant or recorder.unresolved:
            vectors = list(vectors)  # needed again for each sample
        recorder.add(vectors, self._scores.count(outputs, batch))
        slow = plan.slow.keys() | recorder.unresolved
        self._note({**plan.ways(), **dict.fromkeys(recorder.unresolved, UNRESOLVED)})
        if recorder.unresolved:
            self._plans.pop(key, None)  # look again at the next batch
            self._tried.discard(key)
        del outputs, graph, recorder
        for n in range(batch.size) if slow else ():
            sample = self._forward(batch.samples(n, n + 1))
            self._add_gradients(slow, sample, [vector[n : n + 1] for vector in vectors])

    def _try(self, batch: Batch) -> None:
        key, plan = try_samples(
            self._forward, batch, self._params, verify=self._verify, recorder=self._recorder
        )
        self._plans[key] = plan

    def _plan_of_its_own(self, graph: Graph, outputs: Tensor, selected_from: int | None) -> Plan:
        """Return a plan for a graph that a batch's first samples don't have; it is used once.

        Packed sequences, experts and depths that depend on values make such graphs. Rules that
        were held to single samples on the first samples' graph are good for this one, too.
        """
        plan = make_plan(graph, outputs, self._params, selected_from)
        if self._verify:
            kinds = set[Kind]().union(*(tried.kinds for tried in self._plans.values()))
            slow = {name: why for tried in self._plans.values() for name, why in tried.slow.items()}
            plan.keep_to(kinds, slow)
        return plan

    def _add_gradients(self, names: set[str], outputs: Tensor, vectors: Iterable[Tensor]) -> None:
        """Add the powers of gradients formed as usual: of one sample, or of a whole batch."""
        if not outputs.requires_grad:
            return
        chosen = [name for name in self._params if name in names]
        for vector in vectors:
            grads = torch.autograd.grad(
                outputs,
                [self._params[name] for name in chosen],
                vector,
                retain_graph=True,
                allow_unused=True,
            )
            pairs = zip(chosen, grads, strict=True)
            found = {name: grad.to_dense() for name, grad in pairs if grad is not None}
            self._recorder.add_formed([self._sums[name] for name in found], [*found.values()])
            self._note(dict.fromkeys(found, RECORDED))

    def _note(self, ways: Mapping[str, str]) -> None:
        """Remember for the report the slowest way of each parameter."""
        for name, way in ways.items():
            if self._ways[name] == NO_GRADIENT or way not in (NO_GRADIENT, RECORDED):
                self._ways[name] = way

    def _make_room(self) -> None:
        """Start new sums from time to time: float32 loses small addends beside large sums."""
        if not self._sums:
            self._sums = zeros_for(self._params)
        elif self._batches % BATCHES_IN_A_SUM == 0:
            if not self._earlier:
                self._earlier = zeros_for(self._params)
            for name, total in self._sums.items():
                self._earlier[name].add_(total)
                total.zero_()
        self._batches += 1
