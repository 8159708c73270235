"""The optimizers' CUDA steps on the CPU, fibers for threads: the specification, bit for bit."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from host_kernels import DTYPES, HERE, HostRow, build, host_row
from numerics import value_budget
from steps import SLOTS, STEPS, Lists, Step, copied

from ewc_fast import reference_steps

every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
both_orders = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
Run = Callable[..., "tuple[float, int]"]


@pytest.fixture(autouse=True)
def roots_rounded_to_nearest(monkeypatch):
    """As NumPy has them; PyTorch's may be one unit off."""
    exact = lambda values: torch.from_numpy(np.sqrt(values.numpy()))  # noqa: E731
    monkeypatch.setattr(reference_steps, "_square_root", exact)


class HostOptions(ctypes.Structure):
    """Options as tests/cuda_on_host/optimizer.cpp reads them."""

    _fields_ = [
        *((name, ctypes.c_double)
          for name in ("lr", "weight_decay", "ewc_lambda", "first", "second", "eps")),
        *((name, ctypes.c_int32)
          for name in ("maximize", "proximal", "by_chance", "seed", "decoupled", "nesterov",
                       "begins")),
    ]  # fmt: skip


def host_options(step: Step) -> HostOptions:
    o = step.options
    made = HostOptions(o.lr, o.weight_decay, o.ewc_lambda)
    made.maximize, made.proximal = o.maximize, o.proximal
    made.by_chance, made.seed = o.rounding_seed is not None, o.rounding_seed or 0
    if step.adam:
        made.first, made.second, made.eps, made.decoupled = o.beta1, o.beta2, o.eps, o.decoupled
    else:
        made.first, made.second, made.nesterov, made.begins = (
            o.momentum, o.dampening, o.nesterov, o.first,
        )  # fmt: skip
    return made


