"""The harness refuses what is wrong, compares within rounds, and the report finds its place."""

from __future__ import annotations

import math

import pytest
import report
from harness import Claim, MismatchError, Provider, Timings, measure
from layouts import resnet50, scaled

from ewc_fast.environment import environment


def right() -> None:
    """Pass, as a check does."""


def wrong() -> None:
    """Fail, as a check does."""
    raise MismatchError("value: expected 1, got 2")


def test_a_provider_that_differs_from_the_reference_is_not_timed() -> None:
    timings = measure({"a": Provider(right, right), "b": Provider(right, wrong)}, seconds=0)
    assert set(timings.seconds) == {"a"}
    assert timings.refused == {"b": "value: expected 1, got 2"}


def test_a_provider_that_turns_wrong_while_timed_raises() -> None:
    checks = iter([right, wrong])
    with pytest.raises(MismatchError):
        measure({"a": Provider(right, lambda: next(checks)())}, seconds=0)


def test_a_turn_counts_its_median_and_keeps_its_first_call_apart() -> None:
    timings = measure({"a": Provider(right, right)}, seconds=0, calls=3, least_rounds=7)
    assert len(timings.seconds["a"]) == len(timings.first_calls["a"]) == 7


def test_ratios_pair_what_was_measured_in_the_same_round() -> None:
    seconds = {"a": [1.0, 20.0, 3.0], "b": [2.0, 40.0, 6.0]}
    timings = Timings(seconds, first_calls=seconds)
    assert timings.ratio("b", to="a") == 2.0
    assert timings.fastest(["a", "b", "refused"]) == "a"


def test_claims_have_a_direction() -> None:
    assert Claim("speed", 5.0, 5.0).holds
    assert not Claim("time", 5.0, 4.9, at_least=False).holds


def test_layout_is_that_of_resnet50() -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    assert sum(map(math.prod, shapes)) == 25_557_032


@pytest.mark.parametrize("elements", [10_000, 100_000, 10_000_000])
def test_scaled_layout_keeps_ranks_and_has_the_elements_asked_for(elements: int) -> None:
    shapes = scaled(resnet50(), elements)
    assert [len(shape) for shape in shapes] == [len(shape) for shape in resnet50()]
    assert sum(map(math.prod, shapes)) == elements
    assert min(map(math.prod, shapes)) >= 1


def test_scaled_layout_needs_enough_elements() -> None:
    with pytest.raises(ValueError, match="too few for 161 tensors"):
        scaled(resnet50(), 161)


def test_environment_names_processor_and_commit() -> None:
    found = environment()
    assert found["cpu"]
    assert found["threads"] >= 1


def test_report_replaces_what_is_between_its_markers() -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_table(readme, "new") == readme.replace("old", "new")
    with pytest.raises(SystemExit, match="expected one"):
        report.with_table("no markers", "new")
