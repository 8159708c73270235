"""A saved EWC comes back whole, bit for bit, or not at all; and no crash costs the old file."""

from __future__ import annotations

import builtins
import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import mlp
from torch import nn
from training import batch, consolidated, loss, same, shift

from ewc_fast import EWC, EWCOptimizer, persistence

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

STORAGES = ["float32", "bfloat16", "e5m3", "float32@cpu", "e5m3@cpu"]


@pytest.fixture
def saved(tmp_path):
    model, ewc = consolidated()
    ewc.save(tmp_path / "ewc.safetensors")
    return model, ewc, tmp_path / "ewc.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_it_comes_back_bit_for_bit_with_its_settings(storage, dtype, tmp_path):
    model, ewc = consolidated(
        lambda: mlp().to(dtype), ewc_lambda=12.5, gamma=0.75, anchor="latest", storage=storage
    )
    ewc.save(tmp_path / "ewc.safetensors")
    loaded = EWC.load(tmp_path / "ewc.safetensors", model)
    assert same(loaded.state_dict(), ewc.state_dict())
    assert repr(loaded) == repr(ewc)
    for one in (ewc, loaded):
        torch.manual_seed(1)
        one.consolidate_from({n: torch.ones_like(p) for n, p in model.named_parameters()})
    assert same(loaded.state_dict(), ewc.state_dict())


@pytest.mark.parametrize("importance", ["mas", "si", "l2"])
def test_other_importances_come_back_too(importance, tmp_path):
    model = mlp()
    ewc = EWC(model, ewc_lambda=1.0, importance=importance)
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    for _ in range(2):  # the second leaves a path that is not yet a task's
        loss(model, batch(model)).backward()
        optimizer.step()
        if ewc.tasks == 0:
            ewc.consolidate([batch(model)])
    ewc.save(tmp_path / "ewc.safetensors")
    loaded = EWC.load(tmp_path / "ewc.safetensors", model)
    assert same(loaded.state_dict(), ewc.state_dict())
    assert repr(loaded) == repr(ewc)


def test_before_the_first_task_there_are_only_settings(tmp_path):
    model = mlp()
    EWC(model, ewc_lambda=3.0, gamma=0.5).save(str(tmp_path / "ewc"))
    loaded = EWC.load(str(tmp_path / "ewc"), model)
    assert (loaded.tasks, loaded.ewc_lambda, loaded.gamma) == (0, 3.0, 0.5)
    assert loaded.penalty().item() == 0.0


@pytest.mark.parametrize("storage", ["float32", "e5m3"])
def test_any_order_of_memory_can_be_saved(storage, tmp_path):
    model = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    ewc = EWC(model, ewc_lambda=1.0, storage=storage)
    ewc.consolidate_from({n: torch.rand_like(p) for n, p in model.named_parameters()})
    ewc.save(tmp_path / "ewc")
    loaded = EWC.load(tmp_path / "ewc", model)
    for name, values in ewc.fisher.items():
        assert torch.equal(loaded.fisher[name], values)
        assert loaded.fisher[name].stride() == values.stride()


def test_a_scalar_and_an_empty_parameter_can_be_saved(tmp_path):
    params = {"scale": nn.Parameter(torch.tensor(2.0)), "none": nn.Parameter(torch.zeros(0, 3))}
    for storage in ("float32", "e5m3"):
        ewc = EWC(params.items(), ewc_lambda=1.0, storage=storage)
        ewc.consolidate_from({n: torch.ones_like(p) for n, p in params.items()})
        ewc.save(tmp_path / "ewc")
        assert same(EWC.load(tmp_path / "ewc", params.items()).state_dict(), ewc.state_dict())


