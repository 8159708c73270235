"""A kind of Fisher in one mode, over all lambdas: what its trainings say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .learning import Kind, Mode, Training

NEAR = 1.0  # percentage points below the best validation accuracy that count as no loss


@dataclass(frozen=True)
class Sweep:
    """All trainings with one kind and mode, and what they say together."""

    kind: Kind
    mode: Mode
    trainings: tuple[Training, ...]

    def at(self, ewc_lambda: float) -> list[Training]:
        """Return the trainings with this lambda, one a seed."""
        return [t for t in self.trainings if t.job.ewc_lambda == ewc_lambda]

    @property
    def lambdas(self) -> list[float]:
        """All that were tried."""
        return sorted({t.job.ewc_lambda for t in self.trainings})

    @property
    def validation(self) -> dict[float, float]:
        """The mean accuracy over seeds on validation images, by lambda."""
        return {
            each: statistics.mean(mean_accuracies(self.at(each), "validation"))
            for each in self.lambdas
        }

    @property
    def best(self) -> float:
        """The lambda chosen: the best on validation images, the smallest of equals."""
        return max(self.validation, key=lambda each: self.validation[each])

    @property
    def decades(self) -> int:
        """How many of the lambdas are within ``NEAR`` points of the best."""
        return sum(
            each >= max(self.validation.values()) - NEAR for each in self.validation.values()
        )

    @property
    def test(self) -> list[float]:
        """The accuracy on test images with the lambda chosen, one a seed."""
        return mean_accuracies(self.at(self.best), "test")

    @property
    def seconds(self) -> float:
        """The median over trainings of the time that the Fisher took in all."""
        return statistics.median(t.fisher_seconds for t in self.trainings)

    @property
    def size(self) -> float:
        """The Fisher's trace after the first task, the mean over seeds."""
        return statistics.mean(t.first_trace for t in self.at(self.lambdas[0]))

    def record(self) -> dict[str, object]:
        """Return all of it as plain values."""
        return {
            "kind": self.kind.name,
            "mode": self.mode,
            "best_lambda": self.best,
            "test_at_best": self.test,
            "decades_near_best": self.decades,
            "fisher_seconds_median": self.seconds,
            "first_trace_mean": self.size,
            "validation_by_lambda": {f"{each:g}": got for each, got in self.validation.items()},
            "trainings": [training_record(training) for training in self.trainings],
        }


def mean_accuracies(
    trainings: Sequence[Training], part: Literal["validation", "test"]
) -> list[float]:
    """Return each training's accuracy, the mean over the tasks."""
    return [statistics.mean(getattr(training, part)) for training in trainings]


def training_record(training: Training) -> dict[str, object]:
    """Return it as plain values."""
    return {
        "seed": training.job.seed,
        "ewc_lambda": training.job.ewc_lambda,
        "validation": training.validation,
        "test": training.test,
        "fisher_seconds": round(training.fisher_seconds, 4),
        "first_trace": training.first_trace,
    }
