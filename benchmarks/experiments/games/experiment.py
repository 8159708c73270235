"""The whole experiment: experts and lambda first, then every agent with every seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..shared.experiment import Claim, Findings, Options
from ..shared.jobs import run_all
from ..shared.tables import mean_and_deviation, table
from .picture import draw
from .play import Job, Run, play, score_at_random
from .scales import Scale, Summary, summary
from .settings import ATARI, ATARI_QUICK, FULL, QUICK, Kind, Settings

_APART = 1000  # the seed that experts learn with and lambda is chosen by
_RANDOM = 4  # evaluations of random play
_RIGHT = 95.0  # percent of the labels


def run(options: Options) -> Findings:
    """Play, and return the record, a table, a figure and, in the full form, claims.

    Raises
    ------
    ModuleNotFoundError
        If minatar, or for ``--suite ale`` ale_py, is missing.
    """
    sizes = {"minatar": (FULL, QUICK), "ale": (ATARI, ATARI_QUICK)}
    settings = sizes[options.suite][options.quick]
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    settings.suite.world(settings.games[0], seed=0)  # missing packages are missed here
    found = _play_all(settings, options.workers)
    return Findings(
        settings=_plain(settings),
        results=found.plain(),
        table=_table(settings, found),
        figure=draw(settings, found.scales, found.runs),
        claims=[] if options.quick else _claims(found),
    )


@dataclass(frozen=True)
class _Found:
    scales: Mapping[str, Scale]
    search: Mapping[float, float]  # mean normalised score for each lambda
    strength: float
    runs: Mapping[Kind, Sequence[Run]]  # one for each seed
    summaries: Mapping[Kind, Sequence[Summary]]

    def plain(self) -> dict[str, Any]:
        return {
            "scales": {game: asdict(scale) for game, scale in self.scales.items()},
            "search": {f"{strength:g}": round(s, 4) for strength, s in self.search.items()},
            "lambda": self.strength,
            "runs": {kind.value: [run.plain() for run in runs] for kind, runs in self.runs.items()},
            "normalised": {
                kind.value: [each.plain() for each in summaries]
                for kind, summaries in self.summaries.items()
            },
        }

    def mean(self, kind: Kind, part: str) -> float:
        return statistics.mean(getattr(each, part) for each in self.summaries[kind])


def _play_all(settings: Settings, workers: int | None) -> _Found:
    scales, search = _prepare(settings, workers)
    strength = max(search, key=lambda each: search[each])
    jobs = [Job(kind, settings, seed, strength) for seed in range(settings.seeds) for kind in Kind]
    played = run_all(play, jobs, workers=workers, description="agents")
    runs = {
        kind: [run for job, run in zip(jobs, played, strict=True) if job.kind is kind]
        for kind in Kind
    }
    summaries = {
        kind: [summary(each, settings, scales) for each in of_kind]
        for kind, of_kind in runs.items()
    }
    return _Found(scales, search, strength, runs, summaries)


def _prepare(
    settings: Settings, workers: int | None
) -> tuple[dict[str, Scale], dict[float, float]]:
    """Let an agent learn each game alone, and try each lambda; on a seed of their own."""
    alone = [Job(Kind.PLAIN, settings.of_one(game), _APART) for game in settings.games]
    short = settings.of_search()
    tried = [Job(Kind.GIVEN, short, _APART, strength) for strength in settings.strengths]
    played = run_all(play, [*alone, *tried], workers=workers, description="experts and lambda")
    experts, searched = played[: len(alone)], played[len(alone) :]
    scales = {
        game: Scale(
            random=statistics.mean(
                score_at_random(game, settings, _APART + number) for number in range(_RANDOM)
            ),
            expert=statistics.mean(expert.scores[game][-settings.evaluations :]),
        )
        for game, expert in zip(settings.games, experts, strict=True)
    }
    search = {
        strength: summary(each, short, scales).last
        for strength, each in zip(settings.strengths, searched, strict=True)
    }
    return scales, search


def _plain(settings: Settings) -> dict[str, Any]:
    kept = asdict(settings) | {"suite": settings.suite.name, "games": list(settings.games)}
    return kept | {"strengths": list(settings.strengths), "mode": "proximal"}


def _table(settings: Settings, found: _Found) -> str:
    header = ["agent", *settings.games, "mean", "of those not played", "labels right, %"]
    rows = []
    for kind in Kind:
        summaries = found.summaries[kind]
        scores = [[each.games[game] for each in summaries] for game in settings.games]
        scores += [[each.last for each in summaries], [each.left for each in summaries]]
        labels = mean_and_deviation([run.accuracy for run in found.runs[kind]])
        rows.append([kind.value, *(mean_and_deviation(each, 2) for each in scores), labels])
    lines = [
        table("Normalised scores (0 random, 1 a game learned alone), last block", header, rows),
        "",
        f"lambda {found.strength:g}, of "
        + ", ".join(f"{strength:g}: {score:.2f}" for strength, score in found.search.items()),
        *(
            f"{game}: random {scale.random:.1f}, alone {scale.expert:.1f}"
            for game, scale in found.scales.items()
        ),
    ]
    return "\n".join(lines)


def _claims(found: _Found) -> list[Claim]:
    plain, given = (found.mean(kind, "last") for kind in (Kind.PLAIN, Kind.GIVEN))
    inferred = found.mean(Kind.INFERRED, "last")
    kept, lost = (found.mean(kind, "left") for kind in (Kind.GIVEN, Kind.PLAIN))
    right = float(np.mean([run.accuracy for run in found.runs[Kind.INFERRED]]))
    return [
        Claim(f"EWC ends with a higher mean score: {given:.2f} against {plain:.2f}", given > plain),
        Claim(
            f"EWC plays the games it has left better: {kept:.2f} against {lost:.2f}", kept > lost
        ),
        Claim(
            f"so does EWC with inferred labels: a mean of {inferred:.2f} against {plain:.2f}",
            inferred > plain,
        ),
        Claim(f"inferred labels are right in {right:.1f} % of the frames", right >= _RIGHT),
    ]
