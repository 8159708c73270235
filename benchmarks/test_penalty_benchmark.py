"""What the penalty benchmarks time is right; ``--benchmark-enable`` times it at small sizes.

The full measurement is ``python benchmarks/run.py``: pytest times one implementation after the
other, so that a machine whose speed changes on the way favours some of them.
"""

from __future__ import annotations

from functools import cache

import bench_operations
import bench_optimizer
import bench_penalty
import pytest
from bench_penalty import Case
from harness import Provider
from layouts import layout
from pytest_benchmark.fixture import BenchmarkFixture

PENALTY = (
    bench_penalty.AUTOGRAD,
    bench_penalty.AUTOGRAD_TEN,
    bench_penalty.WITH_VALUE + "loop, sum",
    bench_penalty.WITH_VALUE + "loop, dot",
    bench_penalty.WITH_VALUE + "blocked loop, dot",
    bench_penalty.WITH_VALUE + "foreach",
    bench_penalty.WITH_VALUE + "foreach, kept temporaries",
    bench_penalty.WITHOUT_VALUE + "loop",
    bench_penalty.WITHOUT_VALUE + "foreach",
    bench_penalty.FUNCTIONAL,
    bench_penalty.EWC_ONE,
    bench_penalty.EWC_TEN,
    bench_penalty.FLOOR,
)
STEPS = (
    bench_optimizer.ALONE,
    "torch, foreach, alone",
    "inside, alone",
    "inside, gradient",
    "inside, proximal",
    "in EWCOptimizer, gradient",
    "in EWCOptimizer, proximal",
    "in PyTorch, foreach and fused",
)


@cache
def penalty_providers(name: str) -> dict[str, Provider]:
    """Return what competes on a small case."""
    return bench_penalty.providers(Case(name, 100_000, seconds=0))


def run(benchmark: BenchmarkFixture, provider: Provider) -> None:
    """Time a provider once it has matched the reference, and see that it still does."""
    provider.check()
    benchmark(provider.call)
    provider.check()


@pytest.mark.parametrize("shape", ["list", "flat"])
def test_every_penalty_provider_is_in_the_table(shape: str) -> None:
    assert set(penalty_providers(shape)) == set(PENALTY)


@pytest.mark.parametrize("name", PENALTY)
@pytest.mark.parametrize("shape", ["list", "flat"])
def test_penalty(benchmark: BenchmarkFixture, shape: str, name: str) -> None:
    benchmark.group = f"penalty, {shape}"
    run(benchmark, penalty_providers(shape)[name])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("optimizer", bench_optimizer.OPTIMIZERS)
def test_optimizer_step(benchmark: BenchmarkFixture, optimizer: str, name: str) -> None:
    benchmark.group = f"step, {optimizer}"
    build = bench_optimizer.OPTIMIZERS[optimizer]
    run(benchmark, bench_optimizer.providers(build, layout("list", 100_000))[name])


@pytest.mark.parametrize("name", [bench_operations.EWC_FAST, bench_operations.COPY])
@pytest.mark.parametrize("operation", bench_operations.OPERATIONS)
def test_operation(benchmark: BenchmarkFixture, operation: str, name: str) -> None:
    benchmark.group = operation
    what = bench_operations.OPERATIONS[operation]
    run(benchmark, bench_operations.providers(what, layout("list", 100_000))[name])
