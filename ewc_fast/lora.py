r"""EWC on what low-rank adapters do to the weights that they adapt, not on their two factors.

An adapted linear layer has the weight :math:`W_0 + s B A`, with the frozen base weight
:math:`W_0` of shape (O, I), :math:`B` (O, r), :math:`A` (r, I) and the scaling :math:`s`. EWC's
distance from the anchor :math:`W_0` is therefore :math:`D = s B A` itself, and with the Fisher
diagonal :math:`F` of the base weight

.. math::
    \text{penalty} = \frac\lambda2 \sum_{ij} F_{ij} D_{ij}^2, \qquad
    \frac{\partial}{\partial B} = \lambda s (F \circ D) A^\top, \qquad
    \frac{\partial}{\partial A} = \lambda s B^\top (F \circ D).

Only :math:`F` is stored: no anchor, and no :math:`D`, which is formed some rows at a time.

The Fisher is taken of the base model before adapters freeze it (:func:`ewc_fast.fisher_diagonal`
measures trainable parameters), on the task to be remembered:

.. code-block:: python

    fisher = ewc_fast.fisher_diagonal(model, old_loader)
    model = peft.get_peft_model(model, peft.LoraConfig(...))
    penalty = LoRAPenalty(lora_deltas(model, fisher), ewc_lambda=400.0)
    ...
    loss.backward()
    penalty.add_penalty_grad_()  # or: (loss + penalty.penalty()).backward()
    optimizer.step()

What is trained whole beside the adapters (a head, biases) is :class:`ewc_fast.EWC`'s, as always; so
are the factors themselves, where the task to be remembered was learned in them.

References: Xiang et al., Language Models Meet World Models, NeurIPS 2023,
https://arxiv.org/abs/2305.10626 (EWC on the product of LoRA's factors); Hu et al. 2022,
https://arxiv.org/abs/2106.09685 (LoRA); Kirkpatrick et al. 2017,
https://doi.org/10.1073/pnas.1611835114, equation 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ewc_fast import _checks
from ewc_fast.strength import Strength

__all__ = ["LoRAPenalty", "LowRankDelta", "lora_deltas"]

BLOCK = 2**20  # entries of D formed at once: 4 MiB, which stay in cache between their uses


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """The change ``scaling * lora_b @ lora_a`` of one base weight, and that weight's Fisher.

    ``lora_a`` (r, I) and ``lora_b`` (O, r) are floating, of one dtype; ``fisher`` (O, I) is
    floating, >= 0, in any strides; all on one device. ``TypeError`` or ``ValueError`` otherwise.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    fisher: Tensor

    def __post_init__(self) -> None:
        _checks.low_rank_delta(self.lora_a, self.lora_b, self.fisher)

    @property
    def moves(self) -> bool:
        """Whether a factor is trained; else the change is a constant, as frozen parameters are."""
        return self.lora_a.requires_grad or self.lora_b.requires_grad


class LoRAPenalty(Strength):
    r"""The penalty :math:`\frac\lambda2 \sum F \circ (s B A)^2` of all adapted layers.

    Arithmetic is in float32 (float64 for float64 factors), sums of the value are in float64,
    whatever autocast is on. Every step reads F once: for O I entries, 4 O I bytes (2 O I of a
    bfloat16 Fisher) and 6 r O I operations; D and F D stay in blocks of some MiB. Runs repeat bit
    for bit on the CPU.

    Parameters
    ----------
    deltas
        Changes by their layers' names: :func:`lora_deltas`, or your own.
    ewc_lambda
        Strength :math:`\lambda \ge 0`, with its one half. Assign at any time.

    Examples
    --------
    >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> A.requires_grad_(), B.requires_grad_()
    (tensor([[1., 2.]], requires_grad=True), tensor([[3.]], requires_grad=True))
    >>> delta = LowRankDelta(A, B, scaling=0.5, fisher=torch.tensor([[4.0, 1.0]]))
    >>> penalty = LoRAPenalty({"layer": delta}, ewc_lambda=2.0)
    >>> penalty.penalty().item()  # 2/2 (4 * 1.5^2 + 1 * 3^2)
    18.0
    >>> penalty.add_penalty_grad_().item(), B.grad.item()
    (18.0, 12.0)
    """

    def __init__(self, deltas: Mapping[str, LowRankDelta], *, ewc_lambda: float) -> None:
        if not isinstance(deltas, Mapping):
            raise TypeError(
                f"deltas: expected LowRankDelta by layer name, got {type(deltas).__name__}; pass "
                "what lora_deltas returns, or {'layer': LowRankDelta(A, B, scaling, fisher)}"
            )
        self._deltas = dict(deltas)
        self.ewc_lambda = ewc_lambda

    @property
    def deltas(self) -> dict[str, LowRankDelta]:
        """The adapted layers' changes by name."""
        return dict(self._deltas)

    def penalty(self) -> Tensor:
        """Return the penalty, a float64 scalar differentiable once in all A and B."""
        values = [_sum_of_squares(delta) for delta in self._deltas.values() if delta.moves]
        return 0.5 * self.strength * _total(values)

    @torch.no_grad()
    def add_penalty_grad_(self) -> Tensor:
        """Add the penalty's gradient to every trained factor's ``.grad``; return the penalty.

        Call it after ``backward()``. Gradients are made where missing.
        """
        values = []
        for delta in self._deltas.values():
            if delta.moves:
                factors = delta.lora_a, delta.lora_b
                value, *halves = _with_half_gradients(delta.fisher, delta.scaling, *factors)
                values.append(value)
                for factor, half in zip(factors, halves, strict=True):
                    _add_to_gradient(factor, self.strength * half)
        return 0.5 * self.strength * _total(values)


