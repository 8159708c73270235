"""The springs that hold parameters near their anchor: per-parameter state and its use each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ewc_fast import formats, functional
from ewc_fast._checks import state_dtype
from ewc_fast._dispatch import Impl
from ewc_fast._native import gradients_of
from ewc_fast.formats import Storage

_PLAIN = Storage("float32", on_cpu=False)


@dataclass
class Spring:
    """Stiffness and rest position of one parameter; all but the scales have its shape and strides.

    A Fisher in 8 bits is codes (uint8) with their ``scales``, see :mod:`ewc_fast.formats`.
    """

    fisher: Tensor
    anchor: Tensor
    residual: Tensor  # bfloat16: what anchor's dtype rounds away
    scales: Tensor | None = None  # of a Fisher in 8 bits

    @classmethod
    def slack(cls, param: Tensor, storage: Storage = _PLAIN) -> Spring:
        """Return a spring without stiffness, at rest where the parameter is."""
        like = param.detach()
        dtype = state_dtype(param.dtype)
        plain = cls(
            fisher=torch.zeros_like(like, dtype=dtype),
            anchor=like.to(dtype=dtype, copy=True),
            residual=torch.zeros_like(like, dtype=torch.bfloat16),
        )
        return plain.kept_in(storage)

    def kept_in(self, storage: Storage) -> Spring:
        """Return the spring in a storage, its Fisher rounded to nearest.

        Beside float64 parameters the Fisher stays in float64.
        """
        kept = Spring(self.fisher_values(), self.anchor, self.residual)
        if self.anchor.dtype != torch.float64:
            if storage.fisher == "e5m3":
                kept.fisher, kept.scales = formats.encode_e5m3(kept.fisher)
            else:
                kept.fisher = kept.fisher.to(getattr(torch, storage.fisher))
        return kept._each(_on_host) if storage.on_cpu else kept

    def fisher_values(self) -> Tensor:
        """Return the Fisher itself, or what its codes stand for."""
        if self.scales is None:
            return self.fisher
        return formats.decode_e5m3(self.fisher, self.scales)

    @torch.no_grad()
    def copy_(self, other: Spring) -> None:
        """Take over another spring's values, in this one's format."""
        self.anchor.copy_(other.anchor)
        self.residual.copy_(other.residual)
        same_order = self.fisher.stride() == other.fisher.stride()
        if self.scales is None:
            self.fisher.copy_(other.fisher_values())
        elif other.scales is not None and same_order:
            self.fisher.copy_(other.fisher)
            self.scales.copy_(other.scales)
        else:
            values = torch.empty_like(self.anchor, dtype=torch.float32)
            codes, scales = formats.encode_e5m3(values.copy_(other.fisher_values()))
            self.fisher.copy_(codes)
            self.scales.copy_(scales)

    def grown(self, param: Tensor, storage: Storage = _PLAIN) -> Spring:
        """Return a spring for a parameter that gained rows, slack on the new ones."""
        spring, rows = Spring.slack(param), self.fisher.shape[0]
        spring.fisher[:rows] = self.fisher_values()
        spring.anchor[:rows] = self.anchor
        spring.residual[:rows] = self.residual
        return spring.kept_in(storage)

    def to(self, device: torch.device | str) -> Spring:
        """Return the spring on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def cut(self, start: int, stop: int) -> Spring:
        """Return views of a part in the order of memory, from the start of a block."""

        def part(tensor: Tensor) -> Tensor:
            return formats.in_memory_order(tensor)[start:stop]

        cut = Spring(part(self.fisher), part(self.anchor), part(self.residual))
        if self.scales is not None:
            cut.scales = self.scales[start // formats.BLOCK : -(-stop // formats.BLOCK)]
        return cut

    def tensors(self) -> list[Tensor]:
        """Return what the spring consists of."""
        kept = [self.fisher, self.anchor, self.residual]
        return kept if self.scales is None else [*kept, self.scales]

    def _each(self, move: Callable[[Tensor], Tensor]) -> Spring:
        return Spring(*map(move, self.tensors()))


def _on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in the host's memory, pinned where a GPU is to copy from it."""
    host = tensor.cpu()
    return host.pin_memory() if torch.cuda.is_available() else host


def merge_(
    springs: Sequence[Spring],
    new_fisher: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    latest: bool,
    gamma: float,
    impl: Impl,
    on_cpu: bool,
) -> float:
    """Merge a new task's springs into these; return the constant that it leaves.

    State that is kept on the CPU (``on_cpu``) is merged there, for implementations of GPUs by what
    ``"auto"`` chooses. Fishers in 8 bits are decoded, merged and encoded one by one.
    """
    if on_cpu:
        params = [param.detach().cpu() for param in params]
        impl = "auto" if impl in ("cuda", "triton") else impl
    rows = list(zip(springs, new_fisher, params, strict=True))
    plain = [row for row in rows if row[0].scales is None]
    constant = _merge_rows_(plain, latest, gamma, impl) if plain else 0.0
    for spring, new, param in rows:
        if spring.scales is not None:
            decoded = Spring(spring.fisher_values(), spring.anchor, spring.residual)
            constant += _merge_rows_([(decoded, new, param)], latest, gamma, impl)
            decoded.fisher.clamp_(max=torch.finfo(torch.float32).max)
            seed = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
            formats.reencode_e5m3_(spring.fisher, spring.scales, decoded.fisher, seed=seed)
    return constant


def _merge_rows_(
    rows: Sequence[tuple[Spring, Tensor, Tensor]], latest: bool, gamma: float, impl: Impl
) -> float:
    springs = [spring for spring, _, _ in rows]
    fisher, anchor = [s.fisher for s in springs], [s.anchor for s in springs]
    new = [new.to(spring.anchor) for spring, new, _ in rows]
    at = [param.detach() for _, _, param in rows]
    if latest:
        functional.merge_online_(fisher, anchor, new, at, gamma=gamma, impl=impl)
        return 0.0
    residual = [spring.residual for spring in springs]
    merged = functional.merge_(fisher, anchor, residual, new, at, gamma=gamma, impl=impl)
    return merged.item()


class ActiveSprings:
    """A fixed set of parameters with their springs, ready to be applied again and again.

    A frozen parameter (``requires_grad=False``) is a constant: it adds to neither value nor
    gradient.
    """

    def __init__(
        self, params: Sequence[Tensor], springs: Sequence[Spring], impl: Impl = "auto"
    ) -> None:
        self._params = list(params)
        self._springs = list(springs)
        self._fisher = [spring.fisher for spring in springs]
        self._anchor = [spring.anchor for spring in springs]
        self._impl = impl
        # The springs' tensors are ours alone (users get views), so only the rest is compared.
        self._gradient_plan = functional.Plan(pinned=("fisher", "anchor"))
        self._proximal_plan = functional.Plan(pinned=("fisher", "anchor"))
        self._moving_part: tuple[list[bool], ActiveSprings] | None = None

    @property
    def operands(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters, their Fisher and their anchor, for steps that have the springs inside."""
        return self._params, self._fisher, self._anchor

    def penalty(self, ewc_lambda: float | Tensor) -> Tensor:
        """Return the penalty as a differentiable float64 scalar."""
        moving = self._moving()
        return functional.penalty(
            moving._params, moving._fisher, moving._anchor, ewc_lambda=ewc_lambda
        )

    def add_penalty_grad_(self, ewc_lambda: float | Tensor, constant: float | Tensor) -> Tensor:
        """Add the penalty's gradient to every ``.grad``, made where missing.

        Return the penalty plus ``constant``.
        """
        grads = _traced_gradients(self._params) if is_compiling() else gradients_of(self._params)
        if grads is None:
            moving = self._moving()  # a frozen parameter may still have an old gradient
            for param in moving._params:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            return moving.add_penalty_grad_(ewc_lambda, constant)
        return self._add_to(grads, ewc_lambda, constant)

    def _add_to(
        self, grads: list[Tensor], ewc_lambda: float | Tensor, constant: float | Tensor
    ) -> Tensor:
        """Add the penalty's gradient to the parameters' ``grads``."""
        return functional.add_penalty_grad_(
            grads,
            self._params,
            self._fisher,
            self._anchor,
            ewc_lambda=ewc_lambda,
            constant=constant,
            impl=self._impl,
            plan=self._gradient_plan,
        )

    def proximal_step_(self, ewc_lambda: float | Tensor, lr: float | Tensor) -> None:
        """Pull every parameter towards its anchor by the proximal step."""
        moving = self._moving()
        functional.proximal_step_(
            moving._params,
            moving._fisher,
            moving._anchor,
            ewc_lambda=ewc_lambda,
            lr=lr,
            impl=self._impl,
            plan=moving._proximal_plan,
        )

    def _moving(self) -> ActiveSprings:
        """Return the part whose parameters are not frozen now."""
        mask = [param.requires_grad for param in self._params]
        if all(mask):
            return self
        if self._moving_part is None or self._moving_part[0] != mask:
            part = type(self)(
                [param for param, moves in zip(self._params, mask, strict=True) if moves],
                [spring for spring, moves in zip(self._springs, mask, strict=True) if moves],
                self._impl,
            )
            self._moving_part = mask, part
        return self._moving_part[1]


def _traced_gradients(params: Sequence[Tensor]) -> list[Tensor] | None:
    """What the core's reader of gradients returns, for a compiler, which can't look into it."""
    grads = [param.grad for param in params if param.requires_grad and param.grad is not None]
    return grads if len(grads) == len(params) else None
