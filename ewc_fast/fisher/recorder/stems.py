r"""What lies between an operation's operand and the parameters it was made from.

The operand :math:`w = s(\theta)` of a recorded operation may be a parameter, a view of one
(``weight.t()``, a slice, a cast), or computed from parameters (weight norm, a low-rank update).
With :math:`J = ds / d\theta` a sample's gradient of :math:`\theta` is :math:`J^\top g_n`; where J
only picks entries, :math:`\sum_n (J^\top g_n)^2 = J^\top \sum_n g_n^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.recorder.graph import Edge, Graph, kind_of

View = Callable[[Tensor], Tensor]


class Stem:
    """The way from one edge of the graph down to parameters."""

    def __init__(self, graph: Graph, edge: Edge) -> None:
        self.edge = edge
        self.names = sorted(graph.parameters_below(edge[0]))
        self._steps = _view_steps(graph, edge)

    @property
    def is_view(self) -> bool:
        """Whether the operand is a view of one parameter, or its copy in another dtype."""
        return self._steps is not None

    def view(self, tensor: Tensor) -> Tensor:
        """Return of a tensor like the parameter what the operand is of the parameter."""
        assert self._steps is not None
        for step in self._steps:
            tensor = step(tensor)
        return tensor

    def view_each(self, tensors: Tensor) -> Tensor:
        """Return the view of each of a batch of tensors like the parameter."""
        first = self.view(tensors[0])
        strides = (tensors.stride(0), *first.stride())
        return tensors.as_strided((len(tensors), *first.shape), strides, first.storage_offset())

    def pull(self, graph: Graph, gradient: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """Return :math:`J^T g` for each of ``names``."""
        like = graph.nodes[self.edge[0]]._input_metadata[self.edge[1]]
        found = torch.autograd.grad(
            [graph.gradient_edge(self.edge)],
            [params[name] for name in self.names],
            [gradient.to(like.dtype)],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(params[name]) if grad is None else grad
            for name, grad in zip(self.names, found, strict=True)
        ]

    def picks_entries(self, graph: Graph, params: Mapping[str, Tensor]) -> bool:
        """Whether squares may be taken before :meth:`pull`: tried on random numbers.

        An entry of the parameter that meets two of the operand, or one with a factor, would have
        to satisfy (x + y)^2 = x^2 + y^2, or a^2 = a.
        """
        like = zeros_at(graph, self.edge)
        if like.dtype not in (torch.float32, torch.float64):
            return False
        probe = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        probe = probe.to(device=like.device, dtype=like.dtype)
        first = self.pull(graph, probe, params)
        second = self.pull(graph, probe.square(), params)
        return all(
            g.dtype == state_dtype(g.dtype) and torch.allclose(g.square(), h, rtol=1e-4, atol=1e-6)
            for g, h in zip(first, second, strict=True)
        )


def shape_at(graph: Graph, edge: Edge) -> torch.Size:
    """Return the shape of the tensor that an edge carries the gradient of."""
    return torch.Size(graph.nodes[edge[0]]._input_metadata[edge[1]].shape)


def zeros_at(graph: Graph, edge: Edge) -> Tensor:
    """Return zeros like the tensor that an edge carries the gradient of."""
    like = graph.nodes[edge[0]]._input_metadata[edge[1]]
    return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)


def leads_to_views(graph: Graph, edge: Edge) -> bool:
    """Whether an edge carries the gradient of a parameter or of a view of one."""
    return _view_steps(graph, edge) is not None


def only_views(node: Any) -> bool:
    """Whether a node's operation returns its operand's entries in other places."""
    return kind_of(node) in _STEPS


def geometry(view: Tensor) -> tuple[Any, ...]:
    """Return what two views of one tensor have in common if they are the same."""
    return view.storage_offset(), tuple(view.shape), view.stride()


def _view_steps(graph: Graph, edge: Edge) -> list[View] | None:
    """Return the views from a parameter up to the edge, or ``None`` if there is more to it."""
    steps: list[View] = []
    while edge[0] not in graph.names:
        node, links = graph.nodes[edge[0]], graph.edges[edge[0]]
        make = _STEPS.get(kind_of(node))
        if make is None or len(links) != 1 or links[0] is None:
            return None
        steps.append(make(node, edge[1], shape_at(graph, edge)))
        edge = links[0]
    steps.reverse()
    tried = torch.empty(graph.nodes[edge[0]].variable.shape, device="meta")
    try:
        for step in steps:
            tried = step(tried)
    except RuntimeError:  # a reshape that had to copy
        return None
    return steps


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _slice(node: Any, output: int, shape: tuple[int, ...]) -> View:
    bounds = slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step)
    dim = _signed(node._saved_dim)
    return lambda t: t[(slice(None),) * (dim % t.dim()) + (bounds,)]


def _transpose(node: Any, output: int, shape: tuple[int, ...]) -> View:
    return methodcaller("transpose", _signed(node._saved_dim0), _signed(node._saved_dim1))


def _permute(node: Any, output: int, shape: tuple[int, ...]) -> View:
    return methodcaller("permute", [_signed(dim) for dim in node._saved_dims])


def _select(node: Any, output: int, shape: tuple[int, ...]) -> View:
    return methodcaller("select", _signed(node._saved_dim), _signed(node._saved_index))


def _split(node: Any, output: int, shape: tuple[int, ...]) -> View:
    size, dim = node._saved_split_size, _signed(node._saved_dim)
    return lambda t: t.split(size, dim)[output]


def _unbind(node: Any, output: int, shape: tuple[int, ...]) -> View:
    dim = _signed(node._saved_dim)
    return lambda t: t.unbind(dim)[output]


def _same(node: Any, output: int, shape: tuple[int, ...]) -> View:
    return lambda t: t


def _reshaped(node: Any, output: int, shape: tuple[int, ...]) -> View:
    return methodcaller("view", shape)


# A plan outlives the graph it was made on: steps keep numbers, not nodes.
_STEPS: dict[str, Callable[[Any, int, tuple[int, ...]], View]] = {
    "T": lambda node, output, shape: methodcaller("t"),
    "Transpose": _transpose,
    "Permute": _permute,
    "Slice": _slice,
    "Select": _select,
    "Split": _split,
    "Unbind": _unbind,
    **dict.fromkeys(("ToCopy", "Clone", "Alias"), _same),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"), _reshaped),
}