def test_the_file_says_what_it_is(saved):
    with safetensors.safe_open(saved[2], framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    about = json.loads(metadata["ewc_fast"])
    assert about["version"] == persistence.VERSION
    assert "Elastic Weight Consolidation" in about["description"]
    assert about["library"].startswith("ewc_fast ")
    assert about["state"]["ewc_lambda"] == 30.0
    assert about["state"]["storage"] == "float32"
    assert len(metadata["sha256"]) == 64
    fields = ("fisher", "anchor", "residual")
    assert names == {f"{field}/{name}" for field in fields for name in saved[1].parameters}


def test_saving_replaces_the_file_and_leaves_nothing_else(saved):
    model, ewc, path = saved
    ewc.consolidate([batch(model)])
    ewc.save(path)
    assert EWC.load(path, model).tasks == 3
    assert os.listdir(path.parent) == [path.name]


def test_whoever_may_read_a_new_file_may_read_it(saved):
    (saved[2].parent / "other").touch()
    assert saved[2].stat().st_mode == (saved[2].parent / "other").stat().st_mode


@pytest.mark.parametrize("where", ["first", "header", "middle", "last", "end"])
def test_an_altered_byte_is_refused(saved, where):
    model, _, path = saved
    data = bytearray(path.read_bytes())
    at = {"first": 0, "header": 60, "middle": len(data) // 2, "last": -1, "end": len(data) - 200}
    data[at[where]] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ewc\.safetensors: (altered|truncated)"):
        EWC.load(path, model)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(saved, kept):
    model, _, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="truncated"):
        EWC.load(path, model)


def rewritten(path, change):
    """Save the file's tensors again with other metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def with_setting(**settings):
    def change(tensors, metadata):
        about = json.loads(metadata["ewc_fast"])
        about["state"] |= settings.pop("state", {})
        metadata["ewc_fast"] = json.dumps(about | settings)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(with_setting(version=99), "version 99 is newer than 1.*upgrade", id="newer"),
        pytest.param(with_setting(state={"ewc_lambda": 1e9}), "checksum differs", id="setting"),
        pytest.param(lambda t, m: m.pop("ewc_fast"), "expected a file that EWC.save", id="other"),
        pytest.param(lambda t, m: m.update(ewc_fast="{"), "description can't be read", id="json"),
        pytest.param(lambda t, m: m.pop("sha256"), "checksum differs", id="no_checksum"),
        pytest.param(lambda t, m: t.popitem(), "checksum differs", id="tensor_gone"),
    ],
)
def test_other_contents_are_refused(saved, change, message):
    rewritten(saved[2], change)
    with pytest.raises(ValueError, match=message):
        EWC.load(saved[2], saved[0])


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "ewc.pt"
    torch.save({}, path)
    with pytest.raises(ValueError, match="truncated, altered, or no safetensors file"):
        EWC.load(path, mlp())


def test_another_model_is_refused_as_by_load_state_dict(saved):
    with pytest.raises(ValueError, match="state: of another model"):
        EWC.load(saved[2], nn.Linear(3, 3))


def test_a_missing_file_says_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        EWC.load(tmp_path / "nowhere", mlp())


def test_a_failure_while_saving_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    model, ewc, path = saved
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ewc.consolidate([batch(model)])
    with pytest.raises(OSError, match="No space left"):
        ewc.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_data_are_on_the_disk_before_the_name_is(saved, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    saved[1].save(saved[2])
    assert calls == ["fsync", "replace", "fsync"]


SAVE_FOR_EVER = """
import sys, torch
from ewc_fast import EWC
model = torch.nn.Linear(2000, 2000, bias=False)  # 40 MB of state
ewc = EWC(model, ewc_lambda=1.0)
while True:
    ewc.consolidate_from({"weight": torch.ones(2000, 2000)})
    ewc.save(sys.argv[1])
    print(ewc.tasks, flush=True)
"""


@pytest.mark.parametrize("kills", range(3))
def test_a_process_killed_in_mid_write_leaves_a_whole_file(tmp_path, kills):
    path = tmp_path / "ewc.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        finished = int(process.stdout.readline())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            partial = [file for file in os.listdir(tmp_path) if file.endswith(".partial")]
            if partial and sizes_up_to(tmp_path / partial[0]) > kills * 10_000_000:
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished += len(process.stdout.read().split())
    process.stdout.close()
    model = nn.Linear(2000, 2000, bias=False)
    loaded = EWC.load(path, model)
    assert loaded.tasks in (finished, finished + 1)
    assert torch.equal(loaded.fisher["weight"], torch.full((2000, 2000), float(loaded.tasks)))
    EWC(model, ewc_lambda=1.0).save(path)  # what was left behind is in nobody's way
    assert EWC.load(path, model).tasks == 0


def sizes_up_to(file):
    try:
        return file.stat().st_size
    except FileNotFoundError:  # renamed meanwhile
        return 0


def test_without_safetensors_the_error_says_what_to_install(saved, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError("No module named 'safetensors'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'ewc-fast\[safetensors\]'"):
        saved[1].save(saved[2])
    with pytest.raises(ImportError, match=r"pip install 'ewc-fast\[safetensors\]'"):
        EWC.load(saved[2], saved[0])


def test_a_loaded_state_is_apart_from_the_file(saved):
    model, _, path = saved
    loaded = EWC.load(path, model)
    before = copy.deepcopy(loaded.state_dict())
    path.unlink()
    shift(model)
    assert same(loaded.state_dict(), before)
