"""MAS: absolute values of each sample's own gradient, averaged, as one sample at a time gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import u
from torch import Tensor, nn

from ewc_fast import EWC
from ewc_fast.fisher import fisher_diagonal
from ewc_fast.importance import mas_importance


class Tied(nn.Module):
    """A table that is read and multiplied with."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=0)

    def forward(self, words):
        return self.table(words).tanh() @ self.table.weight.t()


class LowRank(nn.Module):
    """A weight that is computed from parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return x @ (self.a @ self.b)


class Last(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Applied(nn.Module):
    """A function of the input and of parameters of some shapes."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.weights)


def words():
    return torch.tensor([[1, 2, 1, 0], [3, 3, 3, 3], [8, 1, 0, 2], [4, 5, 6, 7], [2, 2, 0, 0]])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (5, 6)),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (5, 4, 6)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2)
        ),
        (5, 2, 6, 6),
    ),
    "transposed_convolution": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (5, 2, 4, 4)),
    "norms": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.PReLU(6)),
        (5, 6),
    ),
    "norm_over_positions": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), (5, 3, 6)),
    "layer_used_twice": (Twice, (5, 6)),
    "low_rank": (LowRank, (5, 6)),
    "lstm": (lambda: Last(nn.LSTM(4, 3, batch_first=True)), (5, 3, 4)),
    # A last norm would leave the outputs' norm almost constant, and its gradient to cancellation.
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
        (5, 3, 8),
    ),
    "matmul_of_a_transpose": (lambda: Applied(lambda x, w: x @ w.t(), (4, 6)), (5, 3, 6)),
    "weight_of_parts": (
        lambda: Applied(lambda x, a, b: x @ torch.cat([a, b], 1).tanh(), (6, 2), (6, 3)),
        (5, 6),
    ),
    "weight_put_together": (
        lambda: Applied(lambda x, a, b: F.linear(x, torch.cat([a, b])), (2, 6), (3, 6)),
        (5, 6),
    ),
    "two_slices": (lambda: Applied(lambda x, w: x @ w[:, :3] + x @ w[:, 2:], (6, 5)), (5, 6)),
    "experts": (
        lambda: Applied(lambda x, w: torch.einsum("nei,eio->neo", x, w), (3, 6, 4)),
        (5, 3, 6),
    ),
    "position_embedding": (
        lambda: Applied(lambda x, e, s: (x + e).tanh() * s, (3, 6), (6,)),
        (5, 3, 6),
    ),
    "several_images_a_sample": (
        lambda: Applied(
            lambda x, w: F.conv2d(x.flatten(0, 1), w).unflatten(0, (-1, 3)), (4, 2, 3, 3)
        ),
        (5, 3, 2, 5, 5),
    ),
    "rows_by_index": (lambda: Applied(lambda x, w: w[x].tanh(), (9, 5)), None),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), None),
    "embedding_bag": (lambda: nn.EmbeddingBag(9, 5, mode="mean"), None),
    "tied_table": (Tied, None),
}  # fmt: skip


def scene(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype).eval()
    return model, words() if shape is None else torch.randn(shape, dtype=torch.float64).to(dtype)


def one_sample_at_a_time(model: nn.Module, inputs: Tensor, weights=None) -> dict[str, Tensor]:
    """Return the mean of |d ||f(x)||^2 / d theta| by the definition."""
    weights = torch.ones(len(inputs)) if weights is None else weights
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample, weight in zip(inputs, weights, strict=True):
        norm = model(sample.unsqueeze(0)).square().sum()
        grads = torch.autograd.grad(norm, [*model.parameters()], allow_unused=True)
        for values, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                values.add_(grad.abs(), alpha=weight.item())
    return {name: values / weights.sum() for name, values in total.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_of_single_samples_absolute_gradients(name):
    model, inputs = scene(name)
    found = mas_importance(model, inputs.split(4))  # batches of 4 and of 1
    expected = one_sample_at_a_time(model, inputs)
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        allowed = 64 * u(torch.float64) * values.max()
        assert (found[parameter] - values).abs().max() <= allowed, parameter
    assert not found.report.slow, str(found.report)


@pytest.mark.parametrize("name", ["mlp", "positions", "convolution", "embedding"])
def test_float32_is_off_by_roundings_only(name):
    model, inputs = scene(name, torch.float32)
    found = mas_importance(model, [inputs])
    wide = inputs if inputs.dtype == torch.long else inputs.double()
    expected = one_sample_at_a_time(model.double(), wide)
    for parameter, values in expected.items():
        assert found[parameter].dtype == torch.float32
        allowed = 64 * u(torch.float32) * values.max()
        assert (found[parameter] - values).abs().max() <= allowed, parameter


def test_many_samples_take_several_chunks():
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False).double()  # 480 kB: 8 samples a chunk
    inputs = torch.randn(20, 2, 300, dtype=torch.float64)
    found = mas_importance(model, [inputs])["weight"]
    expected = one_sample_at_a_time(model, inputs)["weight"]
    assert (found - expected).abs().max() <= 64 * u(torch.float64) * expected.max()


def test_samples_do_not_cancel_as_in_a_batchs_gradient():
    model = nn.Linear(1, 1, bias=False).double()
    found = mas_importance(model, [torch.tensor([[1.0], [-1.0]], dtype=torch.float64)])
    assert found["weight"].item() == pytest.approx(2 * abs(model.weight.item()), rel=1e-15)


def test_weights_weigh_samples():
    model, inputs = scene("mlp")
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    found = mas_importance(model, [(inputs, torch.zeros(5), weights)])
    for name, values in one_sample_at_a_time(model, inputs, weights).items():
        assert (found[name] - values).abs().max() <= 64 * u(torch.float64) * values.max()


def test_labels_are_not_read():
    model, inputs = scene("mlp")
    with_labels = mas_importance(model, [(inputs, torch.full((5,), 99))])
    without = mas_importance(model, [inputs])
    assert all(torch.equal(with_labels[name], without[name]) for name in without)


def test_a_model_that_mixes_samples_is_refused():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(ValueError, match="depend on the other samples"):
        mas_importance(Centred(6, 3), [torch.randn(5, 6)])


def test_outputs_must_be_floating():
    class Chosen(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(TypeError, match=r"outputs: expected floating-point numbers.*int64"):
        mas_importance(Chosen(6, 3), [torch.randn(1, 6)])


def test_the_squared_variant_is_an_empirical_fisher_of_an_own_likelihood():
    class SquaredNorm:
        def log_prob(self, outputs, targets):
            return outputs.flatten(1).square().sum(1)

    model, inputs = scene("mlp")
    batches = [(inputs, torch.zeros(5))]
    found = fisher_diagonal(model, batches, likelihood=SquaredNorm(), estimator="empirical")
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in inputs:
        grads = torch.autograd.grad(model(sample[None]).square().sum(), [*model.parameters()])
        for values, grad in zip(expected.values(), grads, strict=True):
            values.add_(grad.square() / len(inputs))
    for name, values in expected.items():
        assert (found[name] - values).abs().max() <= 64 * u(torch.float64) * values.max()


def test_ewc_consolidates_it_and_its_penalty_is_twice_theirs():
    model, inputs = scene("mlp")
    ewc = EWC(model, ewc_lambda=3.0, anchor="latest", importance="mas")
    ewc.consolidate([inputs])
    omega = one_sample_at_a_time(model, inputs)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    theirs = sum(
        (omega[name] * (p - start[name]).square()).sum() for name, p in model.named_parameters()
    )
    assert ewc.penalty().item() == pytest.approx(3.0 / 2 * theirs.item(), rel=1e-12)
