"""What becomes of a random pattern, by the analysis in the supplement of Kirkpatrick et al. 2017.

A linear unit of n synapses learns patterns x in {-1, 1}^n / sqrt(n), each with its target y = -1 or
1, one step each and never again. From W = 0, the t-th step is

    W <- W + b_t (y - x.W) x

Written out, W_t is a sum over the patterns so far, and its mean response to an old one is only what
is left of that one: the signal. The rest is noise, with the variance of the response to a pattern
never seen, |W|^2 / n, since x.W has mean 0 and E[x x^T] = I / n. With q = E|W|^2 one step gives,
averaged over x and y,

    signal(t0, t) = b_t0 prod_{s = t0 + 1 .. t} (1 - b_s / n)                    exactly
    q_t = q_{t-1} + b_t^2 + (b_t^2 - 2 b_t) q_{t-1} / n                          exactly

and for large n, t being continuous, dq/dt = b^2 + (b^2 - 2 b) q / n. Both rules below solve these:
the products telescope or become exponentials, and the equation in q is linear, with integrating
factor exp(b (2 - b) t / n) for constant b, and u^2 exp(n / u) for b = n / u with u = n + t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expi

Array = NDArray[np.float64]


class Rule(Protocol):
    """How large each step is, and what becomes of signal and noise."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""

    def rate(self, t: ArrayLike) -> Array:
        """Return b_t, the step taken for the t-th pattern, t = 1, 2, ..."""

    def signal(self, t0: ArrayLike, t: ArrayLike) -> Array:
        """Return the mean response to pattern ``t0``, in units of its target, after ``t``."""

    def noise(self, t: ArrayLike) -> Array:
        """Return the standard deviation of the response, after ``t`` patterns."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent at a constant rate b: equations S11, S25, S32 and S33."""

    synapses: int
    constant: float

    @property
    def name(self) -> str:
        """Its rate to two digits."""
        return f"gradient descent, rate {self.constant:.2g}"

    def rate(self, t: ArrayLike) -> Array:
        """Return b, whatever t."""
        return np.full_like(_array(t), self.constant)

    def signal(self, t0: ArrayLike, t: ArrayLike) -> Array:
        """Return b exp(-b (t - t0) / n): an exponential fall."""
        return self.constant * np.exp(-self.constant * (_array(t) - _array(t0)) / self.synapses)

    def noise(self, t: ArrayLike) -> Array:
        """Return sqrt(b / (2 - b) (1 - exp(-b (2 - b) t / n)))."""
        b = self.constant
        grown = -np.expm1(-b * (2 - b) * _array(t) / self.synapses)
        return _array(np.sqrt(b / (2 - b) * grown))


@dataclass(frozen=True)
class Consolidation:
    """EWC, b_t = n / (n + t): each pattern stiffens all springs by 1 / n; S13 and S27."""

    synapses: int

    @property
    def name(self) -> str:
        """EWC."""
        return "EWC"

    def rate(self, t: ArrayLike) -> Array:
        """Return n / (n + t)."""
        return self.synapses / (self.synapses + _array(t))

    def signal(self, t0: ArrayLike, t: ArrayLike) -> Array:
        """Return n / (n + t), the same for every old pattern."""
        return self.synapses / (self.synapses + _array(t)) + 0 * _array(t0)

    def noise(self, t: ArrayLike) -> Array:
        """Return sqrt(q / n): near sqrt(t / n) for t << n, and sqrt(n / t) for t >> n."""
        n = self.synapses
        u = n + _array(t)
        # the integral of exp(n / u) is u exp(n / u) - n Ei(n / u)
        grown = u * np.exp(n / u) - n * expi(n / u) - n * np.e + n * expi(1)
        return _array(np.sqrt(n * np.exp(-n / u) * np.maximum(grown, 0)) / u)


def ratio(rule: Rule, t0: ArrayLike, t: ArrayLike) -> Array:
    """Return signal over noise of pattern ``t0`` after ``t``."""
    return rule.signal(t0, t) / rule.noise(t)


def remembered(rule: Rule, t: int, threshold: float) -> float:
    """Return the share of ``t`` patterns whose signal is above ``threshold`` times the noise."""
    return float((ratio(rule, np.arange(1, t + 1), t) > threshold).mean())


def _array(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
