"""Small models, each with something that a Fisher could get wrong, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

CLASSES, FEATURES, POSITIONS = 3, 5, 4


def mlp(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 7, **options),
        nn.Tanh(),
        nn.Linear(7, 6, **options),
        nn.ReLU(inplace=True),
        nn.Linear(6, CLASSES, **options),
    )


class Net(nn.Module):
    """A model from its parts and one expression."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.forward_of = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_of(self, *args, **kwargs)


def convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 9, CLASSES),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def reads_last_state(m: Net, x: Tensor) -> Tensor:
    states, _ = m.lstm(x)
    return m.head(states[:, -1])


def time_first() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(m.body(x.transpose(0, 1)).tanh().mean(0))

    return Net(forward, body=linear(), head=head())


def routes_to_an_expert(m: Net, x: Tensor) -> Tensor:
    """Only the positions whose first feature is positive pass the expert, all in one product."""
    chosen = x[:, :, 0] > 0
    routed = m.expert(x[chosen]).tanh()
    sample = chosen.nonzero()[:, 0]
    return m.head(x.new_zeros(len(x), 6).index_add(0, sample, routed))


class TimesWeight(torch.autograd.Function):
    """An operation that no function mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def without_entries() -> nn.Linear:
    layer = linear()
    layer.weight, layer.bias = (nn.Parameter(p.detach()[:0]) for p in layer.parameters())
    return layer


def linear(inputs: int = FEATURES, outputs: int = 6, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def head() -> nn.Linear:
    return nn.Linear(6, CLASSES)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def features(n: int) -> Tensor:
    return torch.randn(n, FEATURES)


def sequences(n: int) -> Tensor:
    return torch.randn(n, POSITIONS, FEATURES)


def tokens(n: int) -> Tensor:
    return torch.randint(8, (n, POSITIONS))


def unevenly_routed(n: int) -> Tensor:
    """As many positions chosen as there are samples, but two of sample 1 and none of sample 2."""
    x = torch.randn(n, 2, FEATURES)
    chosen = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]] * n)[:n]
    x[:, :, 0] = x[:, :, 0].abs() * (2 * chosen - 1)
    return x


@dataclass(frozen=True)
class Case:
    """A model, and a batch of inputs for it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]

    def data(self, *sizes: int) -> list[tuple[Any, Tensor]]:
        """Return batches of these sizes."""
        return [(self.inputs(size), torch.randint(CLASSES, (size,))) for size in sizes]


