"""What the sums over samples hold, lose at most, and come in."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import CLASSES, Net, features, head, linear, mlp
from torch import nn

from ewc_fast import fisher_diagonal
from ewc_fast.fisher import passes

pytestmark = pytest.mark.usefixtures("one_thread")

U = 2**-24  # the error of one rounding in float32
TINY = 2.0**-26


def batches(*sizes):
    return [(features(n), torch.randint(CLASSES, (n,))) for n in sizes]


def one_parameter():
    """Return a model whose Fisher for the empirical label y is the mean of (y - w x)^2 x^2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def tiny(n, size):
    """Return samples whose squared gradient is 2^-26, in batches."""
    x = torch.full((size, 1), 2.0**-13)
    return [(x, torch.ones(size, 1))] * (n // size)


LARGE = [(torch.ones(2, 1), torch.ones(2, 1))]  # squared gradients of 1


@pytest.mark.parametrize(("n", "size"), [(6_000, 1), (1_000_000, 1_000)], ids=["single", "many"])
def test_tiny_squares_after_a_large_batch_are_not_lost(n, size):
    found = fisher_diagonal(
        one_parameter(), LARGE + tiny(n, size), likelihood="gaussian", estimator="empirical"
    )
    exact = (2 + n * TINY) / (n + 2)
    # Beside the 2 there is, an addend below half an ulp would be lost. Only the first sum, of the
    # first 256 batches, has that 2 in it. All other roundings are of sums of tiny ones: within a
    # batch, within 256 batches, of sums of sums; and when these meet the 2 at last.
    sums = -(-n // size // passes.BATCHES_IN_A_SUM) + 1
    first = passes.BATCHES_IN_A_SUM * min(size * TINY, 3 * U)
    others = (size + passes.BATCHES_IN_A_SUM + sums) * U * n * TINY
    budget = (first + others + sums * 3 * U) / (n + 2)
    assert abs(found["weight"].item() - exact) <= budget
    assert budget < 0.15 * (exact - 2 / (n + 2))  # losing them all would be found out


@pytest.mark.parametrize("cut", [1, 4, 6, 7, 12, 100])
def test_max_samples_counts_samples_not_batches(cut):
    model, data = mlp(), batches(4, 3, 5)
    found = fisher_diagonal(model, data, max_samples=cut)
    x, y = (torch.cat(parts)[:cut] for parts in zip(*data, strict=True))
    oracle.assert_fisher(found, model, [(x, y)])


@pytest.mark.parametrize("verify", [True, False])
def test_results_are_on_the_parameters_device_and_in_the_states_dtype(verify):
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        model = mlp().to(dtype)
        data = [(x.to(dtype), y) for x, y in batches(4, 3)]
        found = fisher_diagonal(model, data, verify=verify)
        for name, param in model.named_parameters():
            assert found[name].dtype == expected
            assert found[name].device == param.device
            assert found[name].is_contiguous()


def test_parameters_of_two_dtypes_have_results_of_two():
    model = Net(lambda m, x: m.head(m.second(m.first(x).double()).tanh()), first=linear(),
                second=linear(6).double(), head=head().double())  # fmt: skip
    found = fisher_diagonal(model, batches(4, 3))
    assert {name: values.dtype for name, values in found.items()} == {
        name: param.dtype for name, param in model.named_parameters()
    }
    assert not found.report.slow
