"""An EWC's state as one safetensors file: written whole or not at all, refused when altered.

Tensors are named ``field/parameter`` (``fisher/0.weight``). The metadata's entry ``ewc_fast`` is a
JSON object of everything else: settings, the state's format, this layout's ``version``, the library
that wrote it, and a line that says what the file is; its entry ``sha256`` covers both. (Not a
signature: it finds accidents, not forgers.)

Writing goes to a hidden file beside the target, ``.NAME.*.partial``, which is forced to the disk
and then renamed: a crash at any time leaves the old file or the new one, and perhaps that file to
delete. The checksum reads the tensors once more, at 0.3 to 2 GB/s on one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewc_fast import formats

VERSION = 1
_DESCRIPTION = (
    "Elastic Weight Consolidation state: Fisher diagonal, anchor and its residual (what the "
    "anchor's dtype rounds away) of each parameter. Read with ewc_fast.EWC.load(path, model)."
)


def write(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a :meth:`ewc_fast.EWC.state_dict`, replacing the file at ``path`` at once.

    Raises
    ------
    ImportError
        Without the package safetensors.
    OSError
        Where the folder can't be written to. The file is then as before.
    """
    save_file = _safetensors("torch").save_file
    tensors, settings = _taken_apart(state)
    settings |= {"version": VERSION, "description": _DESCRIPTION, "library": _library()}
    description = json.dumps(settings, sort_keys=True)
    metadata = {"ewc_fast": description, "sha256": _checksum(description, tensors)}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # as files are made here; safetensors makes private ones
        save_file(tensors, partial, metadata)
        partial.chmod(mode)
        _force_to_disk(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _force_to_disk(target.parent)  # the folder's entry too


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state that :func:`write` wrote, on the CPU.

    Raises
    ------
    ImportError
        Without the package safetensors.
    OSError
        Where there is no file, or none that may be read.
    ValueError
        For a file that is truncated, altered, no EWC's, or of a newer version.
    """
    safe_open, error = _safetensors().safe_open, _safetensors().SafetensorError
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except error as problem:
        raise ValueError(
            f"{os.fspath(path)}: truncated, altered, or no safetensors file ({problem})"
        ) from None
    if "ewc_fast" not in metadata:
        raise ValueError(f"{os.fspath(path)}: expected a file that EWC.save wrote, got another one")
    settings = _settings(metadata["ewc_fast"], path)
    if _checksum(metadata["ewc_fast"], tensors) != metadata.get("sha256"):
        raise ValueError(
            f"{os.fspath(path)}: altered since it was saved, the checksum differs; use another copy"
        )
    return _put_together(settings, tensors)


def _settings(description: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(description)
        version = int(settings["version"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{os.fspath(path)}: altered, its description can't be read") from None
    if version > VERSION:
        raise ValueError(
            f"{os.fspath(path)}: version {version} is newer than {VERSION}, the newest that this "
            "version of ewc_fast reads; upgrade ewc_fast"
        )
    return settings


def _taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by ``field/parameter``, in the order of their dimensions, and all else."""
    state = _in_order(state)
    fields = {key: value for key, value in state.items() if isinstance(value, Mapping)}
    tensors = {
        f"{field}/{name}": tensor.detach().cpu().contiguous()
        for field, by_name in fields.items()
        for name, tensor in by_name.items()
    }
    others = {key: value for key, value in state.items() if key not in fields}
    return tensors, {"state": others, "fields": sorted(fields)}


def _put_together(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {**settings["state"], **{field: {} for field in settings["fields"]}}
    for key, tensor in tensors.items():
        field, _, name = key.partition("/")
        state[field][name] = tensor
    return state


def _in_order(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Encode 8-bit Fishers of another order in memory anew: files know one order alone."""
    fisher, scales = dict(state["fisher"]), dict(state["scales"])
    for name in scales:
        if not fisher[name].is_contiguous():
            values = formats.decode_e5m3(fisher[name], scales[name]).contiguous()
            fisher[name], scales[name] = formats.encode_e5m3(values)
    return {**state, "fisher": fisher, "scales": scales}


def _checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _library() -> str:
    from importlib.metadata import version

    return f"ewc_fast {version('ewc-fast')}, torch {torch.__version__}"


def _safetensors(part: str = "") -> Any:
    """Return the optional package, or its part for PyTorch."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "EWC.save and EWC.load need safetensors: pip install 'ewc-fast[safetensors]'"
        ) from error
    return safetensors.torch if part else safetensors
