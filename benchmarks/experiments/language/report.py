"""The language model's forgetting as a table, a figure, a record and claims."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shared import figures
from ..shared.experiment import Claim, Findings
from ..shared.tables import mean_and_deviation, table
from . import text
from .training import (
    GRADIENT,
    HELD_LORA,
    JOINT,
    LORA,
    PLAIN,
    PROXIMAL,
    UNIFORM,
    Learned,
    Settings,
)

Both = tuple[float, float]  # perplexity on the first domain and on the second
Tried = Mapping[str, Mapping[float, Both]]  # by method and lambda
Curves = Mapping[str, Sequence[Sequence[Both]]]  # by method, seed and time

FIRST, SECOND = 0, 1
DOMAINS = ("documentation", "code")
_COLOURS = {
    PLAIN: figures.BLUE,
    UNIFORM: figures.GREEN,
    GRADIENT: figures.VERMILION,
    PROXIMAL: figures.ORANGE,
    LORA: figures.SKY,
    HELD_LORA: figures.PURPLE,
    JOINT: figures.GREY,
}
_ALONE = (PLAIN, LORA, JOINT)  # no lambda: one point
_WITHOUT = {UNIFORM: PLAIN, GRADIENT: PLAIN, PROXIMAL: PLAIN, HELD_LORA: LORA}  # lambda 0


@dataclass(frozen=True)
class Study:
    """All that was measured; ``tried`` on the choosing seed, all else on the others."""

    settings: Settings
    learned: Sequence[Learned]
    tried: Tried
    chosen: Mapping[str, float]
    curves: Curves

    def before(self, domain: int) -> list[float]:
        """Return each seed's perplexity when the first domain is learned."""
        return [each.perplexity["test"][domain] for each in self.learned]

    def after(self, method: str, domain: int) -> list[float]:
        """Return each seed's perplexity at the end."""
        return [curve[-1][domain] for curve in self.curves[method]]


def findings(study: Study, claims: Sequence[Claim]) -> Findings:
    """Return the study's table, figure and record, with what is claimed of it."""
    return Findings(
        settings=asdict(study.settings),
        results=_record(study),
        table=_table(study),
        figure=_figure(study),
        claims=claims,
    )


def _record(study: Study) -> dict[str, Any]:
    return {
        "text": {
            name: _measures(domain)
            for name, domain in zip(DOMAINS, (text.documentation(), text.code()), strict=True)
        },
        "perplexity_before": [each.perplexity["test"] for each in study.learned],
        "perplexity": study.curves,
        "chosen_lambda": study.chosen,
        "tried_lambda": study.tried,
    }


def _measures(domain: text.Domain) -> dict[str, dict[str, int]]:
    """Return size and checksum: other versions of Python have other text."""
    return {
        part: {"bytes": len(content), "crc32": zlib.crc32(content.numpy().tobytes())}
        for part, content in vars(domain).items()
    }


def _table(study: Study) -> str:
    rows = [["(before)", "-", *(mean_and_deviation(study.before(d), 2) for d in (FIRST, SECOND))]]
    for method, ewc_lambda in study.chosen.items():
        cells = [mean_and_deviation(study.after(method, d), 2) for d in (FIRST, SECOND)]
        rows.append([method, "-" if method in _ALONE else f"{ewc_lambda:g}", *cells])
    return table(
        f"Perplexity a byte on test text (seeds: {len(study.learned)})",
        ["trained on code by", "lambda", *DOMAINS],
        rows,
    )


# The figure: perplexity while the second domain is learned; what each lambda trades


def _figure(study: Study) -> Figure:
    figure, grid = figures.panels(1, 3, (12, 4.6))
    for domain, panel in enumerate(grid[0, :2]):
        _over_training(panel, study, domain)
    _trade(grid[0, 2], study.tried)
    figure.suptitle("A language model learns code: what it still knows of prose", color=figures.INK)
    figures.legend(figure, grid[0, 0])
    return figure