def _total(values: list[Tensor]) -> Tensor:
    if not values:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def _add_to_gradient(factor: Tensor, pull: Tensor) -> None:
    if not factor.requires_grad:
        return
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    factor.grad.copy_(factor.grad.to(pull.dtype) + pull)  # rounded once


def _sum_of_squares(delta: LowRankDelta) -> Tensor:
    if torch.is_grad_enabled():
        total: Tensor = _SumOfSquares.apply(delta.fisher, delta.scaling, delta.lora_a, delta.lora_b)
        return total
    return _with_half_gradients(delta.fisher, delta.scaling, delta.lora_a, delta.lora_b)[0]


class _SumOfSquares(torch.autograd.Function):
    """sum F D^2. Its gradients are small and made with it, from the same read of F."""

    @staticmethod
    def forward(ctx: Any, fisher: Tensor, scaling: float, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        value, half_a, half_b = _with_half_gradients(fisher, scaling, lora_a, lora_b)
        ctx.dtype = lora_a.dtype
        ctx.save_for_backward(half_a, half_b)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor]:
        half_a, half_b = ctx.saved_tensors
        return None, None, (2 * grad * half_a).to(ctx.dtype), (2 * grad * half_b).to(ctx.dtype)


def _with_half_gradients(
    fisher: Tensor, scaling: float, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum F D^2 in float64, and half its gradients by A and B in the dtype computed in."""
    a, b = _precise(lora_a.detach()), _precise(lora_b.detach())
    value = torch.zeros((), dtype=torch.float64, device=a.device)
    half_a, half_b = torch.zeros_like(a), torch.empty_like(b)
    with torch.autocast(a.device.type, enabled=False):
        for rows in _blocks_of_rows(fisher):
            scaled = scaling * b[rows]
            change = scaled @ a
            pull = fisher[rows].to(a.dtype) * change
            half_a += scaled.T @ pull
            half_b[rows] = scaling * (pull @ a.T)
            value += change.mul_(pull).sum(dtype=torch.float64)
    return value, half_a, half_b


def _precise(factor: Tensor) -> Tensor:
    return factor.to(_checks.state_dtype(factor.dtype))


def _blocks_of_rows(fisher: Tensor) -> Iterator[slice]:
    outputs, inputs = fisher.shape
    step = max(1, BLOCK // max(1, inputs))
    for start in range(0, outputs, step):
        yield slice(start, start + step)


def lora_deltas(
    model: nn.Module, fisher: Mapping[str, Tensor], *, adapter: str = "default"
) -> dict[str, LowRankDelta]:
    """Find a peft model's LoRA layers, and the Fisher of the weights that they adapt.

    Nothing of peft is imported: a layer counts by what it has (``base_layer``, ``lora_A``,
    ``lora_B``, ``scaling``). ``fisher`` maps the base model's parameter names, as they were before
    the adapters or as they are now, to tensors of their shapes (transposed weights, GPT-2's, are
    understood); it may hold more.

    Raises
    ------
    ValueError
        Where there is no such adapter, ``fisher`` lacks an adapted weight, or a second adapter adds
        to the same weight, so that its change is not s B A alone.
    TypeError
        For adapters whose change is not s B A: of embeddings and convolutions, with a bias, DoRA
        and other variants.
    """
    found: dict[str, LowRankDelta] = {}
    for path, module in model.named_modules():
        if adapter in getattr(module, "lora_embedding_A", ()):
            raise TypeError(f"layer {path!r}: expected adapters of linear layers, got an embedding")
        if adapter in getattr(module, "lora_A", ()):
            name = path.removeprefix("base_model.model.")
            found[name] = _delta_of(module, _fisher_of(fisher, path, name), name, adapter)
    if not found:
        raise ValueError(
            f"model: expected LoRA layers with an adapter {adapter!r}, got none; add adapters by "
            "peft.get_peft_model first"
        )
    return found


def _fisher_of(fisher: Mapping[str, Tensor], path: str, name: str) -> Tensor:
    for key in (f"{name}.weight", f"{path}.base_layer.weight"):
        if key in fisher:
            return fisher[key]
    raise ValueError(
        f"fisher: missing for '{name}.weight', which an adapter changes; take it of the base "
        "model, before adapters freeze it"
    )


def _delta_of(module: Any, fisher: Tensor, name: str, adapter: str) -> LowRankDelta:
    others = [other for other in module.active_adapters if other != adapter]
    if others:
        raise ValueError(
            f"layer {name!r}: expected {adapter!r} to be the only active adapter, got {others} as "
            "well; merge or deactivate them"
        )
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    plain = isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and up.bias is None
    if not plain or adapter in getattr(module, "lora_variant", ()):
        raise TypeError(
            f"layer {name!r}: expected plain LoRA of a linear layer (no convolution, bias or "
            "variant such as DoRA), whose change is s B A"
        )
    return LowRankDelta(
        lora_a=down.weight,
        lora_b=up.weight,
        scaling=float(module.scaling[adapter]),
        fisher=fisher.T if getattr(module, "fan_in_fan_out", False) else fisher,
    )
