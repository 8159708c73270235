"""The experiments of the paper, and of those who tested it: ``ewc-fast experiment NAME``.

One file each, over :mod:`.shared`, through the public API only; to start one of your own, copy the
nearest.
"""

from __future__ import annotations

from importlib import import_module

from .shared.experiment import Experiment, Options, conduct

__all__ = ["ALL", "Options", "demo", "run"]

_LISTED = [
    Experiment("permuted-mnist", "three tasks in turn (figure 2A)", ("data",)),
    Experiment("ten-permutations", "accuracy against the number of tasks (2B)", ("data",)),
    Experiment("fisher-overlap", "which layers similar and dissimilar tasks share (2C)"),
    Experiment("perturbation", "accuracy under weight noise shaped by the Fisher"),
    Experiment("random-patterns", "signal, noise and memories against the analytic curves"),
    Experiment("fisher-kinds", "six estimates of the Fisher, lambda over 14 decades"),
    Experiment("scenarios", "task-, domain- and class-incremental learning"),
    Experiment("scaling", "time against the number of parameters and of samples"),
    Experiment("games", "deep Q-learning on a sequence of games", ("suite",)),
    Experiment("language", "a language model on two domains, full weights and LoRA"),
    Experiment("lambda-sweep", "accuracy against lambda, for both modes of the optimizer"),
]
ALL = {experiment.name: experiment for experiment in _LISTED}


def run(name: str, options: Options) -> bool:
    """Run one experiment, print its table and claims, write JSON and PNG; tell if all claims held.

    Raises
    ------
    ModuleNotFoundError
        If a package is missing that only this experiment needs.
    OSError
        If ``options.out`` can't be written, before the long part.
    """
    module = import_module(f".{name.replace('-', '_')}", __name__)
    return conduct(name, module.run, options)


def demo(options: Options) -> bool:
    """Run the short form of ``permuted-mnist``, with strengths chosen beforehand; else as above."""
    module = import_module(".permuted_mnist", __name__)
    return conduct("permuted_mnist", module.demo, options)
