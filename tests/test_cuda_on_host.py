"""The CUDA kernels' indexing, tails, sums and rounding, run on the CPU with fibers for threads."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoded_lists import READING, pair_of_lists, shifted
from host_kernels import DTYPES, FISHER_DTYPES, HERE, HostRow, build, host_row
from list_operations import (
    OPERATIONS,
    ListOperation,
    Lists,
    every_instance,
    noise,
    positive,
    rounded_by_chance,
)

LONGEST_CHUNK = 16384
LARGE = 2048 * LONGEST_CHUNK  # elements from which on chunks are that long
Run = Callable[..., "tuple[float, int]"]

every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
both_orders = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def row_of(operation: ListOperation, ordinal: int, row: tuple[torch.Tensor, ...]) -> HostRow:
    made = host_row(ordinal, dict(enumerate(row)))
    param, fisher = row[operation.param], row[operation.fisher]
    made.numel, made.fisher = fisher.numel(), FISHER_DTYPES.index(fisher.dtype)
    made.dtype = DTYPES.index(param.dtype)
    if param.dim() > fisher.dim():
        made.samples, made.sample_stride = param.shape[0], param.stride(0)
    return made


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Return a function that runs an operation's kernels on the CPU: its value and its launches."""
    given = os.environ.get("EWC_FAST_CUDA_ON_HOST")
    library = Path(given) if given else build("operations", tmp_path_factory.mktemp("cuda_on_host"))
    native = ctypes.CDLL(str(library)).run
    native.restype = ctypes.c_double

    def call(
        operation: ListOperation,
        lists: Lists,
        *,
        elements: int | None = None,
        seed: int = 0,
        reverse: bool = False,
        coefficient: float | None = None,
    ) -> tuple[float, int]:
        rows = [row_of(operation, i, row) for i, row in enumerate(zip(*lists, strict=True))]
        launches = ctypes.c_int()
        value = native(
            operation.name.encode(),
            (HostRow * len(rows))(*rows),
            len(rows),
            ctypes.c_int64(sum(r.numel for r in rows) if elements is None else elements),
            ctypes.c_double(operation.coefficient if coefficient is None else coefficient),
            ctypes.c_uint32(seed),
            int(reverse),
            ctypes.byref(launches),
        )
        return value, launches.value

    return call


def like(lists: Lists) -> Lists:
    return [[t.clone() for t in tensors] for tensors in lists]


def check(operation: ListOperation, run: Run, lists: Lists, **options) -> int:
    before = like(lists)
    value, launches = run(operation, lists, **options)
    assert math.isnan(value) != operation.sums
    operation.check(before, lists, operation.coefficient, value)
    for place, (old, new) in enumerate(zip(before, lists, strict=True)):
        if place not in operation.written:
            assert all(map(torch.equal, old, new)), "an operand that is only read was written"
    return launches


# one element, whole packs and tails, borders of packs and of chunks; as small and as large tables
SIZES = {
    "tails": ([1, 2, 3, 4, 5, 7, 8, 9, 1023, 1025, 0, 2047], 0),
    "short_chunks": ([1024, 5121], 0),
    "long_chunks": ([16383, 16384, 16385, 40001], LARGE),
    "nothing": ([], 0),
    "only_empty": ([0, 0], 0),
}


@both_orders
@every_instance
@pytest.mark.parametrize(("sizes", "elements"), SIZES.values(), ids=SIZES.keys())
@every_operation
def test_every_element_is_visited_once(run, operation, sizes, elements, dtype, fisher, reverse):
    if elements == LARGE and reverse:
        sizes = sizes[2:3]
    lists = operation.make([torch.randn(n).to(dtype) for n in sizes], fisher)
    check(operation, run, lists, elements=elements, reverse=reverse)


