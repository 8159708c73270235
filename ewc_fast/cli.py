"""The command line: what runs on this machine, and the demo and experiments that show what for."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ewc_fast.experiments as experiments

_NEEDED_BY_EXTRA = {
    "demo": {"matplotlib", "mlxtend", "tqdm"},
    "experiments": {"minatar", "peft", "scipy", "seaborn", "transformers"},
    "ale": {"ale_py"},
}
_FAILED, _UNUSABLE = 1, 2  # exit codes; 2 is argparse's own for bad usage
_EXIT_CODES = "Exit code 0 if what it claims held, 1 if not, 2 if it could not run."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, ``info`` if none is named; return the exit code."""
    arguments = vars(_parser().parse_args(argv))
    command, name = arguments.pop("command"), arguments.pop("name", None)
    return _shown(command, name, arguments) if command in ("demo", "experiment") else _info()


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
        "prints a table and saves a figure. Under three minutes on two cores, --quick under 30 "
        f"seconds. It claims SGD < L2 < EWC. {_EXIT_CODES}",
    )
    _add_options(demo, takes=("data",), out="ewc_fast_demo")
    experiment = commands.add_parser(
        "experiment", help="one of the experiments of the paper and of those who tested it"
    )
    names = experiment.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, each in experiments.ALL.items():
        description = f"Shows {each.summary}: a table, a record (JSON), a figure. {_EXIT_CODES}"
        one = names.add_parser(name, help=each.summary, description=description)
        _add_options(one, takes=each.takes, out="ewc_fast_experiments")
    return parser


def _add_options(parser: argparse.ArgumentParser, *, takes: Sequence[str], out: str) -> None:
    parser.add_argument("--quick", action="store_true", help="short form: less of everything")
    parser.add_argument("--seeds", type=_at_least_one, metavar="N", help="repetitions")
    parser.add_argument(
        "--workers", type=_at_least_one, metavar="N", help="processes (default: one a core)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(out),
        help="folder for record and figure (default ./%(default)s)",
    )
    if "data" in takes:
        parser.add_argument(
            "--data",
            type=Path,
            metavar="DIR",
            help="folder of the full MNIST's IDX files (train-images-idx3-ubyte and so on, plain "
            "or .gz) to use instead of 5,000 images; takes much longer",
        )
    if "suite" in takes:
        parser.add_argument("--suite", choices=["minatar", "ale"], default="minatar")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _shown(command: str, name: str | None, chosen: dict[str, Any]) -> int:
    """Run the demo or the experiment of this name; say in one line why it could not run."""
    options = experiments.Options(**chosen)
    try:
        held = experiments.demo(options) if name is None else experiments.run(name, options)
    except ModuleNotFoundError as error:
        return _unusable(command, _remedy(error))
    except OSError as error:
        return _unusable(command, str(error))
    return 0 if held else _FAILED


def _remedy(missing: ModuleNotFoundError) -> str:
    package = (missing.name or "").partition(".")[0]
    for extra, packages in _NEEDED_BY_EXTRA.items():
        if package in packages:
            return f"{package} is missing: pip install 'ewc-fast[{extra}]'"
    raise missing  # no extra would bring it


def _unusable(command: str, message: str) -> int:
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
