"""The autograd graph from outputs to parameters, as a list that can be read and compared."""

from __future__ import annotations

from collections.abc import Mapping, Set
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
        root = outputs.grad_fn
        self._names_by_id = {id(param): name for name, param in params.items()}
        index = self._walk(root)
        self.root: Edge | None = None if index is None else (index, outputs.output_nr)
        self.signature = hash(
            (
                self.root,
                tuple(
                    (node.name(), links) for node, links in zip(self.nodes, self.edges, strict=True)
                ),
                tuple(self.names.items()),
            )
        )

    def _walk(self, root: Any) -> int | None:
        places: dict[Any, int | None] = {None: None}
        stack = [root]
        while stack:
            node = stack[-1]
            if node in places:
                stack.pop()
                continue
            waiting = [child for child, _ in node.next_functions if child not in places]
            if waiting:
                stack.extend(waiting)
                continue
            places[stack.pop()] = self._add(node, places)
        return places[root]

    def _add(self, node: Any, places: Mapping[Any, int | None]) -> int | None:
        links = tuple(
            None if (place := places[child]) is None else (place, output)
            for child, output in node.next_functions
        )
        name = self._names_by_id.get(id(getattr(node, "variable", None)))
        if name is None and not any(links):
            return None
        if name is not None:
            self.names[len(self.nodes)] = name
        self.nodes.append(node)
        self.edges.append(links)
        return len(self.nodes) - 1

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
    name: str = node.name()
    return name.rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")
