"""A model's parameters, and their gradients, in one contiguous buffer for each dtype and device."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewc_fast import _checks
from ewc_fast._checks import TensorList
from ewc_fast._native import gradients_of

# A parameter starts at a multiple of so many elements: whole cache lines and 16-byte accesses in
# every dtype, also in a flat Fisher, which has the same places in another dtype.
ALIGNMENT = 64


def flatten_parameters_(model: nn.Module) -> FlatParameters:
    """Move a model's trainable parameters into one buffer for each dtype and device.

    The parameters stay the objects they are, under their names, as views of the buffers: only their
    memory moves (so do gradients that are there), so optimizers made before and after work, and so
    do ``zero_grad``, ``state_dict``, ``load_state_dict`` and ``torch.save``. Operations over the
    whole model are then one launch instead of one for every few tensors. Tied parameters move
    once. Strides stay (``channels_last``, say; gaps are closed), and between parameters there are
    zeros up to the next multiple of 64 elements, which every operation leaves zeros.

    Call it again after anything that gives parameters other memory, or changes which are trained:
    ``model.to(...)``, ``requires_grad_`` (both are noticed on use), parameters that are new or
    replaced by others (these are not). Don't call it between ``forward`` and ``backward``. A copy
    (``copy.deepcopy``) of the model works, but isn't flat until flattened itself. Frozen parameters
    stay where they are.

    It can't flatten what others lay out: parameters under FSDP and other distributed or wrapped
    tensors (flatten before wrapping a model in DistributedDataParallel, without
    ``gradient_as_bucket_view``), tensors on the meta device, lazy or sparse ones, and those that
    share memory with one another. cuDNN wants a recurrent layer's weights in a chunk of their own
    and copies them at each call, with a warning, when they are elsewhere. Saving one flattened
    parameter by itself saves its whole buffer; clone it first.

    Parameters
    ----------
    model
        The module; at least one of its parameters requires gradients.

    Returns
    -------
    The buffers, and ways to lay out Fisher and anchor like them.

    Raises
    ------
    TypeError, ValueError
        For parameters that can't be flattened, by name. Nothing has been moved then.

    Examples
    --------
    >>> import ewc_fast
    >>> model = torch.nn.Linear(4, 3)
    >>> flat = flatten_parameters_(model)
    >>> fisher = flat.flatten([torch.rand_like(p) for p in model.parameters()])
    >>> anchor = flat.flatten([p.detach() for p in model.parameters()])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model(torch.randn(8, 4)).square().mean().backward()
    >>> value = ewc_fast.functional.add_penalty_grad_(
    ...     flat.grads, flat.params, fisher, anchor, ewc_lambda=400.0
    ... )
    >>> optimizer.step()
    >>> flat
    FlatParameters(2 parameters of 15 values in 1 buffer)
    """
    params = _checks.trainable_parameters(model)
    _checks.flattenable(model, params)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return FlatParameters(params, frozen)


@dataclass(frozen=True)
class _Stretch:
    """Where a parameter is: its buffer, the first element there, and its layout."""

    buffer: int
    begin: int
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, buffers: TensorList) -> Tensor:
        """Return the parameter's part of its buffer, as a view."""
        stretch = buffers[self.buffer][self.begin : self.begin + self.shape.numel()]
        return stretch.as_strided(self.shape, self.strides)


