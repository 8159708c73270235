"""A parameter used more than once, or by way of others: its gradients add up before the square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers import cells
from models import FEATURES, POSITIONS, Net, features, frozen, sequences, tokens
from operations import OUT, WORDS, Operation, images, of, parameter, positive
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as weight_norm_by_hooks

from ewc_fast import fisher_diagonal

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SQUARE = (FEATURES, FEATURES)


def pairs(n: int) -> tuple[Tensor, Tensor]:
    return features(n), features(n)


def made(run: Callable[..., Tensor], inputs: Callable[[int], Any] = features,
         **parts: Callable[[], nn.Module | nn.Parameter]) -> Operation:  # fmt: skip
    """Return a model before its head, from what makes its parts."""
    return Operation(run, lambda: {name: make() for name, make in parts.items()}, inputs)


def siamese_in_one_call(m: Net, x: Tensor, y: Tensor) -> Tensor:
    first, second = m.body(torch.cat([x, y])).tanh().chunk(2)
    return (first - second).abs()


def siamese_in_two_calls(m: Net, x: Tensor, y: Tensor) -> Tensor:
    return (m.body(x).tanh() - m.body(y).tanh()).abs()


def chunks(m: Net, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w) for w in m.w.chunk(3))
    return F.scaled_dot_product_attention(q, k, v)


def recurrence(m: Net, x: Tensor) -> Tensor:
    h = x[:, 0]
    for step in x.unbind(1):
        h = (m.body(h) + step).tanh()
    return h


def shared_layer() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


def two_layers_of_one_weight() -> nn.Sequential:
    first, second = shared_layer(), shared_layer()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


SHARED = {
    "embedding_tied_to_the_output": made(
        lambda m, x: m.embed(x).tanh().mean(1) @ m.embed.weight.t(), tokens,
        embed=lambda: nn.Embedding(WORDS, OUT),
    ),
    "embedding_tied_to_the_output_with_padding": made(
        lambda m, x: F.linear(m.embed(x).tanh(), m.embed.weight), tokens,
        embed=lambda: nn.Embedding(WORDS, OUT, padding_idx=1),
    ),
    "embedding_looked_up_twice": made(
        lambda m, x: m.embed(x) * m.embed(x.flip(1)), tokens, embed=lambda: nn.Embedding(WORDS, OUT)
    ),
    "recurrence_by_hand": made(recurrence, sequences, body=shared_layer),
    "recurrence_of_cells": made(cells, sequences, body=lambda: nn.GRUCell(FEATURES, 3)),
    "module_called_twice": made(lambda m, x: m.body(m.body(x).tanh()), body=shared_layer),
    "module_called_on_sequences_and_rows": made(
        lambda m, x: m.body(x).tanh().sum(1) + m.body(x[:, 0]), sequences, body=shared_layer
    ),
    "weight_of_two_layers": made(lambda m, x: m.body(x), body=two_layers_of_one_weight),
    "convolution_called_twice": made(
        lambda m, x: m.body(m.body(x).tanh()), images(2, 4),
        body=lambda: nn.Conv2d(2, 2, 3, padding=1),
    ),
    "norm_called_twice": made(
        lambda m, x: m.norm(m.norm(x).tanh() + x), norm=lambda: nn.LayerNorm(FEATURES)
    ),
    "siamese_in_one_call": made(siamese_in_one_call, pairs, body=shared_layer),
    "siamese_in_two_calls": made(siamese_in_two_calls, pairs, body=shared_layer),
    "siamese_convolution_in_one_call": made(
        siamese_in_one_call, lambda n: (images()(n), images()(n)), body=lambda: nn.Conv2d(2, 3, 3)
    ),
    "chunks_of_a_packed_weight": of(chunks, inputs=sequences, w=(3 * OUT, FEATURES)),
    "overlapping_slices": of(lambda m, x: F.linear(x, m.w[:4]).tanh() * F.linear(x, m.w[2:]),
                             w=(OUT, FEATURES)),
    "disjoint_slices_of_columns": of(lambda m, x: x[:, :2] @ m.w[:, :2].t()
                                     * (x[:, 2:] @ m.w[:, 2:].t()).tanh(), w=(OUT, FEATURES)),
    "a_slice_and_the_whole": of(lambda m, x: x @ m.w.t() + (x * m.w[0]).sum(1, keepdim=True).tanh(),
                                w=(OUT, FEATURES)),
    "weight_that_is_also_a_bias": of(lambda m, x: F.linear(x, m.w, m.w[0]), w=SQUARE),
    "weight_that_is_also_a_scale": of(lambda m, x: F.linear(x * m.w[:, 0], m.w), w=SQUARE),
    "weight_and_its_transpose": of(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()),
                                   w=(OUT, FEATURES)),
    "square_weight_and_its_transpose": of(lambda m, x: x @ m.w + (x @ m.w.t()).tanh(), w=SQUARE),
    "in_three_kinds_of_operation": of(
        lambda m, x: x @ m.w + x * m.w[0] + F.layer_norm(x, (FEATURES,), m.w[1], m.w[2]), w=SQUARE
    ),
    "added_and_multiplied": of(lambda m, x: (x + m.w) * m.w, w=(FEATURES,)),
    "multiplied_by_itself": of(lambda m, x: x * m.w * m.w, w=(FEATURES,)),
    "two_that_are_added_before_use": of(lambda m, x: F.linear(x, m.v + m.w),
                                        v=(OUT, FEATURES), w=(OUT, FEATURES)),
    "three_in_two_sums": of(
        lambda m, x: x * (m.u + m.v) + (x * (m.v + m.w)).tanh(),
        u=(FEATURES,), v=(FEATURES,), w=(FEATURES,),
    ),
    "positions_looked_up_once": made(
        lambda m, x: (x + m.embed(torch.arange(POSITIONS))).tanh(), sequences,
        embed=lambda: nn.Embedding(POSITIONS, FEATURES),
    ),
    "positions_looked_up_once_and_twice_each": made(
        lambda m, x: (x + m.embed(torch.arange(POSITIONS) // 2)).tanh(), sequences,
        embed=lambda: nn.Embedding(POSITIONS, FEATURES),
    ),
    "relative_positions": of(
        lambda m, x: (x @ x.mT + m.w[torch.arange(POSITIONS) - torch.arange(POSITIONS)[:, None]])
        .softmax(-1) @ x,
        inputs=sequences, w=(2 * POSITIONS,),
    ),
}  # fmt: skip


class Symmetric(nn.Module):
    """Makes of a matrix one that is its own transpose."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


