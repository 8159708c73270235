"""Squares per-sample gradients on their way back, where they are made.

One backward pass visits the operations that parameters enter. Just before each would hand on its
gradients, its rule takes what the operation saved and the gradient that arrived, and adds the
squares; the gradient of the parameter itself is never formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from ewc_fast import functional
from ewc_fast._checks import state_dtype
from ewc_fast.fisher.recorder.graph import Graph, kind_of
from ewc_fast.fisher.recorder.layouts import Layout
from ewc_fast.fisher.recorder.per_sample import Outer, PerSample, joined
from ewc_fast.fisher.recorder.plan import Family, Plan, Use
from ewc_fast.fisher.recorder.rules import Operand, by_its_own_backward, by_rule
from ewc_fast.fisher.recorder.stems import shape_at, zeros_at
from ewc_fast.fisher.recorder.tracing import trace

BYTES_AT_ONCE = 4 * 2**20  # of per-sample gradients that are formed: what a cache holds


class Recorder:
    """The backward passes over one batch's graph."""

    power = 2  # of the per-sample gradients that is added up; see also absolute.py

    @staticmethod
    def add_formed(sums: list[Tensor], gradients: list[Tensor]) -> None:
        """Add the power of gradients that are already there: of one sample, say."""
        functional.accumulate_square_(sums, gradients)

    @staticmethod
    def subtract_formed(total: Tensor, gradient: Tensor) -> None:
        """Take off the power of one sample's gradient."""
        total.addcmul_(gradient, gradient, value=-1)

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        outputs: Tensor,
        params: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
    ) -> None:
        self._graph, self._plan, self._outputs = graph, plan, outputs
        self._params, self._sums = params, sums
        self.unresolved: set[str] = set()  # parameters whose squares could not be taken
        self._layouts = self._find_layouts()
        self._one_position: dict[Use, tuple[Outer, Tensor, Tensor | None]] = {}  # of squares
        self._kept: dict[Family, dict[Use, PerSample]] = {}
        self._pulled: dict[Family, Tensor] = {}
        self._waiting: list[tuple[Family, Use, Operand]] = []
        self._several = False  # passes
        self.had_to_wait = False  # for the graph's own backward functions

    def add(self, vectors: Iterable[Tensor], passes: int) -> None:
        """Send vectors backward and add the squares; the last pass frees the graph."""
        self._several = passes > 1
        for number, vector in enumerate(vectors, 1):
            self._backward(vector, last=number == passes)
            for family, use, operand in self._waiting:
                self._take(family, use, by_its_own_backward(operand))
            self._waiting.clear()
            for family, kept in self._kept.items():
                self._square_sums(family, kept)
            self._kept.clear()
        self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """Add what waited for the last pass."""
        for use in [*self._one_position]:
            squares, total, bias_total = self._one_position.pop(use)  # held no longer than needed
            if bias_total is not None:
                bias_total.add_(squares.gradient.sum((0, 1)))
            squares.gradient.sqrt_()
            squares.add_squares(total)
        for family, total in self._pulled.items():
            stem = family.uses[0].stem
            for name, grad in zip(
                stem.names, stem.pull(self._graph, total, self._params), strict=True
            ):
                self._sums[name].add_(grad)

    def _find_layouts(self) -> dict[Use, Layout]:
        """Return where the samples are for each use; a family with a use unknown is unresolved."""
        traced = trace(self._graph, self._outputs, self._plan)
        found: dict[Use, Layout] = {}
        for family in self._plan.families:
            for use in family.uses:
                layout: Layout | None = traced.get(use)
                if layout is None and not use.traced and use.layout is not None:
                    regular = use.layout.resized(len(self._outputs))
                    shape = shape_at(self._graph, (use.node, 0))
                    layout = regular if regular.fits(shape) else None
                if layout is None:
                    self.unresolved.update(family.names)
                else:
                    found[use] = layout
        if self.unresolved:
            for family in self._plan.families:
                if not self.unresolved.isdisjoint(family.names):
                    for use in family.uses:
                        found.pop(use, None)
        return found

    @torch.no_grad()
    def _backward(self, vector: Tensor, last: bool) -> None:
        """Run one pass; gradients are taken where they arrive, or are caught at the ends."""
        nodes, ends = self._graph.nodes, self._plan.ends(self._graph)
        if not ends:  # every parameter takes the slow way
            return
        hooks = [nodes[at].register_prehook(partial(self._arrive, at)) for at in self._plan.visits]
        try:
            caught = torch.autograd.grad(
                self._outputs,
                [self._graph.gradient_edge(edge) for edge in ends],
                vector,
                retain_graph=self._plan.keeps_graph or not last,
                allow_unused=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        at_ends: dict[int, dict[int, Tensor | None]] = {}
        for edge, grad in zip(ends, caught, strict=True):
            if edge not in self._plan.dormant:
                at_ends.setdefault(edge[0], {})[edge[1]] = grad
            elif grad is not None and grad.any():
                self.unresolved |= self._plan.dormant[edge]
        for at, grads in at_ends.items():
            self._arrive(at, tuple(grads.get(output) for output in range(max(grads) + 1)))

    def _arrive(self, at: int, grads: tuple[Tensor | None, ...]) -> None:
        """Take the gradients that arrived at an operation."""
        if grads[0] is None:
            return
        node = self._graph.nodes[at]
        visits = self._plan.visits[at]
        for number, (family, use) in enumerate(visits, 1):
            if use not in self._layouts:
                continue
            operand = Operand(node, use.place, use.shape, grads, self._layouts[use])
            gradients = by_rule(operand)
            if gradients is None:  # inside a backward pass a node hands on only what it must
                if not self._plan.keeps_graph:
                    raise RuntimeError(f"{node.name()}: its rule fitted a few samples, not a batch")
                self._waiting.append((family, use, operand))
                self.had_to_wait = True
            elif number < len(visits) and self._take_both(family, use, gradients, *visits[number]):
                return
            else:
                self._take(family, use, gradients)

    def _take_both(
        self, family: Family, use: Use, gradients: PerSample, other: Family, bias: Use
    ) -> bool:
        """Take a weight's gradients and the bias's in one reading; return whether that was done."""
        if family.way != "apart" or other.way != "apart":
            return False
        if not bias.is_bias or bias not in self._layouts:
            return False
        node = self._graph.nodes[use.node]
        if kind_of(node) == "Addmm" and not node._saved_alpha == node._saved_beta == 1:
            return False
        totals = self._total(family, use), self._total(other, bias)
        if self._waits_for_last_pass(gradients):
            self._keep_squares(use, gradients, *totals)
            return True
        return gradients.add_squares_with_bias(*totals)

    @torch.no_grad()
    def _take(self, family: Family, use: Use, gradients: PerSample) -> None:
        if family.way in ("joined", "together"):
            self._kept.setdefault(family, {})[use] = gradients
        elif self._waits_for_last_pass(gradients):
            self._keep_squares(use, gradients, self._total(family, use), None)
        else:
            gradients.add_squares(self._total(family, use))

    def _waits_for_last_pass(self, gradients: PerSample) -> TypeGuard[Outer]:
        """With one position a sample, one product serves all passes: of the sum of their g^2."""
        return self._several and isinstance(gradients, Outer) and gradients.positions == 1

    @torch.no_grad()
    def _keep_squares(
        self, use: Use, outer: Outer, total: Tensor, bias_total: Tensor | None
    ) -> None:
        gradient = outer.gradient.to(state_dtype(outer.gradient.dtype))
        if use in self._one_position:
            self._one_position[use][0].gradient.addcmul_(gradient, gradient)
        else:
            squares = Outer.of(gradient.square(), outer.input, outer.gradient_is_left)
            self._one_position[use] = squares, total, bias_total

    def _total(self, family: Family, use: Use) -> Tensor:
        """Return where the squares of one use are to be added."""
        if family.way != "pulled":
            return use.stem.view(self._sums[use.stem.names[0]])
        if family not in self._pulled:
            self._pulled[family] = zeros_at(self._graph, use.stem.edge)
        return self._pulled[family]

    @torch.no_grad()
    def _square_sums(self, family: Family, kept: Mapping[Use, PerSample]) -> None:
        """Square the sums of a parameter's gradients from several uses."""
        sum_of_uses = joined([*kept.values()]) if family.way == "joined" else None
        if sum_of_uses is not None:
            stem = family.uses[0].stem
            sum_of_uses.add_squares(stem.view(self._sums[stem.names[0]]))
            return
        size = sum(self._sums[name].numel() for name in family.names)
        step = max(1, BYTES_AT_ONCE // (4 * max(size, 1)))
        for start in range(0, len(self._outputs), step):
            samples = min(step, len(self._outputs) - start)
            sums = [self._sums[name] for name in family.names]
            gradients = [total.new_zeros(samples, *total.shape) for total in sums]
            self._add_gradients(dict(zip(family.names, gradients, strict=True)), kept, start)
            functional.accumulate_square_(sums, gradients)

    def _add_gradients(
        self, gradients: Mapping[str, Tensor], kept: Mapping[Use, PerSample], start: int
    ) -> None:
        """Add some samples' gradients with respect to a family's parameters."""
        samples = len(next(iter(gradients.values())))
        for use, of_use in kept.items():
            stem = use.stem
            if stem.is_view:
                of_use.add_to(stem.view_each(gradients[stem.names[0]]), start)
                continue
            dtype = next(iter(gradients.values())).dtype
            operands = torch.zeros(samples, *use.shape, dtype=dtype, device=self._outputs.device)
            of_use.add_to(operands, start)
            for n, operand in enumerate(operands):
                pulled = stem.pull(self._graph, operand, self._params)
                for name, gradient in zip(stem.names, pulled, strict=True):
                    gradients[name][n].add_(gradient)
