"""What the benchmark of squared products times is right; ``--benchmark-enable`` times it."""

from __future__ import annotations

import bench_products
import pytest
from bench_products import Convolution, Linear
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize(
    "name",
    [bench_products.KERNEL, bench_products.AUTO, bench_products.LIBRARY, bench_products.GRADIENT],
)
@pytest.mark.parametrize("layer", [Linear(50, 60, 1, 20), Linear(40, 30, 20, 10)], ids=str)
def test_linear_layer(benchmark: BenchmarkFixture, layer: Linear, name: str) -> None:
    provider = bench_products.linear_providers(layer)[name]
    provider.check()
    benchmark(provider.call)


@pytest.mark.parametrize("name", [bench_products.KERNEL, bench_products.GRADIENT])
@pytest.mark.parametrize(
    "case", [Convolution(20, 10, 8, 4), Convolution(9, 3, 9, 4, 1, 2)], ids=str
)
def test_convolution(benchmark: BenchmarkFixture, case: Convolution, name: str) -> None:
    provider = bench_products.convolution_providers(case)[name]
    provider.check()
    benchmark(provider.call)