def _over_training(panel: Axes, study: Study, domain: int) -> None:
    settings = study.settings
    steps = [settings.second_steps * n / settings.points for n in range(settings.points + 1)]
    for method, curves in study.curves.items():
        # of each seed's own start: seeds differ more in how good their first model is
        runs = [[point[domain] / curve[0][domain] for point in curve] for curve in curves]
        dashes = {"linestyle": (0, (3, 2))} if method == JOINT else {}
        figures.curve(panel, steps, runs, colour=_COLOURS[method], label=method, **dashes)
    panel.set_xlabel("steps on code")
    panel.set_ylabel(f"perplexity on {DOMAINS[domain]}, in units of its start")


def _trade(panel: Axes, tried: Tried) -> None:
    for method, scores in tried.items():
        without = tried[_WITHOUT.get(method, method)][0.0]
        first, second = zip(without, *scores.values(), strict=True)
        colour, order = _COLOURS[method], 3 if method in _ALONE else 2
        panel.plot(first, second, color=colour, zorder=order, marker="o", markersize=4, lw=1.4)
        for ewc_lambda, point in scores.items():
            if method not in _ALONE:
                left = method == GRADIENT  # its curve runs to the left of the others
                panel.annotate(
                    f"{ewc_lambda:g}",
                    point,
                    xytext=(-5, -6) if left else (4, 3),
                    textcoords="offset points",
                    ha="right" if left else "left",
                    fontsize=7,
                    color=colour,
                )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(f"perplexity on {DOMAINS[FIRST]} at the end")
    panel.set_ylabel(f"perplexity on {DOMAINS[SECOND]} at the end")
    panel.set_title("each lambda tried (validation)", fontsize=10, color=figures.INK)
    for axis in "xy":
        _plain_ticks(panel, axis)


def _plain_ticks(panel: Axes, axis: str) -> None:
    """Write 4, 5, 6 on a logarithmic axis of less than a decade, not 4 x 10^0."""
    which = getattr(panel, f"{axis}axis")
    which.set_major_formatter("{x:g}")
    which.set_minor_formatter("{x:g}")


# The claims: in logarithms of perplexity, nats a byte


def claims(study: Study) -> list[Claim]:
    """Return what the experiment is to show, each to hold for every seed."""
    return [
        Claim(
            "fine-tuning on code makes documentation at least a quarter more perplexing",
            all(each >= math.log(1.25) for each in _forgotten(study, PLAIN)),
        ),
        *(_keeps_and_learns(study, method) for method in (GRADIENT, PROXIMAL)),
        *(
            Claim(
                f"{method}, ends with a lower mean over both domains than {other}",
                _all_less(_on_average(study, method), _on_average(study, other)),
            )
            for method in (GRADIENT, PROXIMAL)
            for other in (PLAIN, UNIFORM)
        ),
        Claim(
            "LoRA forgets less with the penalty than without",
            _all_less(_forgotten(study, HELD_LORA), _forgotten(study, LORA)),
        ),
    ]


def _keeps_and_learns(study: Study, method: str) -> Claim:
    most = [forgotten * 3 / 4 for forgotten in _forgotten(study, PLAIN)]
    least = [learned * 3 / 4 for learned in _learned(study, PLAIN)]
    return Claim(
        f"{method}, forgets at most three quarters of what fine-tuning forgets, and learns at "
        "least three quarters of what it learns",
        _all_less(_forgotten(study, method), most) and _all_less(least, _learned(study, method)),
    )


def _forgotten(study: Study, method: str) -> list[float]:
    return _risen(study.before(FIRST), study.after(method, FIRST))


def _learned(study: Study, method: str) -> list[float]:
    return _risen(study.after(method, SECOND), study.before(SECOND))


def _risen(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [math.log(late / early) for early, late in zip(before, after, strict=True)]


def _on_average(study: Study, method: str) -> list[float]:
    ends = zip(study.after(method, FIRST), study.after(method, SECOND), strict=True)
    return [0.5 * math.log(math.prod(end)) for end in ends]


def _all_less(ours: Iterable[float], theirs: Iterable[float]) -> bool:
    return all(our < their for our, their in zip(ours, theirs, strict=True))
