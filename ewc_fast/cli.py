"""The command line: what runs on this machine, and the demo and experiments that show what for."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DEMO_NEEDS = {"matplotlib", "mlxtend", "tqdm"}
_EXPERIMENTS_NEED = {*_DEMO_NEEDS, "ale_py", "minatar", "peft", "scipy", "seaborn", "transformers"}
_OF_THE_PARSER = {"command", "name"}
_FAILED, _UNUSABLE = 1, 2  # exit codes; 2 is argparse's own for bad usage


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, ``info`` if none is named; return the exit code."""
    arguments = _parser().parse_args(argv)
    commands = {"demo": _demo, "experiment": _experiment}
    return commands.get(arguments.command, lambda _: _info())(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ewc-fast", description="Elastic Weight Consolidation for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,experiment}")
    commands.add_parser("info", help="versions and backends, for a bug report (default)")
    demo = commands.add_parser(
        "demo",
        help="EWC against plain SGD and L2 on permuted MNIST",
        description="Learns three permuted MNIST tasks in turn by plain SGD, uniform L2 and EWC; "
        "prints a table and saves a figure. Under three minutes on two cores. Exit code 0 if "
        "SGD < L2 < EWC held, 1 if not, 2 if it could not run.",
    )
    demo.add_argument("--quick", action="store_true", help="short form, under 30 seconds")
    demo.add_argument(
        "--seeds", type=_at_least_one, metavar="N", help="repetitions (default 3; quick: 1)"
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the full MNIST's IDX files (train-images-idx3-ubyte and so on, plain or "
        ".gz) to use instead of 5,000 images; takes much longer without --quick",
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("ewc_fast_demo"),
        help="folder for the figure (default ./%(default)s)",
    )
    experiment = commands.add_parser(
        "experiment",
        help="one of the experiments of the paper and of those who tested it",
        description="Prints a table, writes a record (JSON) and a figure (PNG). Exit code 0 if "
        "what it claims held, 1 if not, 2 if it could not run.",
    )
    _add_experiments(experiment)
    return parser


def _add_experiments(parser: argparse.ArgumentParser) -> None:
    import ewc_fast.experiments as experiments

    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, each in experiments.ALL.items():
        one = names.add_parser(name, help=each.summary, description=each.summary)
        one.add_argument("--quick", action="store_true", help="small: shows that everything runs")
        one.add_argument("--seeds", type=_at_least_one, metavar="N", help="repetitions")
        one.add_argument(
            "--workers", type=_at_least_one, metavar="N", help="processes (default: one a core)"
        )
        one.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            default=Path("ewc_fast_experiments"),
            help="folder for record and figure (default ./%(default)s)",
        )
        if "data" in each.takes:
            one.add_argument(
                "--data",
                type=Path,
                metavar="DIR",
                help="folder of the full MNIST's IDX files, instead of 5,000 images",
            )
        if "suite" in each.takes:
            one.add_argument("--suite", choices=["minatar", "ale"], default="minatar")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from ewc_fast import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_NEEDS:
            raise
        return _unusable(f"{package} is missing: pip install 'ewc-fast[demo]'")
    try:
        held = demo.run(
            quick=arguments.quick, seeds=arguments.seeds, data=arguments.data, out=arguments.out
        )
    except (demo.IdxError, OSError) as error:
        return _unusable(str(error))
    return 0 if held else _FAILED


def _experiment(arguments: argparse.Namespace) -> int:
    import ewc_fast.experiments as experiments

    chosen = {key: value for key, value in vars(arguments).items() if key not in _OF_THE_PARSER}
    try:
        held = experiments.run(arguments.name, experiments.Options(**chosen))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXPERIMENTS_NEED:
            raise
        extra = "ale" if package == "ale_py" else "experiments"
        return _unusable(f"{package} is missing: pip install 'ewc-fast[{extra}]'", "experiment")
    except OSError as error:
        return _unusable(str(error), "experiment")
    return 0 if held else _FAILED


def _unusable(message: str, command: str = "demo") -> int:
    print(f"ewc-fast {command}: {message}", file=sys.stderr)
    return _UNUSABLE


def _info() -> int:
    lines = [*_versions(), *_backends(), *_native_core()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    from ewc_fast import __version__
    from ewc_fast._native import core
    from ewc_fast.environment import processor

    yield "ewc_fast", __version__
    yield "core", core.version
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    for package in ("torch", "numpy", "triton"):
        yield package, _version_of(package)
    yield "system", platform.platform()
    yield "processor", processor()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backends() -> Iterator[tuple[str, str]]:
    import torch

    from ewc_fast._native import cuda_unavailable

    yield "backend cpu", "available"
    why_not = cuda_unavailable()
    if why_not is None:
        yield "backend cuda", f"available, on {torch.cuda.get_device_name()}"
    else:
        yield "backend cuda", f"not available: {why_not}"
    yield "backend triton", _triton_backend()
    yield "backend reference", "available"


def _triton_backend() -> str:
    import torch

    from ewc_fast._triton import interpreted, unavailable

    why_not = unavailable("cpu" if interpreted() else "cuda")
    if why_not is not None:
        return f"not available: {why_not}"
    if interpreted():
        return "in its interpreter, on CPU tensors: TRITON_INTERPRET=1 is set"
    if not torch.cuda.is_available():
        return f"not available: PyTorch {torch.__version__} finds no GPU"
    return f"available, on {torch.cuda.get_device_name()}"


def _native_core() -> Iterator[tuple[str, str]]:
    import torch

    from ewc_fast._native import core, reader

    best, *others = core.vector_levels
    yield "CUDA architectures", core.cuda_architectures.replace(",", ", ") or "none"
    yield "vector level", f"{best} in use" + (f"; also {', '.join(others)}" if others else "")
    threads = f"{core.openmp}, {torch.get_num_threads()} threads"
    yield "OpenMP", threads if core.openmp else "not built in: one thread"
    exchange = "in use" if reader.uses_exchange else "not in use: this PyTorch offers no version 1"
    yield "DLPack exchange", exchange
