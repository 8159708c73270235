r"""The forget-me-not process: which task is this? (Milan et al. 2016; Kirkpatrick et al. 2017.)

A hidden Markov model over tasks c, of which there may always be one more:

.. math:: p(c, t) \propto p(o_t \mid c) \sum_{c'} \Gamma_t(c, c') \, p(c', t - 1), \qquad
    \Gamma_t(c, c') = \begin{cases} 1 - a_t & c = c' \\ a_t / (K - 1) & \text{else} \end{cases}

with switch rate :math:`a_t = 1 / t`. Each task's frames are modelled pixel by pixel, by counts
:math:`n_{pv}` of the values v seen in pixel p (Dirichlet-multinomial; of two values,
Beta-Bernoulli):

.. math:: p(o \mid c) = \prod_p \frac{n^c_{p o_p} + \alpha}{\sum_v n^c_{pv} + \alpha V}

The last model has seen nothing: it is held out. Within a window of W observations all models learn
from them; at its end only the most probable keeps what it has learned, the others go back. If that
is the held-out one, it has become a task, and another is held out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def filtered(log_posterior: Values, log_likelihood: Values, rate: float) -> Values:
    """Return the logarithm of p(c, t) from those of p(c, t - 1) and of p(o | c), each (K,)."""
    others = len(log_posterior) - 1
    if others == 0:
        return np.zeros(1)
    before = np.exp(log_posterior)
    moved = (1 - rate) * before + rate / others * (before.sum() - before)
    return normalised(np.log(moved) + log_likelihood)


def normalised(logs: Values) -> Values:
    """Return logs of the same proportions, of numbers that add up to 1."""
    return logs - np.logaddexp.reduce(logs)


def log_predictive(counts: Values, prior: float) -> Values:
    """Return log p of every value in every pixel, from counts of them (..., pixels, values)."""
    values = counts.shape[-1]
    return np.log(counts + prior) - np.log(counts.sum(axis=-1, keepdims=True) + prior * values)


class ForgetMeNot:
    """Names the task that frames come from: 0, 1, ... in the order in which they were first met.

    Several copies of a game are observed at once: an observation's probability is then the
    geometric mean over the copies' frames, and each of N frames counts 1 / N. For one frame at a
    time this is the process above.

    Parameters
    ----------
    pixels, values
        Of a frame; what is observed are integers (copies, pixels) from 0 to ``values - 1``.
    prior
        Alpha, of every value in every pixel.
    window
        W, in observations.
    most
        Tasks that there may be; with so many none is held out.
    """

    def __init__(self, pixels: int, values: int, prior: float, window: int, most: int) -> None:
        self._prior, self._window, self._most = prior, window, most
        self._held_out = np.zeros((1, pixels, values))
        self._kept = self._held_out.copy()  # (models, pixels, values); the last is held out
        self._seen = self._kept.copy()  # with the window's own observations
        self._observed = 0
        self.tasks = 0
        self.log_posterior: Values = np.zeros(1)

    def observe(self, frames: NDArray[np.int64]) -> int:
        """Take in one observation; return the most probable task (``tasks`` if it is new)."""
        self._observed += 1
        share = self._shares(frames)
        scores = self._scores(self._seen, share)
        self.log_posterior = filtered(self.log_posterior, scores, 1 / self._observed)
        self._seen += share
        best = int(self.log_posterior.argmax())
        if self._observed % self._window == 0:
            self._close_window(best)
        return best

    def recognise(self, frames: NDArray[np.int64]) -> int:
        """Return which known task explains the frames best, without learning from them."""
        known = self._kept[: max(self.tasks, 1)]
        return int(self._scores(known, self._shares(frames)).argmax())

    def _close_window(self, best: int) -> None:
        self._kept[best] = self._seen[best]
        if best == self.tasks:
            self.tasks += 1
            if self.tasks < self._most:
                self._hold_out_another()
        self._seen = self._kept.copy()

    def _hold_out_another(self) -> None:
        self._kept = np.concatenate([self._kept, self._held_out])
        rate = 1 / (1 + self._observed)
        kept = self.log_posterior + np.log1p(-rate)
        self.log_posterior = np.append(kept, np.log(rate))

    def _shares(self, frames: NDArray[np.int64]) -> Values:
        """Return how often each value is in each pixel, from 0 to 1."""
        hot = frames[:, :, None] == np.arange(self._kept.shape[-1])
        return hot.mean(axis=0)

    def _scores(self, counts: Values, share: Values) -> Values:
        """Return log p(o | c) for models of these counts."""
        return np.einsum("kpv,pv->k", log_predictive(counts, self._prior), share)
