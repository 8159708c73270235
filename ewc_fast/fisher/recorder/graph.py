"""The autograd graph from outputs to parameters, as a list that can be read and compared."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Edge = tuple[int, int]  # a node's place in Graph.nodes, and which of its outputs


class Graph:
    """The nodes of an autograd graph that lead to parameters, each before its users.

    A node receives the gradient of what its operation returned and hands on those of its operands;
    ``edges[i][k]`` says to whom the k-th goes, ``None`` where no parameter lies that way. Two
    forward passes of the same operations have the same ``signature``.
    """

    def __init__(self, outputs: Tensor, params: Mapping[str, Tensor]) -> None:
        self.nodes: list[Any] = []
        self.edges: list[tuple[Edge | None, ...]] = []
        self.names: dict[int, str] = {}  # of the parameters: nodes without edges
        kinds: list[type] = []
        by_id = {id(param): name for name, param in params.items()}
        places: dict[Any, int | None] = {None: None}  # None: leads to no parameter
        stack: list[tuple[Any, Any]] = [(outputs.grad_fn, None)]
        while stack:
            node, functions = stack.pop()
            if node in places:
                continue
            if functions is None:
                functions = node.next_functions
                waiting = [(child, None) for child, _ in functions if child not in places]
                if waiting:
                    stack.append((node, functions))
                    stack += waiting
                    continue
            links = [(places[child], output) for child, output in functions]
            leads_on = any(place is not None for place, _ in links)
            name = None if functions else by_id.get(id(getattr(node, "variable", None)))
            if name is None and not leads_on:
                places[node] = None
                continue
            places[node] = at = len(self.nodes)
            if name is not None:
                self.names[at] = name
            self.nodes.append(node)
            self.edges.append(tuple(None if link[0] is None else link for link in links))  # type: ignore[misc]
            kinds.append(type(node))
        root = places[outputs.grad_fn]
        self.root: Edge | None = None if root is None else (root, outputs.output_nr)
        described = self.root, tuple(kinds), tuple(self.edges), tuple(self.names.items())
        self.signature = hash(described)

    def gradient_edge(self, edge: Edge) -> GradientEdge:
        """Return what ``torch.autograd.grad`` takes in place of a tensor."""
        return GradientEdge(self.nodes[edge[0]], edge[1])

    def parameters_below(self, start: int, but: Set[int] = frozenset()) -> set[str]:
        """Return the names of the parameters that gradients at a node reach, not by way of some."""
        seen, stack, found = {start, *but}, [start] if start not in but else [], set()
        while stack:
            at = stack.pop()
            if at in self.names:
                found.add(self.names[at])
            behind = {link[0] for link in self.edges[at] if link is not None} - seen
            seen |= behind
            stack.extend(behind)
        return found

    def coarsest_dtypes(self) -> dict[str, torch.dtype]:
        """Return for each parameter the coarsest dtype that its gradients pass through."""
        passed: list[torch.dtype | None] = [None] * len(self.nodes)
        for at in reversed(range(len(self.nodes))):  # users come before their operands
            own = [m.dtype for m in self.nodes[at]._input_metadata if m.dtype.is_floating_point]
            passed[at] = _coarsest([*own, passed[at]])
            for link in self.edges[at]:
                if link is not None:
                    passed[link[0]] = _coarsest([passed[link[0]], passed[at]])
        return {name: dtype for at, name in self.names.items() if (dtype := passed[at]) is not None}


def _coarsest(dtypes: list[torch.dtype | None]) -> torch.dtype | None:
    known = [dtype for dtype in dtypes if dtype is not None]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def kind_of(node: Any) -> str:
    """Return the name of a node's operation, without version numbers."""
    of: type = type(node)
    return _kind(of)


@cache
def _kind(node_type: type) -> str:
    return node_type.__name__.rstrip("0123456789").removesuffix("Backward")
