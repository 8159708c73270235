"""Networks in plain PyTorch, tiny, each with a structure that real models have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Net
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

WIDTH, WORDS, LENGTH, CLASSES = 8, 30, 6, 4


class LanguageLSTM(nn.Module):
    """Two LSTM layers between an embedding and the output layer that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states).transpose(1, 2)


def packed_gru(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
    """Run over sequences of different lengths: rows are the samples that still go on."""
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    states, _ = m.gru(packed)
    padded, _ = pad_packed_sequence(states, batch_first=True, total_length=LENGTH)
    return m.head(padded.sum(1))


class UNet(nn.Module):
    """Down by strides, up by transposed convolutions, joined by concatenation."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(8, affine=True),
            nn.SiLU(),
        )
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.last = nn.Conv2d(8, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x)
        return self.last(torch.cat([high, self.up(self.down(high)).relu()], dim=1))


def batch_normed(*, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, dilation=2, groups=2), nn.PReLU(8), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 4 * 4, CLASSES),
    )  # fmt: skip
    return net.to(memory_format=memory_format)


class MixtureOfExperts(nn.Module):
    """Each position passes the one expert that its gate prefers, expert by expert."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(experts)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        rows = h.flatten(0, 1)  # samples times positions
        share, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (at,) = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, at, expert(rows[at]) * share[at, None])
        return self.head((h + out.view_as(h)).mean(1))


class Block(nn.Module):
    """A transformer block before whose parts the inputs are normalised."""

    def __init__(self, *, heads: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Embedding, learned positions that broadcast over the samples, blocks, tied output layer."""

    def __init__(self, *, blocks: int = 2, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.run = run or (lambda block, x: block(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * math.sqrt(WIDTH) + self.positions
        for block in self.blocks:
            x = self.run(block, x)
        return F.linear(self.norm(x), self.embed.weight).transpose(1, 2)


def checkpointed(*, use_reentrant: bool) -> Transformer:
    return Transformer(run=lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant))


def looked_up_positions(m: Net, tokens: Tensor) -> Tensor:
    """The positions' embedding is looked up once for all samples."""
    return m.head((m.embed(tokens) + m.positions(torch.arange(LENGTH))).tanh().mean(1))


def encoder_decoder_time_first(m: Net, source: Tensor, target: Tensor) -> Tensor:
    """nn.Transformer as it is by default: samples in dimension 1."""
    return m.head(m.body(source.transpose(0, 1), target.transpose(0, 1)).mean(0))


def attention_with_added_keys(m: Net, x: Tensor) -> Tensor:
    mixed, _ = m.attention(x, x, x)
    return m.head((x + mixed).mean(1))


def time_first_transformer() -> Net:
    body = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH)
    return Net(encoder_decoder_time_first, body=body, head=head())


def attention(**options: Any) -> Net:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
    return Net(attention_with_added_keys, attention=layer, head=head())


def two_towers(m: Net, image: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    seen = m.see(image).mean((2, 3))
    return m.head(torch.cat([seen, m.read(words)], dim=1).tanh() * scale)


def head(outputs: int = CLASSES) -> nn.Linear:
    return nn.Linear(WIDTH, outputs)
