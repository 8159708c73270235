"""How each parameter's squares are to be taken, found out on a few samples.

The first samples of a batch run through the model once; two backward passes over that small graph
tell which gradients belong to single samples, see :mod:`~ewc_fast.fisher.recorder.layouts`. A
parameter's *uses* are where gradients stop doing so: operations on samples whose operand comes from
parameters alone. A plan holds for every batch whose graph has the same signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.graph import Edge, Graph, kind_of
from ewc_fast.fisher.recorder.layouts import Found, Regular, infer, scaled_by_sample
from ewc_fast.fisher.recorder.rules import BIAS_PLACES, CHANNELS_SECOND
from ewc_fast.fisher.recorder.stems import Stem, geometry, leads_to_views, only_views, shape_at
from ewc_fast.fisher.report import NO_GRADIENT, RECORDED

Kind = tuple[str, int, int]  # an operation, the operand's place, and its number of dimensions


@dataclass(frozen=True)
class Use:
    """One operand, made from parameters, of one operation on samples."""

    node: int
    place: int
    stem: Stem
    shape: torch.Size  # of the operand
    layout: Regular | None
    is_bias: bool
    traced: bool  # the layout need not hold in another batch, and is looked up in each
    kind: Kind


@dataclass(eq=False)
class Family:
    """Uses whose gradients meet in some parameter, and the way their squares are taken."""

    uses: list[Use]
    names: list[str]
    way: str = ""


@dataclass
class Plan:
    """What to do with the gradients of a graph."""

    families: list[Family] = field(default_factory=list)
    dormant: dict[Edge, set[str]] = field(default_factory=dict)  # no gradient was seen there
    slow: dict[str, str] = field(default_factory=dict)  # parameters it can't record, and why
    unused: set[str] = field(default_factory=set)
    keeps_graph: bool = True  # operations without a rule run their own backward pass later
    bytes_a_sample: int = 0  # of the largest tensor between parameters and outputs
    _ends: list[Edge] | None = None

    def distrust(self, name: str, reason: str) -> None:
        """Take a parameter the slow way, and those whose squares are taken together with it."""
        for cached in ("visits", "traced"):
            self.__dict__.pop(cached, None)
        self._ends = None
        self.slow[name] = reason
        for family in [family for family in self.families if name in family.names]:
            self.families.remove(family)
            for other in family.names:
                self.slow.setdefault(other, f"taken together with {name}: {reason}")

    def ways(self) -> dict[str, str]:
        """Return for each parameter what a report says of it."""
        recorded = {name: RECORDED for family in self.families for name in family.names}
        return {**dict.fromkeys(sorted(self.unused), NO_GRADIENT), **recorded, **self.slow}

    @cached_property
    def visits(self) -> dict[int, list[tuple[Family, Use]]]:
        """The uses at each node, that of a bias last."""
        found: dict[int, list[tuple[Family, Use]]] = {}
        for family in self.families:
            for use in family.uses:
                found.setdefault(use.node, []).append((family, use))
        return {at: sorted(uses, key=lambda visit: visit[1].is_bias) for at, uses in found.items()}

    @cached_property
    def traced(self) -> list[Use]:
        """The uses whose samples must be looked up in each batch."""
        return [use for family in self.families for use in family.uses if use.traced]

    def ends(self, graph: Graph) -> list[Edge]:
        """Return where gradients are caught: there is no use behind, so nothing need run there."""
        if self._ends is None:
            self._ends = sorted(_dead_ends(graph, self))
        return self._ends

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of uses that are recorded."""
        return {use.kind for family in self.families for use in family.uses}

    def keep_to(self, kinds: Set[Kind], slow: Mapping[str, str]) -> None:
        """Distrust uses of other kinds, and parameters that were found slow before."""
        for family in list(self.families):
            if not {use.kind for use in family.uses} <= kinds:
                self.distrust(family.names[0], "its operations change from batch to batch")
        for name, reason in slow.items():
            self.distrust(name, reason)


def make_plan(
    graph: Graph,
    outputs: Tensor,
    params: Mapping[str, Tensor],
    selected_from: int | None,
) -> Plan:
    """Return the plan for a graph, given that of a few samples.

    ``selected_from``: the sequence number from which on the forward pass had sent rows elsewhere,
    by their values: layouts found now need not hold in another batch.
    """
    plan = Plan(unused=set(params))
    if graph.root is None:
        return plan
    all_links = {link for links in graph.edges for link in links if link is not None}
    # Views of a parameter hold no samples, whether or not there is a gradient to tell.
    views = {link for link in all_links if leads_to_views(graph, link)}
    layouts = _layouts(graph, outputs, sorted(all_links - views))
    uses, silent, lost = [], [], set()
    seen, stack = {graph.root[0]}, [graph.root[0]]
    while stack:
        at = stack.pop()
        for place, link in enumerate(graph.edges[at]):
            if link is None:
                continue
            found = layouts.get(link, "mixed")
            if found == "zero":
                silent.append(link)
            elif found == "mixed" and link not in views and only_views(graph.nodes[at]):
                # Samples were apart above, and a view can't have mixed them.
                lost |= graph.parameters_below(link[0])
            elif found == "mixed":
                uses.append(_use(graph, at, place, Stem(graph, link), layouts, selected_from))
            elif link[0] not in seen:
                seen.add(link[0])
                stack.append(link[0])
    plan.bytes_a_sample = _largest(graph, layouts) // len(outputs)
    plan.dormant = {
        link: names for link in silent if (names := graph.parameters_below(link[0], seen))
    }
    plan.families = _families(uses)
    plan.unused -= {name for family in plan.families for name in family.names} | lost
    for name in sorted(set().union(*plan.dormant.values()) - plan.unused):
        plan.distrust(name, "one of its uses had no gradient when it was looked at")
    for name in sorted(lost):
        plan.distrust(name, "its samples could not be told apart")
    for name in sorted(_meets_complex_numbers(graph, plan)):
        plan.distrust(name, "it enters an operation on complex numbers")
    for family in plan.families:
        family.way = _way(family, graph, params)
    return plan