def row_of(ordinal: int, row: dict[str, torch.Tensor]) -> HostRow:
    made = host_row(ordinal, {SLOTS[name]: tensor for name, tensor in row.items()})
    made.numel, made.dtype = row["params"].numel(), DTYPES.index(row["params"].dtype)
    moment = next((row[n] for n in ("exp_avgs", "momentum_buffers") if n in row), None)
    made.moments = 0 if moment is None else DTYPES.index(moment.dtype)
    made.fisher = DTYPES.index(row["fisher"].dtype) if "fisher" in row else 0
    return made


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Return a function that takes a step by the kernels: its value and its launches."""
    given = os.environ.get("EWC_FAST_CUDA_ON_HOST")
    library = Path(given) if given else build("optimizer", tmp_path_factory.mktemp("on_host"))
    native = ctypes.CDLL(str(library)).run
    native.restype = ctypes.c_double

    def call(
        step: Step,
        lists: Lists,
        *,
        elements: int | None = None,
        lr: torch.Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[float, int]:
        rows = [
            row_of(i, dict(zip(lists, row, strict=True)))
            for i, row in enumerate(zip(*lists.values(), strict=True))
        ]
        launches = ctypes.c_int()
        value = native(
            int(step.adam),
            (HostRow * len(rows))(*rows),
            len(rows),
            ctypes.c_int64(sum(r.numel for r in rows) if elements is None else elements),
            ctypes.byref(host_options(step)),
            ctypes.c_void_p(None if lr is None else lr.data_ptr()),
            int(reverse),
            ctypes.byref(launches),
        )
        return value, launches.value

    return call


def check(run: Run, step: Step, lists: Lists, **options) -> int:
    expected = copied(lists)
    penalty = step.reference(expected)
    value, launches = run(step, lists, **options)
    if step.springs:
        dtype = lists["params"][0].dtype if lists["params"] else torch.float32
        assert abs(value - penalty) <= value_budget(penalty, dtype)
    else:
        assert math.isnan(value), "nobody asked for a sum"
    for name, tensors in expected.items():
        for i, (found, right) in enumerate(zip(lists[name], tensors, strict=True)):
            assert torch.equal(found, right), f"{name}[{i}]"
    return launches


@both_orders
@every_dtype
@every_step
def test_a_step_is_the_specifications_bit_for_bit(run, step, dtype, reverse):
    if not step.fits(dtype):
        pytest.skip("no such operands beside this dtype")
    sizes = [1, 2, 3, 4, 5, 7, 1023, 0, 1025, 2049]
    check(run, step, step.make([torch.randn(n).to(dtype) for n in sizes]), reverse=reverse)


@every_dtype
@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov"])
def test_long_chunks_and_large_tables_too(run, name, dtype):
    lists = STEPS[name].make([torch.randn(n).to(dtype) for n in (16384, 40_001)])
    check(run, STEPS[name], lists, elements=2048 * 16384)


@every_dtype
@pytest.mark.parametrize("name", ["adamw", "adam_bfloat16_fisher_master", "sgd"])
def test_misaligned_operands_are_walked_too(run, name, dtype):
    step = STEPS[name]
    if not step.fits(dtype):
        pytest.skip("no such operands beside this dtype")
    wide = step.make([torch.randn(n + 1).to(dtype) for n in (1001, 5, 4098)])
    for misaligned in wide:
        if misaligned == "steps":
            continue
        lists = {
            n: ts if n == "steps" else [t[1:] if n == misaligned else t[:-1] for t in ts]
            for n, ts in copied(wide).items()
        }
        check(run, step, lists)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_rows_of_all_dtypes_share_a_call(run, name):
    step = STEPS[name]
    lists = step.make([torch.randn(77).to(dtype) for dtype in DTYPES])
    assert check(run, step, lists) == 4 + step.adam + 1  # and the counts, and the sum


@pytest.mark.parametrize("name", ["adam", "adam_plain", "sgd", "sgd_plain"])
def test_hundreds_of_tensors_are_one_launch(run, name):
    step = STEPS[name]
    lists = step.make([torch.randn(1 + i % 7) for i in range(300)])
    assert check(run, step, lists) == 1 + step.adam + step.springs


def test_thousands_of_tensors_are_a_few(run):
    lists = STEPS["adam"].make([torch.randn(1 + i % 3) for i in range(2100)])
    assert check(run, STEPS["adam"], lists) <= 10


@pytest.mark.parametrize("name", ["adamw", "adamw_proximal", "sgd", "sgd_dampened_proximal"])
def test_a_learning_rate_on_the_device_is_the_one_that_counts(run, name):
    step, lr = STEPS[name], torch.tensor(0.037)
    lists = step.make([torch.randn(1029), torch.randn(3)])
    expected = copied(lists)
    step.with_options(lr=lr.item()).reference(expected)
    run(step.with_options(lr=1.0), lists, lr=lr)
    for key, tensors in expected.items():
        assert all(map(torch.equal, lists[key], tensors)), key


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_infinite_gradients_and_nan_arrive_as_they_would(run, name):
    step = STEPS[name]
    lists = step.make([torch.randn(9)])
    lists["grads"][0][:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    expected = copied(lists)
    step.reference(expected)
    run(step, lists)
    for key, (right,) in expected.items():
        assert torch.equal(lists[key][0].nan_to_num(nan=7.0), right.nan_to_num(nan=7.0)), key


@pytest.mark.skipif("EWC_FAST_CUDA_ON_HOST" in os.environ, reason="these are those tests")
def test_nothing_is_read_or_written_outside_the_operands(tmp_path):
    """The same tests once more, in a process of its own under AddressSanitizer."""
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    library = build("optimizer", tmp_path, *options)
    compiler = shutil.which("g++") or "g++"
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("no AddressSanitizer runtime beside the compiler")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "EWC_FAST_CUDA_ON_HOST": str(library),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", "(specification and forward) or misaligned or share"],
        env=environment, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
