"""A model's parameters, a Fisher that belongs to them, and saved states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast._checks.arguments import LARGEST, gamma, non_negative, one_of
from ewc_fast._checks.operands import ENCODED_BLOCK, PARAM_DTYPES, kind, short


def named_parameters(pairs: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Return the parameters by name; each must be a floating tensor, given once."""
    params: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                "model: expected a module or (name, parameter) pairs, got an item of type "
                f"{type(pair).__name__}; pass model or model.named_parameters()"
            )
        name, param = pair
        kind(f"parameter {name!r}", param)
        if param.dtype not in PARAM_DTYPES:
            raise TypeError(
                f"parameter {name!r}: expected a floating dtype, got {short(param.dtype)}, which "
                "has no Fisher information; pass only the floating ones: EWC([(n, p) for n, p in "
                "model.named_parameters() if p.is_floating_point()], ...)"
            )
        if name in params:
            raise ValueError(f"parameter {name!r}: given twice; give each name once")
        if id(param) in names:
            raise ValueError(
                f"parameter {name!r}: the same tensor as {names[id(param)]!r}; give each tensor "
                "once, as model.named_parameters() does"
            )
        params[name], names[id(param)] = param, name
    if not params:
        raise ValueError("model: expected at least one parameter, got none")
    return params


def grown_shape(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Raise unless ``new`` is ``old`` with more rows in dimension 0."""
    if len(old) != len(new) or not old or old[1:] != new[1:] or new[0] < old[0]:
        raise ValueError(
            f"parameter {name!r}: expected shape {old} as consolidated, or more rows in dimension "
            f"0, got {new}; give the new parameter another name to start afresh"
        )


def new_fisher(fisher: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Raise unless ``fisher`` fits the parameters and could be a mean of squares."""
    if not isinstance(fisher, Mapping):
        raise TypeError(
            f"fisher: expected a mapping of parameter names to tensors, got {type(fisher).__name__}"
        )
    unknown = sorted(set(fisher) - set(params))
    if unknown:
        raise ValueError(f"fisher: no parameter is named {_listed(unknown)}")
    missing = sorted(n for n, p in params.items() if p.requires_grad and n not in fisher)
    if missing:
        raise ValueError(
            f"fisher: missing for {_listed(missing)}; pass zeros for parameters to leave free"
        )
    for name, tensor in fisher.items():
        kind(f"fisher[{name!r}]", tensor)
        if not tensor.is_floating_point():
            raise TypeError(
                f"fisher[{name!r}]: expected a floating dtype, got {short(tensor.dtype)}"
            )
        if tensor.shape != params[name].shape:
            raise ValueError(
                f"fisher[{name!r}]: expected shape {tuple(params[name].shape)} of the parameter, "
                f"got {tuple(tensor.shape)}"
            )
        mean_of_squares(f"fisher[{name!r}]", tensor)


def mean_of_squares(name: str, tensor: Tensor) -> None:
    """Raise unless all entries are finite and at least 0."""
    lowest, highest = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    if not 0 <= lowest <= highest <= LARGEST:  # false for NaN as well
        raise ValueError(
            f"{name}: expected finite entries >= 0, as means of squares are, "
            f"got entries from {float(lowest):g} to {float(highest):g}"
        )


STORAGES = ("float32", "bfloat16", "e5m3", "float32@cpu", "bfloat16@cpu", "e5m3@cpu")
STATE_FIELDS = ("fisher", "anchor", "residual")
_STATE_KEYS = ("format", "ewc_lambda", "gamma", "rule", "constant", "tasks", *STATE_FIELDS)


def ewc_state(
    state: Mapping[str, Any], params: Mapping[str, Tensor], *, strict: bool, newest: int
) -> None:
    """Raise unless ``state`` is whole, of a known format, and of a model with these parameters."""
    if not isinstance(state, Mapping) or "format" not in state:
        raise ValueError("state: expected what EWC.state_dict() returned, got something else")
    if not isinstance(state["format"], int) or state["format"] > newest:
        raise ValueError(
            f"state: format {state['format']!r} is newer than {newest}, the newest that this "
            "version of ewc_fast reads; upgrade ewc_fast"
        )
    missing = [key for key in _STATE_KEYS if key not in state]
    if missing:
        raise ValueError(f"state: truncated, it lacks {_listed(missing)}")
    non_negative("state['ewc_lambda']", state["ewc_lambda"])
    gamma(state["gamma"])
    one_of("state['rule']", state["rule"], ("merged", "latest"))
    non_negative("state['constant']", state["constant"])
    non_negative("state['tasks']", state["tasks"])
    names = set(state["fisher"])
    for field in STATE_FIELDS:
        if set(state[field]) != names:
            raise ValueError(
                f"state: truncated, fisher and {field} differ in "
                f"{_listed(sorted(names ^ set(state[field])))}"
            )
    unknown = sorted(names - set(params))
    if unknown and strict:
        raise ValueError(
            f"state: of another model, this one has no parameter {_listed(unknown)}; "
            "pass strict=False to keep them for later"
        )
    _encoded_fisher(state)
    for name in names & set(params):
        for field in STATE_FIELDS:
            tensor = state[field][name]
            kind(f"state[{field!r}][{name!r}]", tensor)
            if tensor.shape != params[name].shape:
                raise ValueError(
                    f"state[{field!r}][{name!r}]: expected shape {tuple(params[name].shape)} "
                    f"of the parameter, got {tuple(tensor.shape)}; is it of another model?"
                )


def _encoded_fisher(state: Mapping[str, Any]) -> None:
    """Raise unless codes of 8 bits and their blocks' scales belong together."""
    one_of("state['storage']", state.get("storage", "float32"), STORAGES)
    scales = state.get("scales", {})
    for name, fisher in state["fisher"].items():
        kind(f"state['fisher'][{name!r}]", fisher)
        if (fisher.dtype == torch.uint8) != (name in scales):
            found = "with" if name in scales else "without"
            raise ValueError(
                f"state['fisher'][{name!r}]: expected codes of uint8 with scales, or floating "
                f"values without, got {short(fisher.dtype)} {found}"
            )
        if name not in scales:
            continue
        kind(f"state['scales'][{name!r}]", scales[name])
        blocks = -(-fisher.numel() // ENCODED_BLOCK)
        if tuple(scales[name].shape) != (blocks,):
            raise ValueError(
                f"state['scales'][{name!r}]: expected shape ({blocks},), a scale for each "
                f"{ENCODED_BLOCK} codes, got {tuple(scales[name].shape)}"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; there must be one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model: expected at least one parameter with requires_grad=True, got none")
    return named_parameters(params.items())
