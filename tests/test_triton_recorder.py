"""The recorder with every kernel from Triton: what it hands over is what the kernels take."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_fisher
from torch import Tensor, nn

pytest.importorskip("triton")

from ewc_fast import fisher_diagonal, products, sums

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the recorder takes Triton by itself"
)


class Images(nn.Module):
    """Convolutions of all kinds, and norms of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.BatchNorm2d(4), nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.LayerNorm(27), nn.Linear(27, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Words(nn.Module):
    """An embedding with padding, norms of positions, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=1)
        self.norm, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.rms(self.norm(self.table(x)).tanh()) * self.scale).sum(1))


@pytest.fixture
def taken(monkeypatch) -> set[str]:
    """Let Triton be chosen as on a GPU; the operations that were asked for."""
    operations = set()

    def choose(requested, operation, *_):
        operations.add(operation)
        return "triton"

    monkeypatch.setattr(products, "choose", choose)
    monkeypatch.setattr(sums, "choose", choose)
    return operations


@pytest.mark.parametrize("make", [Images, Words])
def test_the_fisher_of_a_model_is_exact(make, taken):
    model = make().eval()
    inputs = (
        torch.randn(2, 2, 6, 6) if make is Images else torch.tensor([[0, 1, 2, 2], [1, 1, 5, 2]])
    )
    data = [(inputs, torch.tensor([0, 2]))]
    found = fisher_diagonal(model, data, estimator="empirical")
    assert not found.report.slow
    assert_fisher(found, model, data, estimator="empirical")
    kind = "convolution" if make is Images else "rows"
    assert {f"accumulate_squared_{kind}_", "accumulate_squared_sums_"} <= taken
