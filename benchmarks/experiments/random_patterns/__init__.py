"""How many random patterns a linear unit remembers: EWC against gradient descent.

The question: what does stiffening synapses gain in the simplest memory there is? The supplement of
Kirkpatrick et al. 2017 (its figure on random patterns) answers it in closed form,
:mod:`.theory`; here its numbers come out of ``ewc_fast`` itself.

Protocol: units of 1,000 synapses learn patterns one by one, each once; a pattern counts as
remembered while its signal exceeds the noise. For each pattern EWC minimises

    (y - x.W)^2 / 2 + 1/2 (t / n) |W - W_{t-1}|^2

where t / n is the Fisher diagonal of the patterns so far: x_i^2 = 1 / n each, and as much to begin
with. That is :class:`ewc_fast.EWC` with the latest anchor, and the minimum is one step of SGD at
rate 1 in ``EWCOptimizer(mode="proximal")``: it goes to W + (y - x.W) x, which solves y = x.W as
|x| = 1, and then back by 1 / (1 + t / n). Gradient descent is PyTorch's SGD.

Expect: EWC's signal falls as n / (n + t), for all patterns alike, and its signal-to-noise ratio as
t^(-1/2), for few patterns and for many; under gradient descent both fall exponentially with a
pattern's age. Up to its capacity, some 0.8 n, EWC remembers every pattern; beyond, it loses all
nearly at once, where fast gradient descent has its latest for a while longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shared import figures
from ..shared.experiment import Claim, Findings, Options
from ..shared.jobs import run_all
from ..shared.tables import mean_and_deviation, table
from .comparison import Comparison
from .simulation import Job, Settings, simulate
from .theory import Array, Rule, ratio


def _edges(synapses: int, most: int) -> tuple[int, ...]:
    tenth = synapses // 10
    return *(tenth // 10, tenth // 5, tenth // 2), *range(tenth, most + 1, tenth)


FULL = Settings(1000, _edges(1000, 5000), runs=100, seeds=4)
QUICK = Settings(100, _edges(100, 600), runs=300, seeds=2, within=0.1)


def run(options: Options) -> Findings:
    """Simulate all rules, and compare with the analysis."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    jobs = [Job(settings, rule, seed) for rule in settings.rules for seed in range(settings.seeds)]
    courses = run_all(simulate, jobs, workers=options.workers, description="random patterns")
    found = {
        rule: Comparison(settings, rule, courses[k * settings.seeds : (k + 1) * settings.seeds])
        for k, rule in enumerate(settings.rules)
    }
    return Findings(
        settings=asdict(settings),
        results={rule.name: one.record() for rule, one in found.items()},
        table=_table(settings, found),
        figure=_draw(settings, found),
        claims=_claims(settings, found),
    )


Found = Mapping[Rule, Comparison]

COLOURS = figures.BLUE, figures.VERMILION, figures.ORANGE


