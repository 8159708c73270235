"""Every operation that a parameter can enter, each in a small model that ends in a linear layer.

``way`` is the slowest way that may be taken with the gradients of an operation's parameters: a
rule of the library; the operation's own backward pass, run once for the batch; or that pass run
for each sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, POSITIONS, Net, TimesWeight, features, sequences, tokens
from torch import Tensor, nn

RULE, OWN_BACKWARD, SAMPLE_BY_SAMPLE = "rule", "own backward", "sample by sample"
WAYS = (RULE, OWN_BACKWARD, SAMPLE_BY_SAMPLE)
WORDS, OUT = 8, 6


@dataclass(frozen=True)
class Operation:
    """What a model does before its head: samples are in dimension 0 of what ``run`` returns."""

    run: Callable[..., Tensor]
    parts: Callable[[], dict[str, nn.Module | nn.Parameter]]
    inputs: Callable[[int], Any] = features
    way: str = RULE

    def model(self) -> Net:
        """Return the model; its head has as many inputs as there are outputs to read."""
        net = Net(lambda m, *x: m.head(self.run(m, *x).tanh().flatten(1)), **self.parts())
        net.eval()
        x = self.inputs(2)
        with torch.no_grad():
            width = self.run(net, *x if isinstance(x, tuple) else (x,)).flatten(1).shape[1]
        net.head = nn.Linear(width, CLASSES)
        return net

    def data(self, *sizes: int) -> list[tuple[Any, Tensor]]:
        """Return batches of these sizes."""
        return [(self.inputs(size), torch.randint(CLASSES, (size,))) for size in sizes]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def positive(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def images(channels: int = 2, size: int = 5, dimensions: int = 2) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, *[size] * dimensions)


def of(run: Callable[..., Tensor], way: str = RULE, inputs: Callable[[int], Any] = features,
       **shapes: tuple[int, ...]) -> Operation:  # fmt: skip
    """Return an operation on parameters of these shapes."""
    return Operation(run, lambda: {k: parameter(*s) for k, s in shapes.items()}, inputs, way)


def layer(make: Callable[[], nn.Module], inputs: Callable[[int], Any] = features,
          way: str = RULE) -> Operation:  # fmt: skip
    """Return an operation that is a module's."""
    return Operation(lambda m, *x: m.body(*x), lambda: {"body": make()}, inputs, way)


def linear(inputs: Callable[[int], Any], bias: bool = True) -> Operation:
    return layer(lambda: nn.Linear(FEATURES, OUT, bias=bias), inputs)


def conv(dimensions: int, outputs: int = 4, kernel: int = 3, **options: Any) -> Operation:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return layer(lambda: kind(2, outputs, kernel, **options), images(2, 5, dimensions))


def transposed(dimensions: int, outputs: int = 4, **options: Any) -> Operation:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    return layer(lambda: kind(2, outputs, 3, **options), images(2, 3, dimensions))


W, B = (OUT, FEATURES), (OUT,)
HEADS = (2, FEATURES, 3)

