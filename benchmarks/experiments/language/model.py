"""A small GPT over bytes, and low-rank adapters for its linear layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc_fast import LowRankDelta

from .text import BYTES


class GPT(nn.Module):
    """Bytes (N, T) to logits (N, T, 256) of the next one; T at most ``length``.

    Blocks normalise first (GPT-2), the output layer is the embedding again; all weights by the
    seed.
    """

    def __init__(self, *, width: int, blocks: int, heads: int, length: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bytes = nn.Embedding(BYTES, width)
            self.positions = nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
            self.norm = nn.LayerNorm(width)
            for embedding in (self.bytes, self.positions):
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the byte after each position."""
        x = self.bytes(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.bytes.weight)


class Block(nn.Module):
    """Causal attention and a perceptron, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, T, width) for (N, T, width)."""
        x = x + self.mix(self._attention(self.before_attention(x)))
        return x + self.narrow(F.gelu(self.widen(self.before_perceptron(x))))

    def _attention(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, H, D)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (N, H, T, D)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(-2)


class Adapted(nn.Module):
    """A frozen linear layer plus ``scaling * B A x``; B starts at zero, and only A and B learn."""

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's outputs."""
        return self.base(x) + self.scaling * (x @ self.lora_a.T @ self.lora_b.T)


def adapt(model: GPT, *, rank: int, scaling: float, seed: int) -> dict[str, Adapted]:
    """Freeze the model and adapt every linear layer of its blocks; return those by their names."""
    model.requires_grad_(False)
    adapted = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, block in model.blocks.named_children():
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    wrapped = Adapted(layer, rank=rank, scaling=scaling)
                    setattr(block, name, wrapped)
                    adapted[f"blocks.{path}.{name}"] = wrapped
    return adapted


def deltas(adapted: Mapping[str, Adapted], fisher: Mapping[str, Tensor]) -> dict[str, LowRankDelta]:
    """Return what the adapters change, with the base weights' Fisher, for a ``LoRAPenalty``."""
    return {
        name: LowRankDelta(
            layer.lora_a, layer.lora_b, layer.scaling, fisher=fisher[f"{name}.weight"]
        )
        for name, layer in adapted.items()
    }