def _table(settings: Settings, found: Found) -> str:
    n = settings.synapses
    columns = [settings.edges.index(t) for t in (n // 2, n, 5 * n)]
    rows = []
    for rule, one in found.items():
        for name, measured, expected in (
            ("signal, mean of all", one.average, one.expected_average()),
            ("noise", one.noise, rule.noise(one.times)),
            ("remembered", one.remembered, one.expected_remembered()),
        ):
            cells = [
                f"{mean_and_deviation([*measured[:, k]], 3)} ({expected[k]:.3f})" for k in columns
            ]
            rows.append([f"{rule.name}: {name}", *cells])
    header = ["measured (analytic)", *(f"t = {settings.edges[k]:,}" for k in columns)]
    title = f"Random patterns, {n:,} synapses, {settings.seeds} x {settings.runs} runs"
    return table(title, header, rows)


def _draw(settings: Settings, found: Found) -> Figure:
    n, last = settings.synapses, settings.edges[-1]
    figure, grid = figures.panels(2, 2, (9.5, 7.4))
    signal, noise, snr, memory = grid.flat
    fine = np.geomspace(settings.edges[0], last, 200)
    for colour, (rule, one) in zip(COLOURS, found.items(), strict=True):
        first = int(one.lengths[0])
        seen = ratio(rule, first, one.times) > _VISIBLE
        style = {"colour": colour, "label": rule.name}
        _both(signal, one.times[seen], one.oldest[:, seen], fine, rule.signal(first, fine), **style)
        _both(noise, one.times, one.noise, fine, rule.noise(fine), **style)
        oldest = one.oldest[:, seen] / one.noise[:, seen]
        _both(snr, one.times[seen], oldest, fine, ratio(rule, first, fine), **style)
        _both(memory, one.times, one.remembered, one.times, one.expected_remembered(), **style)
    snr.axhline(settings.threshold, color=figures.GREY, lw=0.8, ls="--")
    guide = np.array([settings.edges[0], last])
    snr.plot(guide, 2 * (n / guide) ** 0.5, color=figures.GREY, lw=0.8, ls=":")
    snr.annotate("slope -1/2", (guide[0] * 1.3, 2.2 * (n / guide[0] / 1.3) ** 0.5), color="#555555")
    for panel, title in (
        (signal, f"Signal of the first {settings.edges[0]} patterns"),
        (noise, "Noise: response to unseen patterns"),
        (snr, "Signal-to-noise ratio of the first patterns"),
        (memory, f"Share of patterns with a ratio above {settings.threshold:g}"),
    ):
        panel.set(title=title, xscale="log", xlabel="patterns learned")
    signal.set(yscale="log", ylim=(_VISIBLE, 1.4))
    snr.set(yscale="log", ylim=(_VISIBLE, None))
    memory.set(ylim=(0, 1.05))
    figures.legend(figure, memory)
    figure.suptitle(
        f"{n:,} synapses: simulated (dots, {settings.seeds * settings.runs} runs) "
        "and analytic (lines)"
    )
    return figure


_VISIBLE = 0.04  # below, the first patterns' signal drowns in what is left of the noise


def _both(
    panel: Axes, t: Array, measured: Array, fine: Array, expected: Array, *, colour: str, label: str
) -> None:
    panel.plot(fine, expected, color=colour, lw=1.5, label=label)
    panel.plot(t, measured.mean(axis=0), "o", color=colour, ms=3.2, mec="white", mew=0.3)


def _claims(settings: Settings, found: Found) -> list[Claim]:
    ewc, fast, half = found.values()
    n, within = settings.synapses, f"within {settings.within:.0%}"
    return [
        Claim(
            f"EWC: the signal is n / (n + t) at every t, {within}",
            _agree(settings, ewc.average, ewc.expected_average()),
        ),
        *(
            Claim(
                f"{one.rule.name}: the signal is the analytic one at every age up to n, {within}",
                _agree(settings, *(of[..., one.ages <= n] for of in one.by_age())),
            )
            for one in (fast, half)
        ),
        *(
            Claim(
                f"{one.rule.name}: the noise is the analytic one at every t, {within}",
                _agree(settings, one.noise, one.rule.noise(one.times)),
            )
            for one in found.values()
        ),
        *(
            Claim(
                f"EWC: in log-log the SNR has a slope of -1/2 +- 0.05 for {where}",
                all(abs(slope + 0.5) < 0.05 for slope in slopes),
            )
            for where, slopes in ewc.slopes().items()
        ),
        *(
            Claim(
                f"{one.rule.name}: the signal falls as exp(-b age / n) with the rate b, {within}",
                all(abs(fall / rate - 1) < settings.within for fall in one.falls()),
            )
            for one, rate in ((fast, n / (n + 1)), (half, 0.5))
        ),
        Claim(
            "at t = 0.6 n EWC remembers every pattern, the faster gradient descent does not",
            ewc.remembered_at(6 * n // 10) == 1 > fast.remembered_at(6 * n // 10),
        ),
        Claim(
            "at t = 2 n EWC remembers no pattern, the faster gradient descent its latest",
            ewc.remembered_at(2 * n) == 0 < fast.remembered_at(2 * n),
        ),
    ]


def _agree(settings: Settings, measured: Array, expected: Array) -> bool:
    """Tell whether the mean over seeds is as expected everywhere."""
    return bool((np.abs(measured.mean(axis=0) / expected - 1) < settings.within).all())
