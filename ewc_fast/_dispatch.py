"""Which implementation runs: a pure function of what was asked for and what is there.

==============  ==================================  =========================================
``impl``        operands                            runs
==============  ==================================  =========================================
``"auto"``      dense, on the CPU                   ``"cpu"``: C++, vector code, threads
``"auto"``      on CUDA, for an operation that      ``"triton"`` if available
                has a Triton kernel
``"auto"``      strided with gaps, or elsewhere     ``"reference"``: PyTorch
``"cpu"``       dense, on the CPU                   ``"cpu"``, else an error
``"cuda"``      dense, on a CUDA device             ``"cuda"`` if built with a kernel for the
                                                    operation, else an error
``"triton"``    on CUDA, or on the CPU in           ``"triton"`` if available with a kernel for
                Triton's interpreter                the operation, else an error
``"reference"`` any                                 ``"reference"``
==============  ==================================  =========================================

*Dense* means: all operands of a row have the same strides and fill their storage, in any order of
dimensions (so ``channels_last`` is dense). The choice is made for each tensor of a list by itself.
A backend asked for by name runs or raises; it never falls back.
"""

from __future__ import annotations

from typing import Literal

import torch

Impl = Literal["auto", "cpu", "cuda", "triton", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "cpu", "cuda", "triton", "reference")
CUDA_OPERATIONS = frozenset({"add_penalty_grad_"})
TRITON_OPERATIONS = frozenset(
    {
        "accumulate_squared_convolution_",
        "accumulate_squared_rows_",
        "accumulate_squared_sums_",
    }
)


def choose(
    requested: Impl,
    operation: str,
    device_type: str,
    dense: bool,
    cuda_unavailable: str | None,
    triton_unavailable: str | None = "it was not looked for",
) -> Impl:
    """Return the implementation for one row of operands, or raise for one that can't run.

    The last two say why a backend can't run on such a device; ``None`` where it can.
    """
    has_triton = triton_unavailable is None and operation in TRITON_OPERATIONS
    if requested == "auto":
        if has_triton and device_type == "cuda":
            return "triton"
        return "cpu" if device_type == "cpu" and dense else "reference"
    if requested == "reference":
        return "reference"
    if requested == "triton":
        if triton_unavailable is not None:
            raise RuntimeError(f"impl='triton' can't run: {triton_unavailable}")
        if not has_triton:
            raise RuntimeError(f"impl='triton' has no kernel for {operation}; use impl='auto'")
        return "triton"
    if device_type != requested:
        raise ValueError(
            f"impl={requested!r} works on {requested} tensors, got tensors on {device_type}; "
            "move them, or use impl='auto'"
        )
    if not dense:
        raise ValueError(
            f"impl={requested!r} needs operands with equal strides that leave no gaps; "
            "pass .contiguous() tensors, or use impl='auto'"
        )
    if requested == "cuda":
        if cuda_unavailable is not None:
            raise RuntimeError(f"impl='cuda' can't run: {cuda_unavailable}")
        if operation not in CUDA_OPERATIONS:
            raise RuntimeError(f"impl='cuda' has no kernel for {operation}; use impl='auto'")
    return requested


def product_way(
    samples: int, positions: int, rows: int, columns: int, dtype: torch.dtype
) -> Literal["kernel", "library"]:
    """Return what forms a linear layer's squared product on the CPU: the kernel, or PyTorch's own.

    The kernel, which measured faster nearly everywhere, up to 50 times for few positions and a
    large weight. But its tiles have at least four rows (two below AVX-512), which one or two rows
    leave empty: from 64 positions on PyTorch's product is up to twice as fast there.
    """
    return "library" if rows <= 2 and positions >= 64 else "kernel"
