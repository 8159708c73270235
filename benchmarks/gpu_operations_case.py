"""The memory-bound operations on a GPU: operands, what competes, and what is right.

The floor is the traffic: every operand is read once, every written one also written once. The
bandwidth it is held to is that of PyTorch's copy between two buffers on the device, measured in the
same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from gpu_timing import OURS
from harness import MismatchError, Provider
from layouts import Shape, scaled, transformer
from torch import Tensor

from ewc_fast import functional, reference

CUDA, TRITON = f"{OURS}, cuda", f"{OURS}, triton"
EAGER, COMPILED = "reference, eager", "reference, torch.compile"
FOREACH = "torch foreach"
COPY = "torch copy on the device"
MOST_COPIED = 8 << 30  # bytes moved by the copy; larger operands are compared by bandwidth

EWC_LAMBDA, LR, WEIGHT, SAMPLES = 400.0, 1e-4, 0.5, 8
SLICE = 1 << 25  # elements that are checked at a time in float64
ROUNDINGS = 4  # eps of a written operand's dtype that its error may have, of what was added
VALUE_TOLERANCE = 2e-5  # of a sum of positive terms in float32, flushed into float64

Role = Literal["param", "fisher", "state", "residual", "chunk"]
Lists = tuple[list[Tensor], ...]


@dataclass(frozen=True)
class Operation:
    """An operation with its numbers bound: by this library, by the reference, by foreach."""

    call: Callable[..., object]
    reference: Callable[..., object]
    roles: tuple[Role, ...]
    written: int  # the first so many operands
    foreach: Callable[..., object] | None = None
    plan: bool = True  # whether it takes one


def _foreach_penalty_grad(grads: list[Tensor], params: list[Tensor], fisher: list[Tensor],
                          anchor: list[Tensor]) -> Tensor:  # fmt: skip
    distances = torch._foreach_sub(params, anchor)
    torch._foreach_addcmul_(grads, fisher, distances, value=EWC_LAMBDA)
    torch._foreach_mul_(distances, distances)
    torch._foreach_mul_(distances, fisher)
    return torch.stack([terms.sum(dtype=torch.float64) for terms in distances]).sum() * (
        EWC_LAMBDA / 2
    )


def _foreach_square(fisher: list[Tensor], grads: list[Tensor]) -> None:
    torch._foreach_addcmul_(fisher, grads, grads, value=WEIGHT)


def _foreach_chunk(fisher: list[Tensor], chunks: list[Tensor]) -> None:
    for sample in zip(*(chunk.unbind(0) for chunk in chunks), strict=True):
        _foreach_square(fisher, list(sample))


def _foreach_proximal(params: list[Tensor], fisher: list[Tensor], anchor: list[Tensor]) -> None:
    strengths = torch._foreach_mul(fisher, EWC_LAMBDA * LR)
    weights = torch._foreach_div(strengths, torch._foreach_add(strengths, 1.0))
    steps = torch._foreach_mul(weights, torch._foreach_sub(anchor, params))
    torch._foreach_add_(params, steps)


_accumulate = partial(functional.accumulate_square_, weight=WEIGHT)
_accumulate_by_reference = partial(reference.accumulate_square_, weight=WEIGHT)
OPERATIONS: dict[str, Operation] = {
    "add_penalty_grad_": Operation(
        partial(functional.add_penalty_grad_, ewc_lambda=EWC_LAMBDA),
        partial(reference.add_penalty_grad_, ewc_lambda=EWC_LAMBDA),
        ("param", "param", "fisher", "state"), written=1, foreach=_foreach_penalty_grad,
    ),
    "accumulate_square_": Operation(
        _accumulate, _accumulate_by_reference, ("fisher", "param"), written=1,
        foreach=_foreach_square,
    ),
    f"accumulate_square_ of {SAMPLES}": Operation(
        _accumulate, _accumulate_by_reference, ("fisher", "chunk"), written=1,
        foreach=_foreach_chunk,
    ),
    "merge_": Operation(
        partial(functional.merge_, gamma=1.0), partial(reference.merge_, gamma=1.0),
        ("fisher", "state", "residual", "state", "param"), written=3, plan=False,
    ),
    "proximal_step_": Operation(
        partial(functional.proximal_step_, ewc_lambda=EWC_LAMBDA, lr=LR),
        partial(reference.proximal_step_, ewc_lambda=EWC_LAMBDA, lr=LR),
        ("param", "fisher", "state"), written=1, foreach=_foreach_proximal,
    ),
}  # fmt: skip


def shapes(layout: str, elements: int) -> list[Shape]:
    """Return one flat buffer, the tensors of GPT-2's blocks, or tensors of 100 elements.

    25 blocks have 300 tensors; few elements make one block.
    """
    if layout == "flat":
        return [(elements,)]
    if layout == "tiny":
        return [(100,)] * (elements // 100)
    return scaled(transformer(25 if elements >= 100_000 else 1), elements)


@dataclass
class Case:
    """An operation on operands of a layout and of two dtypes, on a device."""

    operation: str
    layout: str
    elements: int
    params: torch.dtype
    fisher: torch.dtype
    device: torch.device
    compiled: bool = False  # whether torch.compile competes: it takes seconds
    lists: Lists = field(default=(), repr=False)

    def __str__(self) -> str:
        dtypes = "/".join(str(d).removeprefix("torch.") for d in (self.params, self.fisher))
        return f"{self.operation}, {self.elements:.0e} {self.layout}, {dtypes}"

    @property
    def bytes(self) -> int:
        """What must be moved."""
        what = OPERATIONS[self.operation]
        return self.elements * sum(
            self._dtype(role).itemsize * (SAMPLES if role == "chunk" else 1) * (1 + written)
            for role, written in zip(what.roles, self._written(), strict=True)
        )

    @property
    def copied_bytes(self) -> int:
        """What the copy moves that it is compared with."""
        return min(self.bytes, MOST_COPIED)

    def providers(self) -> dict[str, Provider]:
        """Make the operands; return what competes on them."""
        what = OPERATIONS[self.operation]
        self.lists = self._operands()
        names = {"impl": "cuda"}, {"impl": "triton"}
        calls: dict[str, Callable[[], object]] = {}
        for name, options in zip((CUDA, TRITON), names, strict=True):
            plan = {"plan": functional.Plan()} if what.plan else {}
            calls[name] = partial(what.call, *self.lists, **options, **plan)
        calls[EAGER] = partial(what.reference, *self.lists)
        if self.compiled:
            backend = "inductor" if self.device.type == "cuda" else "aot_eager"
            whole = torch.compile(what.reference, backend=backend, dynamic=False)
            calls[COMPILED] = partial(whole, *self.lists)
        if what.foreach is not None:
            calls[FOREACH] = partial(what.foreach, *self.lists)
        found = {name: Provider(call, partial(self._check, call)) for name, call in calls.items()}
        source = torch.empty(self.copied_bytes // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found[COPY] = Provider(partial(target.copy_, source.zero_()), lambda: None)
        return found

    def _written(self) -> list[bool]:
        what = OPERATIONS[self.operation]
        return [position < what.written for position in range(len(what.roles))]

    def _dtype(self, role: Role) -> torch.dtype:
        return {"fisher": self.fisher, "state": torch.float32, "residual": torch.bfloat16}.get(
            role, self.params
        )

    def _operands(self) -> Lists:
        draw = torch.Generator(self.device).manual_seed(0)
        # what float32 rounds away of an anchor near 1
        scales = {"residual": 2.0**-26}
        return tuple(
            [
                torch.rand(
                    (SAMPLES, *shape) if role == "chunk" else shape,
                    generator=draw, device=self.device, dtype=self._dtype(role),
                ).mul_(scales.get(role, 1.0))
                for shape in shapes(self.layout, self.elements)
            ]
            for role in OPERATIONS[self.operation].roles
        )  # fmt: skip

    def _check(self, call: Callable[[], object]) -> None:
        what = OPERATIONS[self.operation]
        before = [[tensor.clone() for tensor in tensors] for tensors in self.lists[: what.written]]
        value = call()
        worst, values = [], []
        for index in range(len(self.lists[0])):
            old = [tensors[index] for tensors in (*before, *self.lists[what.written :])]
            new = [tensors[index] for tensors in self.lists[: what.written]]
            for old_part, new_part in _slices(old, new):
                errors, added = _errors(what, old_part, new_part)
                worst.append(errors)
                values.append(added)
        if not worst:
            return
        error = torch.stack(worst).amax(0)
        for position, roundings in enumerate(error.tolist()):
            if not roundings <= ROUNDINGS:
                name = f"operand {position} ({what.roles[position]})"
                raise MismatchError(f"{name}: off by {roundings:.3g} eps, {ROUNDINGS} allowed")
        if isinstance(value, Tensor):
            exact = sum(v.item() for v in values if isinstance(v, Tensor))
            if not abs(value.item() - exact) <= VALUE_TOLERANCE * abs(exact):
                raise MismatchError(f"value: expected {exact!r}, got {value.item()!r}")


def _slices(
    old: Sequence[Tensor], new: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the same elements of all tensors of a row, not too many at a time."""
    elements = new[0].numel()
    flat = [t.view(-1, elements).squeeze(0) for t in (*old, *new)]
    for start in range(0, elements, SLICE):
        parts = [t[..., start : start + SLICE] for t in flat]
        yield parts[: len(old)], parts[len(old) :]


def _errors(what: Operation, old: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, object]:
    """Return the written operands' largest errors in eps, and the value, in float64."""
    exact = [[tensor.double()] for tensor in old]
    value = what.reference(*exact)
    errors = []
    for position, found in enumerate(new):
        want, was, got = exact[position][0], old[position].double(), found.double()
        eps = torch.finfo(found.dtype).eps
        if what.roles[position] == "residual":
            # with the anchor before it: in float64 that holds everything and leaves nothing
            want, got = exact[position - 1][0] + want, new[position - 1].double() + got
            was, eps = want, eps * torch.finfo(new[position - 1].dtype).eps
        allowed = eps * (want.abs() + was.abs()) + math.ulp(0.0)
        errors.append(((got - want).abs() / allowed).amax())
    return torch.stack(errors), value
