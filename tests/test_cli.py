"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

import ewc_fast
from ewc_fast import _native, cli, experiments

INFO = [
    "ewc_fast",
    "core",
    "Python",
    "torch",
    "numpy",
    "triton",
    "system",
    "processor",
    "backend cpu",
    "backend cuda",
    "backend triton",
    "backend reference",
    "CUDA architectures",
    "vector level",
    "OpenMP",
    "DLPack exchange",
]


def info_lines(capsys) -> dict[str, str]:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split("  ", 1) for line in lines)


def in_new_process(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=cwd
    )


def test_info_prints_every_line_with_a_value(capsys):
    lines = info_lines(capsys)
    assert list(lines) == INFO
    assert all(value.strip() for value in lines.values())
    assert lines["torch"].strip() == torch.__version__
    assert lines["vector level"].split()[0] == _native.core.vector_levels[0]


def test_info_is_what_runs_without_a_subcommand(capsys):
    expected = info_lines(capsys)
    assert cli.main([]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == list(expected)


@pytest.mark.parametrize("why_not", [None, "PyTorch finds no CUDA device or driver"])
def test_info_says_whether_cuda_can_run_or_why_not(why_not, monkeypatch, capsys):
    monkeypatch.setattr(_native, "cuda_unavailable", lambda: why_not)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    expected = "available, on some GPU" if why_not is None else f"not available: {why_not}"
    assert info_lines(capsys)["backend cuda"].strip() == expected


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_info_says_whether_triton_can_run_or_why_not(interpreted, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "in its interpreter" if interpreted == "1" else "not available: PyTorch"
    assert info_lines(capsys)["backend triton"].strip().startswith(expected)


def test_the_module_runs_as_a_command(tmp_path):
    printed = in_new_process("-m", "ewc_fast", cwd=tmp_path).stdout
    assert printed.splitlines()[0].split() == ["ewc_fast", ewc_fast.__version__]


def test_importing_the_command_line_loads_nothing_of_the_experiments(tmp_path):
    code = "import sys, ewc_fast.cli; print(*sys.modules)"
    loaded = set(in_new_process("-c", code, cwd=tmp_path).stdout.split())
    assert not loaded & {"matplotlib", "mlxtend"}  # torch itself loads tqdm


# What is shown: the demo and the experiments

SHOWN = [
    pytest.param(["demo"], id="demo"),
    pytest.param(["experiment", "permuted-mnist"], id="experiment"),
]


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)], ids=["held", "not held"])
def test_the_exit_code_of_the_demo_is_its_verdict(held, code, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "demo", lambda options: asked.append(options) or held)
    assert cli.main(["demo", "--quick", "--seeds", "2"]) == code
    assert asked == [experiments.Options(out=Path("ewc_fast_demo"), quick=True, seeds=2)]


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)], ids=["held", "not held"])
def test_the_exit_code_of_an_experiment_is_whether_its_claims_held(held, code, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "run", lambda *each: asked.append(each) or held)
    assert cli.main(["experiment", "permuted-mnist", "--workers", "1", "--data", "x"]) == code
    out, data = Path("ewc_fast_experiments"), Path("x")
    assert asked == [("permuted-mnist", experiments.Options(out=out, workers=1, data=data))]


@pytest.mark.parametrize("name", experiments.ALL)
def test_every_experiment_is_a_module_with_run_that_takes_its_options(name):
    module = import_module(f"ewc_fast.experiments.{name.replace('-', '_')}")
    assert list(signature(module.run).parameters) == ["options"]
    options = cli._parser().parse_args(["experiment", name])
    assert set(vars(options)) <= {"command", "name", *vars(experiments.Options(out=Path()))}


def test_an_unknown_experiment_is_refused_with_the_names_that_are_known(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["experiment", "unheard-of"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "unheard-of" in message
    assert all(name in message for name in experiments.ALL)


@pytest.mark.parametrize("command", SHOWN)
@pytest.mark.parametrize("package", ["matplotlib", "mlxtend", "tqdm"])
def test_a_missing_extra_is_named_with_its_remedy(package, command, monkeypatch, capsys, tmp_path):
    _forget(monkeypatch, package)
    assert cli.main([*command, "--out", str(tmp_path)]) == 2
    message = f"ewc-fast {command[0]}: {package} is missing: pip install 'ewc-fast[demo]'\n"
    assert capsys.readouterr().err == message


def _forget(monkeypatch, package: str) -> None:
    """Let a package be missing for all that is imported from now on."""
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("ewc_fast.experiments."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it then raises


def test_what_one_experiment_needs_beyond_the_demo_is_named_with_its_extra(monkeypatch, capsys):
    def run(name, options):
        raise ModuleNotFoundError("No module named 'minatar.gui'", name="minatar.gui")

    monkeypatch.setattr(experiments, "run", run)
    assert cli.main(["experiment", "games"]) == 2
    message = "ewc-fast experiment: minatar is missing: pip install 'ewc-fast[experiments]'\n"
    assert capsys.readouterr().err == message


def test_a_module_that_no_extra_would_bring_is_an_error_of_ours(monkeypatch):
    def run(name, options):
        raise ModuleNotFoundError("No module named 'unheard_of'", name="unheard_of")

    monkeypatch.setattr(experiments, "run", run)
    with pytest.raises(ModuleNotFoundError, match="unheard_of"):
        cli.main(["experiment", "games"])


@pytest.mark.parametrize("command", SHOWN)
def test_data_that_cannot_be_read_is_reported_without_a_traceback(command, tmp_path, capsys):
    assert cli.main([*command, "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "train-images-idx3-ubyte: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", SHOWN)
def test_a_folder_that_cannot_be_made_is_reported_before_anything_is_trained(
    command, tmp_path, capsys
):
    occupied = tmp_path / "file"
    occupied.touch()
    assert cli.main([*command, "--out", str(occupied)]) == 2
    assert str(occupied) in capsys.readouterr().err


@pytest.mark.parametrize("command", SHOWN)
@pytest.mark.parametrize("option", ["--seeds", "--workers"])
@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_below_one_is_refused(number, option, command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, option, number])
    assert exit_.value.code == 2
    assert "expected an integer >= 1" in capsys.readouterr().err
