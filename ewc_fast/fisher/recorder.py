"""Watches operations while the model runs, and squares per-sample gradients without forming them.

A parameter that meets only operations with a rule is recorded; per-sample gradients of it are never
formed. Part of the rules so far: a linear layer with one position a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from ewc_fast._checks import state_dtype


class LinearUse:
    r"""One use :math:`z = a W^\top + b` with one position a sample, a: (N, in), z: (N, out).

    The per-sample gradient is the outer product :math:`g_n a_n^\top`, so

    .. math:: \sum_k \sum_n (g_{kn} a_n^\top)^2 = (\sum_k g_k \odot g_k)^\top (a \odot a),

    one product for any number k of backward passes.
    """

    def __init__(
        self, inputs: Tensor, output: Tensor, weight: str | None, bias: str | None
    ) -> None:
        self._inputs = inputs.detach()
        self._squares: Tensor | None = None
        self.edge = get_gradient_edge(output)  # of z as it is now, whatever is done to it in place
        self.weight, self.bias = weight, bias

    def add(self, grad: Tensor) -> None:
        """Take the gradient of one backward pass with respect to the layer's output."""
        squares = grad.to(state_dtype(grad.dtype)).square()
        self._squares = squares if self._squares is None else self._squares.add_(squares)

    def take(self) -> Tensor | None:
        """Return the sum of squares of the gradients added so far, (N, out); forget it."""
        squares, self._squares = self._squares, None
        return squares

    def add_to(self, sums: Mapping[str, Tensor]) -> None:
        """Add the squares to the sums of those parameters that are in it; forget them."""
        squares = self.take()
        if squares is None:
            return
        if self.weight is not None and self.weight in sums:
            inputs = self._inputs.to(squares.dtype).square()
            sums[self.weight].addmm_(squares.t(), inputs)
        if self.bias is not None and self.bias in sums:
            sums[self.bias].add_(squares.sum(0))


class Recorder(TorchFunctionMode):
    """Notes the operations that have a rule, and which parameters met which."""

    def __init__(self, params: Mapping[str, Tensor], samples: int) -> None:
        super().__init__()
        self._names = {id(param): name for name, param in params.items()}
        self._samples = samples
        self._times_used: dict[str, int] = {}
        self._met_no_rule: set[str] = set()
        self.uses: list[LinearUse] = []

    def recorded(self) -> set[str]:
        """Return the parameters whose every use was recorded: gradients add up before squaring.

        A second use would have to be added to the first before squaring, which no rule does yet.
        """
        once = {name for name, times in self._times_used.items() if times == 1}
        return once - self._met_no_rule

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and note it where a rule applies."""
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled():
            inputs, weight, bias = _linear_arguments(*args, **kwargs)
            if self._has_rule(inputs, weight):
                return self._record_linear(inputs, weight, bias)
        result = func(*args, **kwargs)
        if _requires_grad(result):
            self._met_no_rule |= {
                self._names[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._names
            }
        return result

    def _has_rule(self, inputs: Tensor, weight: Tensor) -> bool:
        return (
            inputs.dim() == 2
            and inputs.shape[0] == self._samples
            and inputs.dtype == weight.dtype
            and not torch.is_autocast_enabled(inputs.device.type)
        )

    def _record_linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        names = [self._names.get(id(t)) for t in (weight, bias)]
        # A weight that was computed from parameters needs its ordinary gradient.
        operands = [(weight, names[0])] + ([] if bias is None else [(bias, names[1])])
        if any(tensor.requires_grad and name is None for tensor, name in operands):
            self._met_no_rule |= {name for name in names if name is not None}
            return F.linear(inputs, weight, bias)
        output = F.linear(inputs, weight, bias)
        used = [name for name in names if name is not None]
        for name in used:
            self._times_used[name] = self._times_used.get(name, 0) + 1
        if used:
            self.uses.append(LinearUse(inputs, output, *names))
        return output


def _linear_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _tensors(value)]
    if isinstance(tree, (tuple, list)):
        return [tensor for value in tree for tensor in _tensors(value)]
    return []


def _requires_grad(result: Any) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(result))