PRODUCTS = {
    "linear": linear(features),
    "linear_without_bias": linear(features, bias=False),
    "linear_on_sequences": linear(sequences),
    "linear_on_sequences_without_bias": linear(sequences, bias=False),
    "linear_on_grids": linear(lambda n: torch.randn(n, 2, 3, FEATURES)),
    "linear_on_strided_rows": linear(lambda n: torch.randn(n, 2 * FEATURES)[:, ::2]),
    "linear_on_transposed_features": linear(
        lambda n: torch.randn(n, FEATURES, POSITIONS).transpose(1, 2)
    ),
    "linear_on_transposed_features_without_bias": linear(
        lambda n: torch.randn(n, FEATURES, POSITIONS).transpose(1, 2), bias=False
    ),
    "linear_with_scalar_outputs": of(lambda m, x: F.linear(x, m.w)[:, None], w=(FEATURES,)),
    "addmm": of(
        lambda m, x: torch.addmm(m.b, x, m.w.t(), beta=-0.5, alpha=2.0), w=W, b=B
    ),
    "addmm_with_a_parameter_first": of(
        lambda m, x: torch.addmm(m.b[:, None], m.w, x.t(), beta=2.0, alpha=3.0).t(), w=W, b=B
    ),
    "addmm_of_a_matrix_that_is_scaled": of(
        lambda m, x: torch.addmm(x, x.relu(), m.w, alpha=0.5), w=(FEATURES, FEATURES)
    ),
    "matmul": of(lambda m, x: x @ m.w, w=(FEATURES, OUT)),
    "matmul_with_a_parameter_first": of(lambda m, x: (m.w @ x.t()).t(), w=W),
    "matmul_of_sequences": of(lambda m, x: x @ m.w, inputs=sequences, w=(FEATURES, OUT)),
    "matmul_of_sequences_with_a_parameter_first": of(
        lambda m, x: m.w @ x, inputs=sequences, w=(3, POSITIONS)
    ),
    "matmul_with_a_matrix_for_each_head": of(
        lambda m, x: x.unsqueeze(1) @ m.w, inputs=sequences, w=HEADS
    ),
    "matmul_with_a_matrix_for_each_head_first": of(
        lambda m, x: m.w @ x.unsqueeze(1), inputs=sequences, w=(2, 3, POSITIONS)
    ),
    "bmm_of_an_expanded_parameter": of(
        lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), inputs=sequences, w=(FEATURES, OUT)
    ),
    "bmm_with_a_matrix_for_each_position": of(
        lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1),
        inputs=sequences, w=(POSITIONS, FEATURES, 3),
    ),
    "bmm_with_a_parameter_first": of(
        lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).permute(2, 0, 1),
        inputs=sequences, w=(POSITIONS, 3, FEATURES),
    ),
    "baddbmm": of(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w, beta=0.5, alpha=-2.0)
        .transpose(0, 1),
        inputs=sequences, w=(POSITIONS, FEATURES, 3), b=(POSITIONS, 1, 3),
    ),
    "addbmm": of(
        lambda m, x: torch.addbmm(m.b, x.transpose(0, 1), m.w), SAMPLE_BY_SAMPLE,
        inputs=sequences, w=(POSITIONS, FEATURES, 3), b=(1, 3),
    ),
    "einsum": of(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), inputs=sequences, w=W),
    "einsum_over_positions": of(
        lambda m, x: torch.einsum("nti,toi->no", x, m.w), inputs=sequences,
        w=(POSITIONS, OUT, FEATURES),
    ),
    "einsum_with_heads": of(
        lambda m, x: torch.einsum("nti,hik->nhtk", x, m.w), inputs=sequences, w=HEADS
    ),
    "einsum_of_two_inputs_and_a_parameter": of(
        lambda m, x: torch.einsum("ni,oij,nj->no", x, m.w, x.tanh()), w=(2, FEATURES, FEATURES)
    ),
    "einsum_over_a_diagonal": of(lambda m, x: torch.einsum("ni,ii->ni", x, m.w),
                                 w=(FEATURES, FEATURES)),
    "mv": of(lambda m, x: torch.mv(x, m.w)[:, None], w=(FEATURES,)),
    "addmv": of(lambda m, x: torch.addmv(m.b, x, m.w, alpha=2.0)[:, None],
                w=(FEATURES,), b=(1,)),
    "outer": of(lambda m, x: torch.outer(x[:, 0], m.w), w=B),
    "tensordot": of(
        lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [0, 1])),
        inputs=sequences, w=(POSITIONS, FEATURES, OUT),
    ),
    "bilinear": layer(lambda: nn.Bilinear(FEATURES, 3, OUT), lambda n: (features(n),
                                                                        torch.randn(n, 3))),
    "bilinear_on_sequences": layer(
        lambda: nn.Bilinear(FEATURES, FEATURES, 2), lambda n: (sequences(n), sequences(n))
    ),
    "cdist": of(lambda m, x: torch.cdist(x, m.w), SAMPLE_BY_SAMPLE, w=W),
    "cosine_similarity": of(
        lambda m, x: F.cosine_similarity(x[:, None], m.w, dim=-1), w=W
    ),
}  # fmt: skip