def symmetric() -> nn.Module:
    layer = shared_layer()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class LowRank(nn.Module):
    """A frozen layer beside which a product of two small matrices is learned."""

    def __init__(self, *, zeros: bool) -> None:
        super().__init__()
        self.layer = frozen(nn.Linear(FEATURES, OUT), "weight", "bias")
        self.a = nn.Linear(FEATURES, 2, bias=False)
        self.b = nn.Linear(2, OUT, bias=False)
        if zeros:
            nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.b(self.a(x))


def body(make: Callable[[], nn.Module], inputs: Callable[[int], Any] = features) -> Operation:
    return made(lambda m, x: m.body(x), inputs, body=make)


REPARAMETRISED = {
    "weight_norm": body(lambda: parametrizations.weight_norm(nn.Linear(FEATURES, OUT))),
    "weight_norm_over_all": body(
        lambda: parametrizations.weight_norm(nn.Linear(FEATURES, OUT), dim=None)
    ),
    "weight_norm_of_a_convolution": body(
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), images()
    ),
    "spectral_norm": body(lambda: parametrizations.spectral_norm(nn.Linear(FEATURES, OUT)).eval()),
    "orthogonal": body(lambda: parametrizations.orthogonal(nn.Linear(FEATURES, OUT))),
    "own_parametrization": body(symmetric),
    "own_parametrization_called_twice": made(
        lambda m, x: m.body(m.body(x).tanh()), body=symmetric
    ),
    "low_rank": body(lambda: LowRank(zeros=False)),
    "low_rank_with_zeros": body(lambda: LowRank(zeros=True)),
    "low_rank_update_of_a_weight": of(
        lambda m, x: F.linear(x, m.w.detach() + m.b @ m.a),
        w=(OUT, FEATURES), a=(2, FEATURES), b=(OUT, 2),
    ),
    "low_rank_update_that_is_zero": made(
        lambda m, x: F.linear(x, m.b @ m.a),
        a=lambda: parameter(2, FEATURES), b=lambda: nn.Parameter(torch.zeros(OUT, 2)),
    ),
    "multiplied_by_a_buffer": made(
        lambda m, x: F.linear(x, m.body.weight * m.mask.running_var),
        body=lambda: nn.Linear(FEATURES, OUT), mask=lambda: nn.BatchNorm1d(FEATURES, affine=False),
    ),
    "pruned": of(lambda m, x: F.linear(x, m.w * (m.w.abs() > 0.5)), w=(OUT, FEATURES)),
    "scaled_by_a_constant": of(lambda m, x: F.linear(x, m.w * 0.3), w=(OUT, FEATURES)),
    "normalised_rows": of(lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), w=(OUT, FEATURES)),
    "exponential": of(lambda m, x: x * m.w.exp(), w=(FEATURES,)),
    "softmax_of_weights": of(lambda m, x: (m.w.softmax(0)[:, None] * x).sum(1),
                             inputs=sequences, w=(POSITIONS,)),
    "decay": made(lambda m, x: x.cumsum(1) * -m.w.exp(), sequences, w=lambda: positive(FEATURES)),
    "concatenated_before_use": of(lambda m, x: F.linear(x, torch.cat([m.v, m.w])),
                                  v=(2, FEATURES), w=(4, FEATURES)),
    "stacked_before_use": of(lambda m, x: x @ torch.stack([m.v, m.w], 1),
                             v=(FEATURES,), w=(FEATURES,)),
    "flipped_before_use": of(lambda m, x: F.linear(x, m.w.flip(0)), w=(OUT, FEATURES)),
    "padded_before_use": of(lambda m, x: F.linear(x, F.pad(m.w, (1, 1))), w=(OUT, FEATURES - 2)),
    "repeated_before_use": of(lambda m, x: F.linear(x, m.w.repeat(2, 1)), w=(3, FEATURES)),
    "rows_picked_before_use": of(lambda m, x: F.linear(x, m.w[torch.tensor([2, 0, 2])]),
                                 w=(3, FEATURES)),
    "hypernetwork": made(
        lambda m, x: F.linear(x, m.net(m.code).view(OUT, FEATURES)),
        code=lambda: parameter(3), net=lambda: nn.Linear(3, OUT * FEATURES),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_all_uses_add_up_before_the_square(name):
    operation = SHARED[name]
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_gradients_reach_parameters_by_way_of_what_is_made_of_them(name):
    operation = REPARAMETRISED[name]
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


def test_weight_norm_by_hooks(monkeypatch):
    operation = body(lambda: weight_norm_by_hooks(nn.Linear(FEATURES, OUT)))
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = operation.model()
    data = operation.data(4, 3)
    found = fisher_diagonal(model, data)
    with torch.no_grad():
        model(data[0][0])  # a weight that was computed under autograd can't be copied
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


def test_a_lora_with_zeros_has_no_fisher_for_its_first_matrix_and_one_for_its_second():
    operation = REPARAMETRISED["low_rank_with_zeros"]
    model = operation.model()
    found = fisher_diagonal(model, operation.data(4, 3))
    assert not found["body.a.weight"].any()
    assert found["body.b.weight"].any()


def test_a_frozen_weight_beside_a_shared_one_is_left_out_and_harmless():
    operation = SHARED["in_three_kinds_of_operation"]
    model, data = operation.model(), operation.data(4, 3)
    frozen(model.head, "weight")
    found = fisher_diagonal(model, data)
    assert list(found) == ["w", "head.bias"]
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


def test_second_uses_are_added_even_where_the_first_samples_do_not_show_them():
    model = made(lambda m, x: m.body(m.body(x).tanh()), body=shared_layer).model()
    x, y = torch.randn(6, FEATURES), torch.randint(3, (6,))
    x[:3] = 0  # with a bias of 0 the gradients of a weight are 0, however it is used
    nn.init.zeros_(model.body.bias)
    oracle.assert_fisher(fisher_diagonal(model, [(x, y)]), model, [(x, y)])