@every_instance
@every_operation
def test_misaligned_operands_are_walked_too(run, operation, dtype, fisher):
    sizes = [1001, 5, 4098, 8192]
    wide = operation.make([torch.randn(n + 1).to(dtype) for n in sizes], fisher)
    for misaligned in range(len(wide)):  # one operand at a time, then all
        lists = [
            [t[1:] if place == misaligned else t[:-1] for t in tensors]
            for place, tensors in enumerate(like(wide))
        ]
        check(operation, run, lists)
    check(operation, run, [[t[1:] for t in tensors] for tensors in like(wide)])


@every_operation
def test_rows_of_all_dtypes_share_a_call(run, operation):
    def rows():
        for fisher in (None, torch.bfloat16):
            for dtype in DTYPES:
                if fisher is None or dtype != torch.float64:
                    yield operation.make([torch.randn(77).to(dtype)], fisher)

    lists = [[t for row in column for t in row] for column in zip(*rows(), strict=True)]
    launches = check(operation, run, lists) - operation.sums
    assert launches == 7


@every_operation
@pytest.mark.parametrize(("rows", "launches"), [(300, 1), (400, 1), (1500, 3)])
def test_hundreds_of_tensors_are_one_launch(run, operation, rows, launches):
    lists = operation.make([torch.randn(1 + i % 7) for i in range(rows)], None)
    found = check(operation, run, lists) - operation.sums  # and one that adds up
    assert found == 1 if launches == 1 else 2 <= found <= launches


@both_orders
@every_instance
@pytest.mark.parametrize("samples", [0, 1, 5, 6])
@pytest.mark.parametrize("gap", [0, 3], ids=["dense", "stride_that_breaks_packs"])
def test_stacked_gradients_are_squared_one_by_one(run, samples, gap, dtype, fisher, reverse):
    params = [torch.randn(n).to(dtype) for n in (1, 8, 1029, 4096)]
    grads = [torch.randn(samples, p.numel() + gap).to(dtype)[:, : p.numel()] for p in params]
    lists = [positive(params, fisher), grads]
    check(OPERATIONS["accumulate_square"], run, lists, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_bfloat16_fisher_is_rounded_by_the_stated_chance(run, dtype, seed):
    params = [torch.randn(n).to(dtype) for n in (5, 1029, 4096)]
    fisher, grads = positive(params, torch.bfloat16), noise(params)
    squares = [g.float() * g.float() for g in grads]
    exact = [f.float() + torch.tensor(0.3) * s for f, s in zip(fisher, squares, strict=True)]
    run(OPERATIONS["accumulate_square"], [fisher, grads], seed=seed)
    for ordinal, (f, value) in enumerate(zip(fisher, exact, strict=True)):
        assert torch.equal(f, rounded_by_chance(value, seed, ordinal))

    for name in ("merge", "merge_online"):
        operation = OPERATIONS[name]
        lists = operation.make([torch.randn(n).to(dtype) for n in (5, 1029)], torch.bfloat16)
        new = lists[-2]
        exact = [(operation.coefficient * f.double() + n.double()).float()
                 for f, n in zip(lists[0], new, strict=True)]  # fmt: skip
        run(operation, lists, seed=seed)
        for ordinal, (f, value) in enumerate(zip(lists[0], exact, strict=True)):
            assert torch.equal(f, rounded_by_chance(value, seed, ordinal))


def test_rounding_by_chance_keeps_what_rounding_to_nearest_loses(run):
    """A million additions of 2^-12 to ones, each below a half of bfloat16's 2^-7 there."""
    n, calls = 4096, 256
    fisher, grads = [torch.ones(n, dtype=torch.bfloat16)], [torch.full((n,), 2.0**-6)]
    for seed in range(calls):
        run(OPERATIONS["accumulate_square"], [fisher, grads], seed=seed, coefficient=1.0)
    exact, chance_of_step = 1 + calls * 2.0**-12, 2.0**-5
    deviation = (calls * chance_of_step * (1 - chance_of_step)) ** 0.5 * 2.0**-7
    assert abs(fisher[0].double().mean() - exact) < 5 * deviation / n**0.5
    assert fisher[0].double().std() < 1.2 * deviation


def test_a_bfloat16_fisher_keeps_infinity_and_nan(run):
    inf, nan = float("inf"), float("nan")
    fisher = [torch.tensor([inf, nan, 1.0, 0.0, 1.0], dtype=torch.bfloat16)]
    grads = [torch.tensor([1.0, 1.0, inf, 0.0, nan])]
    for seed in range(20):
        run(OPERATIONS["accumulate_square"], [fisher, grads], seed=seed)
        assert fisher[0].float().nan_to_num(nan=-1).tolist()[1:4:2] == [-1, 0]
        assert fisher[0][0] == fisher[0][2] == inf
        assert fisher[0][4].isnan()


def check_decoded(operation: ListOperation, run: Run, lists: Lists, twin: Lists, **options) -> int:
    """Compare what comes of a Fisher in 8 bits with what comes of its values; return launches."""
    before = like(lists)
    value, launches = run(operation, lists, **options)
    expected, _ = run(operation, twin, **options)
    assert value == expected or not operation.sums
    for place, (old, new) in enumerate(zip(before, lists, strict=True)):
        same = old if place not in operation.written else twin[place]
        assert all(map(torch.equal, same, new))
    return launches - operation.sums


every_reading = pytest.mark.parametrize("operation", READING.values(), ids=READING.keys())
every_half = pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)