class FlatParameters:
    """The buffers that :func:`flatten_parameters_` moved a model's parameters into.

    ``names`` are the parameters' names, in the order that :meth:`flatten` takes tensors in.
    """

    @torch.no_grad()
    def __init__(self, params: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> None:
        self.names = tuple(params)
        self._moved: list[Tensor] = list(params.values())
        self._frozen = frozen
        self._stretches, self._sizes, kinds = _laid_out(self._moved)
        self._params, self._grads = (
            [
                torch.zeros(size, dtype=dtype, device=device)
                for size, (dtype, device) in zip(self._sizes, kinds, strict=True)
            ]
            for _ in range(2)
        )
        self._views = self.unflatten(self._grads)
        for param, grad, stretch in zip(self._moved, self._views, self._stretches, strict=True):
            param.data = stretch.of(self._params).copy_(param)
            if param.grad is not None:
                param.grad = grad.copy_(param.grad)
        self._addresses = self._addresses_now()

    @property
    def params(self) -> list[Tensor]:
        """The parameters, one tensor for each dtype and device.

        Raises
        ------
        RuntimeError
            If the parameters are no longer these buffers' views (after ``model.to(...)``, say), or
            if one was frozen or unfrozen since.
        """
        self._check_still_flat()
        return list(self._params)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, laid out like :attr:`params`; read it after each ``backward()``.

        Backward passes add to gradients in place where they are. Where they aren't, after
        ``zero_grad(set_to_none=True)``, autograd makes new ones: these are copied into the buffers
        here (8 bytes a float32 parameter), and every parameter's ``.grad`` is the buffer's view
        again. A parameter without a gradient gets zeros.

        Raises
        ------
        RuntimeError
            As :attr:`params` where gradients have to be copied, and for gradients that have a graph
            of their own (``create_graph=True``).
        TypeError
            For sparse gradients.
        """
        grads = gradients_of(self._moved)
        if grads is None or not all(map(operator.is_, grads, self._views)):
            self._check_still_flat()
            self._bring_gradients_home()
        return list(self._grads)

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return new buffers laid out like :attr:`params` with ``tensors`` in them, else zeros.

        There is one tensor for each of ``names``, of its shape; those of one buffer have one dtype,
        which becomes the buffer's.

        Raises
        ------
        TypeError, ValueError
            For tensors that don't fit the parameters.
        """
        _checks.like_parameters(
            tensors, dict(zip(self.names, (s.shape for s in self._stretches), strict=True))
        )
        buffers: list[Tensor] = []
        for index, size in enumerate(self._sizes):
            here = [t for t, s in zip(tensors, self._stretches, strict=True) if s.buffer == index]
            dtypes = {t.dtype for t in here}
            if len(dtypes) > 1:
                raise TypeError(
                    "tensors: expected one dtype for the parameters of one buffer, got "
                    f"{', '.join(sorted(map(str, dtypes)))}; convert them to one"
                )
            buffers.append(torch.zeros(size, dtype=dtypes.pop(), device=self._params[index].device))
        for tensor, view in zip(tensors, self.unflatten(buffers), strict=True):
            view.copy_(tensor)
        return buffers

    def unflatten(self, buffers: TensorList) -> list[Tensor]:
        """Return each parameter's part of buffers like :attr:`params`, as views."""
        sizes = [tuple(buffer.shape) for buffer in buffers]
        expected = [(size,) for size in self._sizes]
        if sizes != expected:
            raise ValueError(f"buffers: expected tensors of shapes {expected}, got {sizes}")
        return [stretch.of(buffers) for stretch in self._stretches]

    def __repr__(self) -> str:
        values = sum(param.numel() for param in self._moved)
        buffers = f"{len(self._params)} buffer{'s' * (len(self._params) != 1)}"
        return f"FlatParameters({len(self.names)} parameters of {values:,} values in {buffers})"

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._moved))

    def _check_still_flat(self) -> None:
        # The buffers live as long as this object, so nothing else can be at their addresses.
        now = self._addresses_now()
        if now != self._addresses:
            changed = map(operator.ne, now, self._addresses)
            raise RuntimeError(
                f"parameter {_first(self.names, changed)!r} has other memory than when it was "
                "flattened (model.to(...) gives it new memory); call flatten_parameters_ again"
            )
        if any(param.requires_grad for param in self._frozen.values()):
            thawed = (param.requires_grad for param in self._frozen.values())
            raise RuntimeError(
                f"parameter {_first(tuple(self._frozen), thawed)!r} was frozen when the model was "
                "flattened and is in no buffer; call flatten_parameters_ again"
            )

    @torch.no_grad()
    def _bring_gradients_home(self) -> None:
        for name, param in zip(self.names, self._moved, strict=True):
            if not param.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen after it was flattened, so that its penalty "
                    "would still count; call flatten_parameters_ again"
                )
        grads = [param.grad for param in self._moved]
        for name, grad in zip(self.names, grads, strict=True):
            if grad is not None and (grad.requires_grad or grad.layout != torch.strided):
                _checks.kind(f"gradient of parameter {name!r}", grad)
                raise RuntimeError(
                    f"the gradient of parameter {name!r} has a graph (create_graph=True), "
                    "which a flat buffer can't hold"
                )
        homes: list[Tensor] = []
        strays: list[Tensor] = []
        for param, grad, view in zip(self._moved, grads, self._views, strict=True):
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            else:
                homes.append(view)
                strays.append(grad)
            param.grad = view
        if homes:
            torch._foreach_copy_(homes, strays)


def _laid_out(
    params: Sequence[Tensor],
) -> tuple[list[_Stretch], list[int], list[tuple[torch.dtype, torch.device]]]:
    """Return each parameter's stretch, and the buffers' sizes and kinds."""
    stretches: list[_Stretch] = []
    sizes: list[int] = []
    kinds: dict[tuple[torch.dtype, torch.device], int] = {}
    for param in params:
        index = kinds.setdefault((param.dtype, param.device), len(kinds))
        if index == len(sizes):
            sizes.append(0)
        # Dense strides in the order of the parameter's own.
        strides = torch.empty_like(param, device="meta").stride()
        stretches.append(_Stretch(index, sizes[index], param.shape, strides))
        sizes[index] += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return stretches, sizes, list(kinds)


def _first(names: Sequence[str], marks: Iterable[bool]) -> str:
    return next(name for name, marked in zip(names, marks, strict=True) if marked)
