"""What bench_formats.py times is right, and its errors are those of the formats."""

from __future__ import annotations

import pytest
from bench_formats import FORMATS, errors, provider


@pytest.mark.parametrize("storage", [*FORMATS, "e5m3@cpu"])
def test_every_format_pulls_as_its_values_say(storage):
    provider(10_000, storage).check()


@pytest.mark.parametrize(("storage", "mean"), [("bfloat16", 0.0019), ("e5m3", 0.0225)])
def test_the_errors_are_those_in_the_readme(storage, mean):
    assert errors(2.0, storage)[1] == pytest.approx(mean, rel=0.03)
