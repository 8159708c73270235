"""How much two tasks share: the overlap of their Fisher diagonals."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ewc_fast import _checks


def fisher_overlap(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    group: Callable[[str], str] | None = None,
) -> dict[str, float]:
    r"""Return how far two tasks rely on the same parameters, from 0 (on none) to 1 (alike).

    .. math:: 1 - d^2 = \sum_i \sqrt{\hat F_i \hat G_i}, \qquad
        d^2 = \frac12 \mathrm{tr}\left(\hat F + \hat G - 2 (\hat F \hat G)^{1/2}\right), \qquad
        \hat F = \frac{F}{\mathrm{tr} F}

    where :math:`F` and :math:`G` are the two tasks' Fisher diagonals: each is scaled to unit trace,
    so that tasks are compared by where their information lies, not by how much they have. ``d`` is
    the Frechet (Hellinger) distance.

    Parameters
    ----------
    first, second
        Fisher diagonals by parameter name, as :func:`~ewc_fast.fisher_diagonal` returns them, with
        the same names and shapes: finite, >= 0.
    group
        Maps a parameter's name to that of the group whose parameters count together, by one trace:
        ``lambda name: name.rpartition(".")[0]`` for layers, ``lambda name: "all"`` for the whole.
        By default every parameter tensor is a group of its own.

    Returns
    -------
    dict[str, float]
        The overlap of each group, in the order of ``first``. Summed in float64.

    Raises
    ------
    TypeError, ValueError
        For names or shapes that differ, entries that are negative or not finite, and a group whose
        trace is 0: where a task needs nothing, there is nothing to overlap with.

    References
    ----------
    Kirkpatrick et al. 2017, supplement (Fisher overlap) and figure 3C,
    https://doi.org/10.1073/pnas.1611835114.

    Examples
    --------
    >>> a = {"body.weight": torch.tensor([1.0, 1.0]), "body.bias": torch.tensor([2.0])}
    >>> b = {"body.weight": torch.tensor([5.0, 0.0]), "body.bias": torch.tensor([5.0])}
    >>> fisher_overlap(a, b)  # doctest: +ELLIPSIS
    {'body.weight': 0.707..., 'body.bias': 1.0}
    >>> fisher_overlap(a, b, group=lambda name: name.partition(".")[0])  # doctest: +ELLIPSIS
    {'body': 0.853...}
    """
    _checks.two_fishers(first, second)
    groups: dict[str, list[str]] = {}
    for name in first:
        groups.setdefault(name if group is None else group(name), []).append(name)
    return {key: _overlap(key, first, second, names) for key, names in groups.items()}


def _overlap(
    group: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: list[str]
) -> float:
    shared = sum(_shared(first[name], second[name]) for name in names)
    traces = [sum(_trace(fisher[name]) for name in names) for fisher in (first, second)]
    for argument, trace in zip(("first", "second"), traces, strict=True):
        _checks.some_information(argument, group, trace)
    return min(1.0, shared / (traces[0] ** 0.5 * traces[1] ** 0.5))  # above 1 by rounding alone


def _shared(one: Tensor, other: Tensor) -> float:
    """Return the sum of sqrt(F G), each root by itself: products of small entries would be 0."""
    return float((one.double().sqrt() * other.to(one.device).double().sqrt()).sum())


def _trace(fisher: Tensor) -> float:
    return float(fisher.double().sum())
