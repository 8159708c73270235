"""What was simulated, beside what the analysis says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .simulation import Course, Settings
from .theory import Array, Descent, Rule, remembered


class Comparison:
    """One rule's courses, one for each seed, beside the analysis.

    What is measured has the seeds in front: (seeds, edges), say.
    """

    def __init__(self, settings: Settings, rule: Rule, courses: Sequence[Course]) -> None:
        self.rule = rule
        self.times = np.array(settings.edges)
        self.lengths = np.diff(self.times, prepend=0)
        self.noise = np.stack([course.noise for course in courses])
        self._settings = settings
        self._signals = np.stack([course.signals for course in courses])  # (seeds, edges, blocks)

    @property
    def oldest(self) -> Array:
        """The signal of the first patterns after every edge."""
        return self._signals[:, :, 0]

    @property
    def average(self) -> Array:
        """The mean signal of all patterns so far, after every edge."""
        return np.nansum(self._signals * self.lengths, axis=2) / self.times

    def expected_average(self) -> Array:
        """Return the same by the analysis: (edges,)."""
        return np.array([self.rule.signal(np.arange(1, t + 1), t).mean() for t in self.times])

    @property
    def remembered(self) -> Array:
        """The share of patterns whose SNR is above the threshold, after every edge.

        The patterns between two edges count together, by their mean signal.
        """
        least = self._settings.threshold * self.noise[:, :, None]
        return ((self._signals > least) * self.lengths).sum(axis=2) / self.times  # NaN is not above

    def expected_remembered(self) -> Array:
        """Return the same by the analysis, pattern by pattern: (edges,)."""
        return np.array([remembered(self.rule, t, self._settings.threshold) for t in self.times])

    def remembered_at(self, t: int) -> float:
        """Return the mean over seeds of the share remembered after ``t`` patterns, an edge."""
        return float(self.remembered[:, self._settings.edges.index(t)].mean())

    @property
    def ages(self) -> Array:
        """How many patterns came after a block: whole multiples of the usual length."""
        regular = (self.lengths == self.lengths[-1]).sum()
        return np.arange(regular) * float(self.lengths[-1])

    def by_age(self) -> tuple[Array, Array]:
        """Return signals by age, measured and expected, where only age counts: not for EWC.

        Measured (seeds, ages): the mean over all blocks of this age at any time.
        """
        count, length = len(self.ages), int(self.lengths[-1])
        regular = self._signals[:, -count:, -count:]
        measured = [np.diagonal(regular, -k, 1, 2).mean(axis=1) for k in range(count)]
        expected = [self.rule.signal(0, age + np.arange(length)).mean() for age in self.ages]
        return np.stack(measured, axis=1), np.array(expected)

    def falls(self) -> list[float]:
        """Return each seed's decay of the signal up to age 2 n: b of exp(-b age / n)."""
        n = self._settings.synapses
        chosen, signals = self.ages <= 2 * n, self.by_age()[0]
        return [-_slope(self.ages[chosen] / n, np.log(row[chosen])) for row in signals]

    def slopes(self) -> dict[str, list[float]]:
        """Return each seed's slope of log SNR over log t, of the average pattern."""
        n = self._settings.synapses
        snr = np.log(self.average / self.noise)
        chosen = {"t <= n / 5": self.times <= n / 5, "t >= 2 n": self.times >= 2 * n}
        return {
            where: [_slope(np.log(self.times[which]), row[which]) for row in snr]
            for where, which in chosen.items()
        }

    def record(self) -> dict[str, Any]:
        """Return each seed's numbers, and the analysis', as plain values."""
        by_age = self.by_age()
        kept = {
            "patterns": self.times,
            "signal of the oldest": self.oldest,
            "signal, mean of all": self.average,
            "signal, mean of all, analytic": self.expected_average(),
            "noise": self.noise,
            "noise, analytic": self.rule.noise(self.times),
            "remembered": self.remembered,
            "remembered, analytic": self.expected_remembered(),
        }
        if isinstance(self.rule, Descent):
            kept |= {"ages": self.ages, "signal by age": by_age[0], "by age, analytic": by_age[1]}
            slopes: dict[str, Any] = {"decay of the signal, in units of 1 / n": self.falls()}
        else:
            slopes = {"slope of the SNR in log-log": self.slopes()}
        return {name: np.round(values, 6).tolist() for name, values in kept.items()} | slopes


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(x, y, 1)[0])
