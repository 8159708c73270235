"""Tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean over seeds with its standard deviation, which one alone has not."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line(row, widths) for row in (header, *rows)]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    aligned = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    return "   ".join([f"{first:<{widths[0]}}", *aligned])