def _largest(graph: Graph, layouts: Mapping[Edge, Found]) -> int:
    """Return the bytes of the largest tensor that holds samples."""
    return max(
        shape_at(graph, edge).numel() * graph.nodes[edge[0]]._input_metadata[edge[1]].dtype.itemsize
        for edge, found in layouts.items()
        if isinstance(found, Regular)
    )


def _meets_complex_numbers(graph: Graph, plan: Plan) -> set[str]:
    """Return parameters that the rules, which are about real numbers, do not concern."""
    found: set[str] = set()
    for family in plan.families:
        nodes = {use.node for use in family.uses} | {use.stem.edge[0] for use in family.uses}
        if any(like.dtype.is_complex for at in nodes for like in graph.nodes[at]._input_metadata):
            found.update(family.names)
    return found


def _layouts(graph: Graph, outputs: Tensor, edges: list[Edge]) -> dict[Edge, Found]:
    """Return the layout of the gradients on some edges, and of the outputs."""
    probe = torch.Generator().manual_seed(0)
    vector = torch.randn(outputs.shape, generator=probe, dtype=torch.float64).to(outputs)
    scaled, scales = scaled_by_sample(vector)
    assert graph.root is not None
    found: dict[Edge, Found] = {graph.root: Regular(0, len(outputs), "major")}
    if edges:
        wanted = [graph.gradient_edge(edge) for edge in edges]
        plain, *again = (
            torch.autograd.grad(outputs, wanted, v, retain_graph=True, allow_unused=True)
            for v in (vector, *scaled)
        )
        for edge, g, *others in zip(edges, plain, *again, strict=True):
            known = [h for h in others if h is not None]
            found[edge] = "zero" if g is None else infer(g, known, scales)
    return found


def _use(
    graph: Graph,
    at: int,
    place: int,
    stem: Stem,
    layouts: Mapping[Edge, Found],
    selected_from: int | None,
) -> Use:
    layout = layouts.get((at, 0))
    after_selection = selected_from is not None and graph.nodes[at]._sequence_nr() >= selected_from
    regular = layout if isinstance(layout, Regular) else None
    shape = shape_at(graph, stem.edge)
    kind = (kind_of(graph.nodes[at]), place, len(shape))
    # One number for each channel, the result's last dimension, or its second.
    result = shape_at(graph, (at, 0))
    channels = result[1 if kind[0] in CHANNELS_SECOND else -1 :][:1]
    is_bias = place == BIAS_PLACES.get(kind[0]) and shape == channels
    return Use(at, place, stem, shape, regular, is_bias, after_selection or regular is None, kind)


def _families(uses: list[Use]) -> list[Family]:
    """Group uses that have parameters in common."""
    by_name: dict[str, Family] = {}
    for use in uses:
        met = {id(family): family for n in use.stem.names if (family := by_name.get(n))}
        family, *others = met.values() or (Family([], []),)
        family.uses += [*(u for other in others for u in other.uses), use]
        family.names = sorted({*family.names, *use.stem.names}.union(*(o.names for o in others)))
        by_name.update(dict.fromkeys(family.names, family))
    return list({id(family): family for family in by_name.values()}.values())


def _way(family: Family, graph: Graph, params: Mapping[str, Tensor]) -> str:
    """Return how a family's squares are taken, fastest first.

    ``"apart"``: each use by itself, for no entry of the parameter has two. ``"joined"``: uses of
    one view, in the form of one use. ``"pulled"``: the only use's squares, then through its stem.
    ``"together"``: the gradients of a few samples at a time, added up, then squared.
    """
    stems = [use.stem for use in family.uses]
    if all(stem.is_view for stem in stems):
        if len(stems) == 1 or _disjoint(stems, params[family.names[0]]):
            return "apart"
        name = family.names[0]
        views = {geometry(stem.view(params[name].new_empty(params[name].shape, device="meta")))
                 for stem in stems}  # fmt: skip
        if len(views) == 1:
            return "joined"
    elif len(stems) == 1 and stems[0].picks_entries(graph, params):
        return "pulled"
    return "together"


def _disjoint(stems: list[Stem], param: Tensor) -> bool:
    """Whether no entry of a parameter is in two views."""
    times = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
    for stem in stems[:255]:
        stem.view(times).add_(1)
    return len(stems) < 255 and bool((times <= 1).all())


def _dead_ends(graph: Graph, plan: Plan) -> set[Edge]:
    """Return where gradients are caught: nothing behind has a use, so nothing behind need run."""
    uses = set(plan.visits)
    stems = {use.stem.edge for family in plan.families for use in family.uses}
    needed, goes_on = set(uses), set[int]()
    for at, links in enumerate(graph.edges):  # operands come before their users
        on_samples = [link for link in links if link is not None and link not in stems]
        if any(link in plan.dormant or link[0] in needed for link in on_samples):
            goes_on.add(at)
            needed.add(at)
    last = uses - goes_on
    into = {link for links in graph.edges for link in links if link is not None and link[0] in last}
    if graph.root is not None and graph.root[0] in last:
        into.add(graph.root)
    return into | set(plan.dormant)
