"""What the Fisher benchmarks time is right; ``--benchmark-enable`` times it at small sizes."""

from __future__ import annotations

from functools import cache

import bench_fisher
import pytest
from fisher_case import ESTIMATORS, Estimator, FisherCase
from harness import Provider
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # BackPACK's

PROVIDERS = (
    bench_fisher.EWC_FAST,
    "one sample at a time",
    "torch.func, vmap of grad",
    "BackPACK",
    "nngeometry",
    bench_fisher.FORWARD_AND_BACKWARD,
)


@cache
def providers(estimator: Estimator) -> dict[str, Provider]:
    """Return what competes on a small network and two batches."""
    return bench_fisher.providers(FisherCase((20, 16, 5), 8, 2), estimator, slow=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_fisher_provider_is_in_the_table(estimator: Estimator) -> None:
    assert set(providers(estimator)) <= set(PROVIDERS)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fisher(benchmark: BenchmarkFixture, estimator: Estimator, name: str) -> None:
    if name not in providers(estimator):
        pytest.skip(f"{name} is not installed: pip install 'ewc-fast[peers]'")
    provider = providers(estimator)[name]
    provider.check()
    benchmark.group = estimator
    benchmark(provider.call)
    provider.check()