CASES: dict[str, Case] = {
    "mlp": Case(mlp, features),
    "mlp_without_bias": Case(
        lambda: mlp(bias=False), features
    ),
    "mlp_float64": Case(lambda: mlp().double(), lambda n: features(n).double()),
    "mlp_bfloat16": Case(lambda: mlp().bfloat16(), lambda n: features(n).bfloat16()),
    "convolutions_and_batch_norm": Case(
        convolutions, lambda n: torch.randn(n, 2, 3, 3)
    ),
    "one_layer_used_twice": Case(
        lambda: Net(
            lambda m, x: m.head(m.body(m.body(m.first(x)).tanh())),
            first=linear(), body=linear(6), head=head(),
        ),
        features,
    ),
    "embedding_tied_to_the_output": Case(
        lambda: Net(
            lambda m, x: F.linear(m.embed(x).mean(1).tanh(), m.embed.weight, m.bias)[:, :CLASSES],
            embed=nn.Embedding(8, 6), bias=nn.Parameter(torch.randn(8)),
        ),
        tokens,
    ),
    "lstm": Case(
        lambda: Net(reads_last_state, lstm=nn.LSTM(FEATURES, 6, batch_first=True), head=head()),
        sequences,
    ),
    "transformer_layer": Case(
        lambda: Net(
            lambda m, x: m.head(m.layer(m.up(x)).mean(1)),
            up=linear(), head=head(),
            layer=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        ),
        sequences,
    ),
    "positions_flattened_to_rows": Case(
        lambda: Net(
            lambda m, x: m.head(m.body(x.flatten(0, 1)).tanh().unflatten(0, (len(x), -1)).mean(1)),
            body=linear(), head=head(),
        ),
        sequences,
    ),
    "time_first": Case(time_first, sequences),
    "time_first_as_many_as_samples": Case(
        time_first, lambda n: torch.randn(n, n, FEATURES)
    ),
    "rows_in_reverse_order": Case(
        lambda: Net(
            lambda m, x: m.head(m.body(x.flip(0)).tanh().flip(0)), body=linear(), head=head()
        ),
        features,
    ),
    "as_many_rows_as_samples_but_others": Case(
        lambda: Net(routes_to_an_expert, expert=linear(), head=head()), unevenly_routed
    ),
    "weight_norm": Case(
        lambda: Net(lambda m, x: m.head(m.body(x).tanh()), body=weight_norm(linear()), head=head()),
        features,
    ),
    "low_rank_update_of_a_frozen_weight": Case(
        lambda: Net(
            lambda m, x: m.head(F.linear(x, m.body.weight + m.a @ m.b, m.body.bias).tanh()),
            body=frozen(linear(), "weight"), head=head(),
            a=nn.Parameter(torch.randn(6, 2)), b=nn.Parameter(torch.randn(2, FEATURES)),
        ),
        features,
    ),
    "linear_called_by_keywords": Case(
        lambda: Net(
            lambda m, x: F.linear(
                bias=m.head.bias, weight=m.head.weight,
                input=F.linear(x, bias=m.body.bias, weight=m.body.weight).tanh(),
            ),
            body=linear(), head=head(),
        ),
        features,
    ),
    "frozen_layers": Case(
        lambda: frozen(mlp(), "0.weight", "0.bias", "2.weight"),
        features,
    ),
    "unused_parameter": Case(
        lambda: Net(lambda m, x: m.net(x),
                    net=mlp(), spare=linear(), lone=nn.Parameter(torch.ones(2))),
        features,
    ),
    "two_inputs": Case(
        lambda: Net(lambda m, x, y: m.head((m.one(x) * m.two(y)).tanh()),
                    one=linear(), two=linear(), head=head()),
        lambda n: (features(n), features(n)),
    ),
    "named_inputs_and_an_output_object": Case(
        lambda: Net(
            lambda m, x, scale: SimpleNamespace(logits=m.net(x * scale), loss=None), net=mlp()
        ),
        lambda n: {"scale": torch.rand(n, 1), "x": features(n)},
    ),
    "dropout_in_training_mode": Case(
        lambda: nn.Sequential(linear(), nn.Dropout(0.5), nn.Tanh(), nn.Dropout1d(0.5), head()),
        features,
    ),
    "compiled": Case(
        lambda: torch.compile(mlp(), backend="eager"),
        features,
    ),
    "compiled_layer": Case(
        lambda: nn.Sequential(torch.compile(linear(), backend="aot_eager"), nn.Tanh(), head()),
        features,
    ),
    "checkpointed": Case(
        lambda: Net(
            lambda m, x: m.head(checkpoint(lambda h: m.body(h).tanh(), x, use_reentrant=False)),
            body=linear(), head=head(),
        ),
        features,
    ),
    "weight_also_used_out_of_sight": Case(
        lambda: Net(lambda m, x: m.head(TimesWeight.apply(m.body(x).tanh(), m.body.weight)),
                    body=linear(), head=linear(FEATURES, CLASSES)),
        features,
    ),
    "layer_without_entries": Case(
        lambda: Net(lambda m, x: m.head(m.body(x)) + m.none(x).sum(1, keepdim=True),
                    body=linear(), head=head(), none=without_entries()),
        features,
    ),
}  # fmt: skip


def each_model(*left_out: str) -> pytest.MarkDecorator:
    """Parametrise a test by all cases but some."""
    kept = [pytest.param(case, id=name) for name, case in CASES.items() if name not in left_out]
    return pytest.mark.parametrize("case", kept)