CONVOLUTIONS = {
    **{f"convolution_{d}d": conv(d) for d in (1, 2, 3)},
    **{f"convolution_{d}d_stride_padding_dilation": conv(d, stride=2, padding=2, dilation=2)
       for d in (1, 2, 3)},
    **{f"convolution_{d}d_groups": conv(d, groups=2) for d in (1, 2, 3)},
    "convolution_without_bias": conv(2, bias=False),
    "convolution_padding_same": conv(2, padding="same", dilation=2),
    "convolution_padding_same_of_an_even_kernel": conv(1, kernel=4, padding="same"),
    "convolution_depthwise": conv(2, outputs=2, groups=2),
    "convolution_of_one_pixel": conv(2, kernel=1),
    "convolution_over_the_whole_image": conv(2, kernel=5),
    **{f"convolution_padding_mode_{mode}": conv(2, padding=1, padding_mode=mode)
       for mode in ("circular", "reflect", "replicate")},
    "convolution_padding_mode_circular_1d": conv(1, padding=2, padding_mode="circular"),
    "convolution_channels_last": layer(
        lambda: nn.Conv2d(2, 4, 3), lambda n: images()(n).to(memory_format=torch.channels_last)
    ),
    "convolution_unequal_in_height_and_width": layer(
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)), images()
    ),
    "convolution_of_each_image_of_a_sequence": Operation(
        lambda m, x: m.body(x.flatten(0, 1)).unflatten(0, (len(x), -1)),
        lambda: {"body": nn.Conv2d(2, 3, 3)}, lambda n: torch.randn(n, 3, 2, 5, 5),
    ),
    **{f"transposed_{d}d": transposed(d) for d in (1, 2, 3)},
    **{f"transposed_{d}d_stride_padding": transposed(
        d, stride=2, padding=1, output_padding=1) for d in (1, 2, 3)},
    **{f"transposed_{d}d_groups": transposed(d, groups=2) for d in (1, 2, 3)},
    "transposed_dilation_without_bias": transposed(2, dilation=2, bias=False),
    "unfolded_by_hand": of(
        lambda m, x: m.w @ F.unfold(x, 3), inputs=images(), w=(3, 2 * 9)
    ),
}  # fmt: skip


# The graph has as many of these operations as there are samples.
CALLED_FOR_EACH_SAMPLE = {
    "linear": of(lambda m, x: torch.stack([F.linear(row, m.w, m.b) for row in x]), w=W, b=B),
    "mv": of(lambda m, x: torch.stack([torch.mv(m.w, row) for row in x]), w=W),
    "dot": of(lambda m, x: torch.stack([torch.dot(row, m.w) for row in x])[:, None],
              w=(FEATURES,)),
    "convolution": Operation(
        lambda m, x: torch.stack([m.body(image) for image in x]),
        lambda: {"body": nn.Conv2d(2, 3, 3)}, images(),
    ),
}  # fmt: skip


def repeated_tokens(n: int) -> Tensor:
    return torch.tensor([[1, 1, 0, 2], [3, 3, 3, 3], [0, 0, 1, 0], [5, 2, 5, 0]])[:n]


def bags(mode: str, weights: bool = False, **options: Any) -> Operation:
    make = lambda: nn.EmbeddingBag(WORDS, OUT, mode=mode, **options)  # noqa: E731
    if weights:
        return Operation(
            lambda m, x, w: m.body(x, per_sample_weights=w), lambda: {"body": make()},
            lambda n: (repeated_tokens(n), torch.randn(n, POSITIONS)),
        )  # fmt: skip
    return layer(make, repeated_tokens, SAMPLE_BY_SAMPLE if mode == "max" else RULE)


