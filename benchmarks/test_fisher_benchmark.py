"""What the Fisher benchmarks time is right; ``--benchmark-enable`` times it at small sizes."""

from __future__ import annotations

import os
from functools import cache

import bench_fisher
import fisher_memory
import pytest
import torch
from fisher_calls import EWC_FAST, FORWARD_AND_BACKWARD
from fisher_case import Estimator
from fisher_models import FULL, QUICK
from fisher_peers import PEERS
from fisher_rivals import ONE_BY_ONE, VMAP, VMAP_IN_CHUNKS
from fisher_table import RIGHT, table
from harness import MismatchError, Provider, Result
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap's, of an LSTM
]

OWN = (EWC_FAST, ONE_BY_ONE, VMAP, VMAP_IN_CHUNKS, FORWARD_AND_BACKWARD)
CASES = [case for case in bench_fisher.cases(quick=True) if not case.alone]


@pytest.fixture
def one_thread() -> None:
    """Keep to one thread: as small models only lose where cores are busy."""
    torch.set_num_threads(1)


@cache
def providers(case: bench_fisher.Case) -> dict[str, Provider]:
    return bench_fisher.providers(case)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fisher(benchmark: BenchmarkFixture, case: bench_fisher.Case, name: str) -> None:
    provider = providers(case)[name]
    provider.check()
    benchmark.group = str(case)
    benchmark(provider.call)
    provider.check()


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name, peer in PEERS.items() if case.estimator in peer[2]],
    ids=str,
)
def test_a_peer_is_right_or_its_verdict_says_why_not(case: bench_fisher.Case, name: str) -> None:
    if name not in providers(case):
        pytest.skip(f"{name} is not installed: benchmarks/README.md says how")
    verdict = verdict_on(providers(case)[name])
    if case.model == "M1":
        assert verdict == RIGHT
    assert verdict.startswith((RIGHT, "wrong by", "missing parameters", "error"))


def verdict_on(provider: Provider) -> str:
    try:
        provider.check()
    except MismatchError as mismatch:
        return str(mismatch)
    return RIGHT


def test_several_batches_are_right_too() -> None:
    for case in bench_fisher.cases(quick=True):
        if case.alone:
            found = providers(case)
            assert set(found) == {EWC_FAST, FORWARD_AND_BACKWARD}
            found[EWC_FAST].check()


def test_every_model_is_measured_and_the_exact_fisher_of_two() -> None:
    exact = {case.model for case in bench_fisher.FULL if case.estimator == "exact"}
    assert exact == {"M1", "M2"}
    for estimator in ("sampled", "empirical"):
        assert {case.model for case in bench_fisher.FULL if case.estimator == estimator} == set(
            FULL
        )


@pytest.mark.skipif(not os.access(fisher_memory.CLEAR, os.W_OK), reason="Linux only")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    estimator: Estimator = "empirical"
    found = fisher_memory.beyond_forward_and_backward("M1", estimator, [EWC_FAST], quick=True)
    assert list(found) == [EWC_FAST]


def test_the_table_shows_times_verdicts_and_memory() -> None:
    rows = [
        {"case": f"exact, net, 1 words, {batches} x 9", "provider": provider, "estimator": "exact",
         "batches": batches, "correctness": RIGHT, "ratios": {FORWARD_AND_BACKWARD: ratio}}
        for batches, provider, ratio in ((1, EWC_FAST, 1.5), (8, EWC_FAST, 1.25), (1, VMAP, 9.0))
    ]  # fmt: skip
    rows[0]["memory_beyond_in_fishers"] = 0.5
    refused = {
        "exact, net, 1 words, 1 x 9: ASDL": "missing parameters: 2 of 9, a.b",
        "exact, net, 1 words, 1 x 9: Opacus": "error: TypeError: expected: this",
    }
    head, _, line = table(Result(rows=rows, refused=refused)).splitlines()
    assert (
        head
        == "| case | ewc_fast, one batch | ewc_fast, 8 batches | vmap of grad | ASDL | Opacus |"
    )
    assert line == (
        "| exact, net, 1 words | right, 1.50 (+0.5) | right, 1.25 | right, 9.00 "
        "| missing parameters: 2 of 9 | error: TypeError |"
    )


def test_quick_models_are_of_the_full_ones() -> None:
    assert set(QUICK) <= set(FULL)
