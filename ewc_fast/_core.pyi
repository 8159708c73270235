"""The compiled module (csrc/bindings.cpp)."""

from collections.abc import Sequence

from torch import Tensor

version: str
openmp: int
sanitized: bool
vector_levels: list[str]
cuda_architectures: str

class TensorReader:
    def __init__(self, exchange: object) -> None: ...
    @property
    def uses_exchange(self) -> bool: ...

class GradientReader:
    def __init__(self, tensor_type: type[Tensor]) -> None: ...
    def __call__(self, params: list[Tensor]) -> list[Tensor] | None: ...

class Plan:
    def __init__(
        self,
        reader: TensorReader,
        specs: Sequence[tuple[str, str, bool, bool, bool]],
        slots: Sequence[int] = (),
    ) -> None: ...
    @property
    def moves(self) -> int: ...
    def addresses(self) -> list[list[int]]: ...
    def refresh(self, *lists: Sequence[Tensor]) -> bool: ...
    def accepts(self, *lists: Sequence[Tensor]) -> bool: ...
    def adopt(self, *lists: Sequence[Tensor], ordinals: Sequence[int] = ()) -> None: ...
    @property
    def has_bfloat16_fisher(self) -> bool: ...

def add_penalty_grad(plan: Plan, coefficient: float, threads: int, level: int = 0) -> float: ...
def penalty(plan: Plan, coefficient: float, threads: int, level: int = 0) -> float: ...
def penalty_grad(plan: Plan, coefficient: float, threads: int, level: int = 0) -> None: ...
def accumulate_square(
    plan: Plan, coefficient: float, threads: int, level: int = 0, seed: int = 0
) -> None: ...
def merge(plan: Plan, coefficient: float, threads: int, level: int = 0, seed: int = 0) -> float: ...
def merge_online(
    plan: Plan, coefficient: float, threads: int, level: int = 0, seed: int = 0
) -> None: ...
def proximal_step(plan: Plan, coefficient: float, threads: int, level: int = 0) -> None: ...

class AdamOptions:
    def __init__(
        self,
        lr: float,
        weight_decay: float,
        ewc_lambda: float,
        maximize: bool,
        proximal: bool,
        rounding_seed: int | None,
        beta1: float,
        beta2: float,
        eps: float,
        decoupled: bool,
        /,
    ) -> None: ...

class SgdOptions:
    def __init__(
        self,
        lr: float,
        weight_decay: float,
        ewc_lambda: float,
        maximize: bool,
        proximal: bool,
        rounding_seed: int | None,
        momentum: float,
        dampening: float,
        nesterov: bool,
        first: bool,
        /,
    ) -> None: ...

def adam_step(plan: Plan, options: AdamOptions, threads: int, level: int = 0) -> float: ...
def sgd_step(plan: Plan, options: SgdOptions, threads: int, level: int = 0) -> float: ...
def squared_product(
    reader: TensorReader,
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    threads: int,
    level: int = 0,
) -> None: ...
def squared_convolution(
    reader: TensorReader,
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise: bool,
    threads: int,
    level: int = 0,
) -> None: ...
def cuda_memory_needed(plan: Plan) -> int: ...
def cuda_add_penalty_grad(
    plan: Plan, coefficient: float, memory: int = 0, seed: int = 0
) -> None: ...
def cuda_penalty(plan: Plan, coefficient: float, memory: int = 0, seed: int = 0) -> None: ...
def cuda_penalty_grad(plan: Plan, coefficient: float, memory: int = 0, seed: int = 0) -> None: ...
def cuda_accumulate_square(
    plan: Plan, coefficient: float, memory: int = 0, seed: int = 0
) -> None: ...
def cuda_merge(plan: Plan, coefficient: float, memory: int = 0, seed: int = 0) -> None: ...
def cuda_merge_online(plan: Plan, coefficient: float, memory: int = 0, seed: int = 0) -> None: ...
def cuda_proximal_step(plan: Plan, coefficient: float, memory: int = 0, seed: int = 0) -> None: ...
def cuda_step_memory_needed(plan: Plan) -> int: ...
def cuda_adam_step(
    plan: Plan, options: AdamOptions, memory: int, lr: int = 0, lr_is_double: bool = False
) -> None: ...
def cuda_sgd_step(
    plan: Plan, options: SgdOptions, memory: int, lr: int = 0, lr_is_double: bool = False
) -> None: ...