@both_orders
@every_half
@pytest.mark.parametrize(("sizes", "elements"), SIZES.values(), ids=SIZES.keys())
@every_reading
def test_every_code_is_decoded_as_in_the_specification(
    run, operation, sizes, elements, dtype, reverse
):
    if elements == LARGE and reverse:
        sizes = sizes[2:3]
    pair = pair_of_lists(operation, [torch.randn(n).to(dtype) for n in sizes])
    launches = check_decoded(operation, run, *pair, elements=elements, reverse=reverse)
    assert launches == (sum(sizes) > 0)


@every_half
@every_reading
def test_misaligned_codes_are_decoded_too(run, operation, dtype):
    pair = pair_of_lists(operation, [torch.randn(n).to(dtype) for n in (1001, 5, 4098)])
    places = range(len(pair[1]))
    for misaligned in ([place] for place in places):
        check_decoded(operation, run, *(shifted(lists, misaligned) for lists in pair))
    check_decoded(operation, run, *(shifted(lists, places) for lists in pair))
    check_decoded(operation, run, shifted(pair[0], [len(places)]), like(pair[1]))  # the scales


@every_reading
def test_codes_and_values_share_a_call(run, operation):
    params = [torch.randn(n) for n in (300, 1025, 7)]
    encoded, decoded = pair_of_lists(operation, params)
    unused = [[torch.empty(0) for _ in params]]
    both = [a + b for a, b in zip(encoded, like([*decoded, *unused]), strict=True)]
    twice = [a + b for a, b in zip(like(decoded), like(decoded), strict=True)]
    assert check_decoded(operation, run, both, twice) == 2


@every_operation
def test_both_thread_orders_give_the_same_bits(run, operation):
    lists = operation.make([torch.randn(50_000), torch.randn(3)], torch.bfloat16)
    results = []
    for reverse in (False, True, False):
        made = like(lists)
        value, _ = run(operation, made, reverse=reverse, seed=3)
        results.append([torch.tensor(value).nan_to_num(), *(t for row in made for t in row)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif("EWC_FAST_CUDA_ON_HOST" in os.environ, reason="these are those tests")
def test_nothing_is_read_or_written_outside_the_operands(tmp_path):
    """The same tests once more, in a process of its own under AddressSanitizer."""
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    library = build("operations", tmp_path, *options)
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
    quick = "every_element or misaligned or stacked or share or every_code"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", quick], env=environment, capture_output=True, text=True, cwd=HERE.parent
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
