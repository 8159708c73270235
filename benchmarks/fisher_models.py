"""The models whose Fisher diagonals are measured, M1 to M7, and random data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and its data; logits have the classes last, and may have positions before them."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, Generator], Tensor]
    labels: Callable[[int, Generator], Tensor]
    batch_size: int
    exact: bool = False  # is the exact Fisher measured too


def features(*shape: int) -> Callable[[int, Generator], Tensor]:
    """Return what makes inputs of this shape."""
    return lambda samples, draw: torch.randn(samples, *shape, generator=draw)


def classes(count: int, *positions: int) -> Callable[[int, Generator], Tensor]:
    """Return what makes class numbers: labels, or tokens."""
    return lambda samples, draw: torch.randint(count, (samples, *positions), generator=draw)


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(*channels: int) -> nn.Sequential:
    """Return three 3x3 convolutions, the second with stride 2, a mean and a linear layer."""
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1), nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(second, third, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10),
    )  # fmt: skip


class BasicBlock(nn.Module):
    """ResNet's: two convolutions with batch norm, beside an identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def resnet18(width: int) -> nn.Sequential:
    """Return ResNet-18 for 32x32: a 3x3 stem without pooling, four stages of two blocks."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    ]  # fmt: skip
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [BasicBlock(inputs, outputs, 1 + (stage > 0)), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Attention(nn.Module):
    """Self-attention, with one product for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of (samples, positions, width)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (q.unflatten(-1, (self.heads, -1)).transpose(1, 2),
                   k.unflatten(-1, (self.heads, -1)).transpose(1, 2),
                   v.unflatten(-1, (self.heads, -1)).transpose(1, 2))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerBlock(nn.Module):
    """Attention and two linear layers; the norms come before them (GPT-2, ViT) or after (BERT)."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, late: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=causal)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        if self.late:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.mlp(x))
        else:
            x = x + self.attention(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return x


class LanguageModel(nn.Module):
    """GPT-2's form: tokens and positions embedded, causal blocks, output tied to the tokens."""

    def __init__(self, words: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        _small(self.tokens, self.positions)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=True) for _ in range(blocks))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each position's next token."""
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(where)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class VisionTransformer(nn.Module):
    """ViT's form: patches by a convolution, a token of the class, learned positions."""

    def __init__(self, pixels: int, patch: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.summary = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (pixels // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class Bert(nn.Module):
    """BERT's form: a large table of words, a pooled first token, two classes."""

    def __init__(self, words: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        _small(self.tokens, self.positions)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, late=True) for _ in range(blocks))
        )
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the classes."""
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.norm(self.tokens(tokens) + self.positions(where)))
        logits: Tensor = self.head(torch.tanh(self.pooler(x[:, 0])))
        return logits


class Recurrent(nn.Module):
    """An LSTM over features, whose last state is classified."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        states, _ = self.lstm(x)
        logits: Tensor = self.head(states[:, -1])
        return logits


def _small(*tables: nn.Embedding) -> None:
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)


def gpt2(words: int, length: int, width: int, blocks: int, batch_size: int) -> Workload:
    """Return a language model; a sample is a sequence, its loss the sum over positions."""
    title = f"GPT-2, {blocks} blocks of {width}, {words:,} words, {length} positions"
    return Workload(title, lambda: LanguageModel(words, length, width, 4, blocks),
                    classes(words, length), classes(words, length), batch_size)  # fmt: skip


def bert(words: int, length: int, width: int, batch_size: int) -> Workload:
    """Return BERT with two blocks and two heads."""
    title = f"BERT, 2 blocks of {width}, {words:,} words, {length} positions"
    return Workload(title, lambda: Bert(words, length, width, 2, 2),
                    classes(words, length), classes(2), batch_size)  # fmt: skip


def dense(batch_size: int, *widths: int, exact: bool = False) -> Workload:
    """Return a perceptron."""
    return Workload("-".join(map(str, widths)), lambda: perceptron(*widths),
                    features(widths[0]), classes(widths[-1]), batch_size, exact)  # fmt: skip


def image(title: str, make: Callable[[], nn.Module], pixels: int, batch_size: int,
          *, exact: bool = False) -> Workload:  # fmt: skip
    """Return a classifier of images of three colours."""
    return Workload(title, make, features(3, pixels, pixels), classes(10), batch_size, exact)


FULL: dict[str, Workload] = {
    "M1": dense(256, 784, 400, 400, 10, exact=True),
    "M1b": dense(256, 784, 2000, 2000, 10),
    "M2": image("CNN 32-64-128", lambda: convolutional(32, 64, 128), 32, 128, exact=True),
    "M3": image("ResNet-18", lambda: resnet18(64), 32, 32),
    "M4": gpt2(words=1000, length=128, width=256, blocks=4, batch_size=16),
    "M5": image("ViT, 6 blocks of 192", lambda: VisionTransformer(32, 4, 192, 3, 6), 32, 64),
    "M6": bert(words=30_522, length=64, width=128, batch_size=32),
    "M7": Workload("LSTM 64-128, 32 steps", lambda: Recurrent(64, 128),
                   features(32, 64), classes(10), 64),
}  # fmt: skip

QUICK: dict[str, Workload] = {
    "M1": dense(8, 20, 16, 5, exact=True),
    "M2": image("CNN 4-6-8", lambda: convolutional(4, 6, 8), 8, 4, exact=True),
    "M3": image("ResNet-18 of 4", lambda: resnet18(4), 16, 4),
    "M4": gpt2(words=20, length=6, width=16, blocks=1, batch_size=4),
    "M5": image("ViT, 1 block of 8", lambda: VisionTransformer(8, 4, 8, 2, 1), 8, 4),
    "M6": bert(words=40, length=5, width=8, batch_size=4),
    "M7": Workload("LSTM 4-6, 3 steps", lambda: Recurrent(4, 6), features(3, 4), classes(10), 4),
}