TABLE = (WORDS, OUT)
TABLES = {
    "embedding": layer(lambda: nn.Embedding(WORDS, OUT), tokens),
    "embedding_of_one_token": layer(lambda: nn.Embedding(WORDS, OUT), lambda n: tokens(n)[:, 0]),
    "embedding_of_grids": layer(lambda: nn.Embedding(WORDS, OUT),
                                lambda n: torch.randint(WORDS, (n, 2, 3))),
    "embedding_of_repeated_tokens": layer(lambda: nn.Embedding(WORDS, OUT), repeated_tokens),
    "embedding_padding_idx": layer(
        lambda: nn.Embedding(WORDS, OUT, padding_idx=0), repeated_tokens
    ),
    "embedding_negative_padding_idx": layer(
        lambda: nn.Embedding(WORDS, OUT, padding_idx=-3), repeated_tokens
    ),
    "embedding_sparse": layer(
        lambda: nn.Embedding(WORDS, OUT, sparse=True), repeated_tokens
    ),
    "embedding_of_a_slice": of(
        lambda m, x: F.embedding(x, m.w[2:]), inputs=repeated_tokens, w=(WORDS, OUT)
    ),
    "embedding_time_first": of(
        lambda m, x: F.embedding(x.t(), m.w).transpose(0, 1), inputs=repeated_tokens, w=TABLE
    ),
    "indexing": of(lambda m, x: m.w[x], inputs=repeated_tokens, w=TABLE),
    "indexing_from_the_end": of(lambda m, x: m.w[x - WORDS], inputs=repeated_tokens, w=TABLE),
    "indexing_a_table_of_matrices": of(
        lambda m, x: m.w[x], inputs=repeated_tokens, w=(WORDS, 2, 3)
    ),
    "indexing_two_dimensions": of(
        lambda m, x: m.w[x, x.flip(1)], SAMPLE_BY_SAMPLE, repeated_tokens, w=(WORDS, WORDS)
    ),
    "index_select": of(
        lambda m, x: m.w.index_select(0, x.flatten()).unflatten(0, x.shape),
        inputs=repeated_tokens, w=TABLE,
    ),
    "gather": of(
        lambda m, x: m.w.expand(len(x), -1).gather(1, x), inputs=repeated_tokens, w=(WORDS,)
    ),
    "one_hot_times_table": of(
        lambda m, x: F.one_hot(x, WORDS).to(m.w) @ m.w, inputs=repeated_tokens, w=TABLE
    ),
    **{f"embedding_bag_{mode}": bags(mode) for mode in ("sum", "mean", "max")},
    "embedding_bag_padding_idx": bags("sum", padding_idx=0),
    "embedding_bag_per_sample_weights": bags("sum", weights=True),
    "embedding_bag_offsets": Operation(
        lambda m, x: m.body(x.flatten(), torch.arange(0, x.numel(), POSITIONS)),
        lambda: {"body": nn.EmbeddingBag(WORDS, OUT)}, repeated_tokens,
    ),
    "embedding_bag_of_different_lengths": Operation(
        lambda m, x, lengths: m.body(
            torch.cat([row[:k] for row, k in zip(x, lengths, strict=True)]),
            lengths.cumsum(0) - lengths),
        lambda: {"body": nn.EmbeddingBag(WORDS, OUT, mode="mean")},
        lambda n: (repeated_tokens(n), torch.tensor([2, 0, 4, 1])[:n]),
    ),
    "embedding_bag_of_positions": Operation(
        lambda m, x: m.body(x.unfold(1, 2, 1).flatten(0, 1)).view(len(x), -1),
        lambda: {"body": nn.EmbeddingBag(WORDS, OUT, mode="sum")}, repeated_tokens,
    ),
    "custom_function": of(lambda m, x: TimesWeight.apply(x, m.w), SAMPLE_BY_SAMPLE,
                          w=(FEATURES, OUT)),
}  # fmt: skip
