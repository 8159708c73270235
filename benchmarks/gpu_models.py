"""The models whose Fisher diagonals are measured on a GPU, and random data for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from fisher_models import LanguageModel, VisionTransformer
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Llama:
    """Llama's sizes."""

    words: int = 32_000
    width: int = 2048
    hidden: int = 5504
    blocks: int = 24
    heads: int = 16


class RotaryAttention(nn.Module):
    """Causal self-attention whose queries and keys are turned by their position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Mix the positions of (samples, positions, width)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(
            rotated(q, turn), rotated(k, turn), v, is_causal=True
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with the pairs (x_i, x_{i + d/2}) turned."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def turns(positions: int, dimensions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position times frequency, (positions, dimensions)."""
    where = torch.arange(positions, device=like.device, dtype=torch.float32)
    powers = torch.arange(0, dimensions, 2, device=like.device, dtype=torch.float32) / dimensions
    angles = torch.outer(where, 10_000.0**-powers).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class LlamaBlock(nn.Module):
    """Attention, then a gated product; RMSNorm before each."""

    def __init__(self, at: Llama) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(at.width, eps=1e-5) for _ in range(2))
        self.attention = RotaryAttention(at.width, at.heads)
        self.gate, self.up = (nn.Linear(at.width, at.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(at.hidden, at.width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return the block's output."""
        x = x + self.attention(self.norm1(x), turn)
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class LlamaModel(nn.Module):
    """Llama's form: RMSNorm, rotary positions, SwiGLU, an output of its own."""

    def __init__(self, at: Llama) -> None:
        super().__init__()
        self.tokens = nn.Embedding(at.words, at.width)
        self.blocks = nn.ModuleList(LlamaBlock(at) for _ in range(at.blocks))
        self.norm = nn.RMSNorm(at.width, eps=1e-5)
        self.head = nn.Linear(at.width, at.words, bias=False)
        self.dimensions = at.width // at.heads
        for param in self.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each position's next token."""
        x = self.tokens(tokens)
        turn = turns(tokens.shape[1], self.dimensions, x)
        for block in self.blocks:
            x = block(x, turn)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Bottleneck(nn.Module):
    """ResNet-50's: 1x1, 3x3, 1x1 convolutions beside an identity or a projection."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Sequential:
    """Return ResNet-50 for 1,000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]  # fmt: skip
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def vit(pixels: int, patch: int, width: int, heads: int, blocks: int) -> nn.Module:
    """Return a ViT for 1,000 classes."""
    model = VisionTransformer(pixels, patch, width, heads, blocks)
    model.head = nn.Linear(width, 1000)
    return model


@dataclass(frozen=True)
class GpuWorkload:
    """A model, how it runs, its data, and what its Fisher may cost."""

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[int], Batch]  # of so many samples
    samples: int
    few: Callable[[], Batch]  # two samples that one sample at a time can be tried on
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    words: bool = False  # a causal language model: targets are the tokens
    bound: float | None = None  # on its time, in units of a forward and backward pass

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Return what its forward passes run in."""
        if self.autocast:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    @property
    def rounds_to_bfloat16(self) -> bool:
        """Whether its products have operands of eight bits."""
        return self.autocast or self.dtype == torch.bfloat16


def language(words: int, positions: int, samples: int) -> Batch:
    """Return token ids, which are their own targets."""
    tokens = torch.randint(words, (samples, positions))
    return tokens, tokens


def images(pixels: int, samples: int) -> Batch:
    """Return images of three colours and classes of 1,000."""
    return torch.randn(samples, 3, pixels, pixels), torch.randint(1000, (samples,))


def _llama(at: Llama, positions: int, samples: int, bound: float | None) -> GpuWorkload:
    count = sum(param.numel() for param in _on_meta(lambda: LlamaModel(at)).parameters())
    return GpuWorkload(
        f"Llama's form, {count / 1e9:.2g}B parameters, bfloat16, {samples} x {positions}",
        lambda: LlamaModel(at), partial(language, at.words, positions), samples,
        lambda: language(at.words, min(positions, 256), 2),
        dtype=torch.bfloat16, words=True, bound=bound,
    )  # fmt: skip


def _gpt2(words: int, positions: int, width: int, heads: int, blocks: int, samples: int,
          dtype: torch.dtype) -> GpuWorkload:  # fmt: skip
    kind = str(dtype).removeprefix("torch.")
    return GpuWorkload(
        f"GPT-2's form, {blocks} blocks of {width}, {kind}, {samples} x {positions}",
        lambda: LanguageModel(words, positions, width, heads, blocks),
        partial(language, words, positions), samples,
        lambda: language(words, min(positions, 256), 2), dtype=dtype, words=True,
    )  # fmt: skip


def _image(title: str, make: Callable[[], nn.Module], pixels: int, samples: int,
           bound: float | None, *, autocast: bool) -> GpuWorkload:  # fmt: skip
    kind = "bfloat16 autocast" if autocast else "TF32"
    return GpuWorkload(
        f"{title}, {kind}, batch {samples}", make, partial(images, pixels), samples,
        partial(images, pixels, 2), autocast=autocast, bound=bound,
    )  # fmt: skip


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def workloads(quick: bool) -> list[GpuWorkload]:
    """Return the models, the most telling first."""
    if quick:
        small = Llama(words=40, width=16, hidden=24, blocks=2, heads=2)
        net = partial(resnet50, 4, (1, 1, 1, 1))
        return [
            _llama(small, positions=12, samples=3, bound=None),
            _image("ResNet of 4", net, 32, 3, None, autocast=False),
            _image("ResNet of 4", net, 32, 3, None, autocast=True),
            _image("ViT, 1 block of 8", partial(vit, 8, 4, 8, 2, 1), 8, 3, None, autocast=False),
            _gpt2(30, 8, 16, 2, 1, samples=3, dtype=torch.float32),
        ]
    b16 = partial(vit, 224, 16, 768, 12, 12)
    return [
        _llama(Llama(), positions=2048, samples=8, bound=1.15),
        _image("ResNet-50", resnet50, 224, 128, 1.3, autocast=True),
        _image("ViT-B/16", b16, 224, 128, 1.3, autocast=True),
        _image("ResNet-50", resnet50, 224, 128, 1.3, autocast=False),
        _gpt2(50_257, 1024, 768, 12, 12, samples=8, dtype=torch.bfloat16),
        _image("ViT-B/16", b16, 224, 128, 1.3, autocast=False),
    ]
