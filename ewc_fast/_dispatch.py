"""Which implementation runs: a pure function of what was asked for and what is there.

==============  ================================  ================================================
``impl``        operands                          runs
==============  ================================  ================================================
``"auto"``      dense, on the CPU                 ``"cpu"``: C++, vector code, threads
``"auto"``      dense, on a CUDA device           ``"cuda"`` if built with a kernel for the
                                                  operation, else ``"triton"`` if available, else
                                                  ``"reference"``
``"auto"``      strided with gaps, or elsewhere   ``"reference"``: PyTorch
``"cpu"``       dense, on the CPU                 ``"cpu"``, else an error
``"cuda"``      dense, on a CUDA device           ``"cuda"`` if built with a kernel for the
                                                  operation, else an error
``"triton"``    dense, on a CUDA or XPU device;   ``"triton"`` if available, else an error
                on the CPU in its interpreter
``"reference"`` any                               ``"reference"``
==============  ================================  ================================================

An ``EWC`` may keep its state in other ways (``storage``); ``impl`` then chooses as above:

==========================  ==================================================================
state                       what applies it
==========================  ==================================================================
8-bit Fisher, in a step     the kernels of the table above, which decode as they load: penalty,
                            its gradient, both at once, the proximal step; where the table says
                            ``"reference"``, pieces decoded to float32 by PyTorch
8-bit Fisher, in a merge    decoded, merged as above, and encoded by PyTorch, one by one
8-bit Fisher, in a fused    an error: ``EWCOptimizer`` around PyTorch's optimizer takes it
optimizer
kept on the CPU             pieces copied to the parameters' device, and decoded if of 8 bits;
                            they merge on the CPU (``"auto"`` for ``"cuda"`` and ``"triton"``)
==========================  ==================================================================

*Dense* means: all operands of a row have the same strides and fill their storage, in any order of
dimensions (so ``channels_last`` is dense). The choice is made for each tensor of a list by itself.
A backend asked for by name runs or raises; it never falls back. The products of a layer's inputs
and gradients have no CUDA C++ kernels, so that ``"auto"`` takes Triton for them.

ROCm's devices are PyTorch's ``cuda`` devices too, so ``"auto"`` takes Triton there. Nobody has
tested it, nor XPU.
"""

from __future__ import annotations

from typing import Literal

import torch

Impl = Literal["auto", "cpu", "cuda", "triton", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "cpu", "cuda", "triton", "reference")
CUDA_OPERATIONS = frozenset(  # all on lists of tensors; none of the products
    {
        "penalty",
        "penalty_grad",
        "add_penalty_grad_",
        "accumulate_square_",
        "merge_",
        "merge_online_",
        "proximal_step_",
        "adam_step_",
        "sgd_step_",
    }
)
TRITON_DEVICES = frozenset({"cuda", "xpu"})


def choose(
    requested: Impl,
    operation: str,
    device_type: str,
    dense: bool,
    cuda_unavailable: str | None,
    triton_unavailable: str | None,
) -> Impl:
    """Return the implementation for one row of operands, or raise for one that can't run.

    The last two say why a backend can't run on such a device; ``None`` where it can.
    """
    if requested == "auto":
        has_cuda = cuda_unavailable is None and operation in CUDA_OPERATIONS
        return _automatic(device_type, dense, has_cuda, triton_unavailable is None)
    if requested == "reference":
        return "reference"
    _check_device(requested, device_type, triton_unavailable)
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
    if requested == "triton" and triton_unavailable is not None:
        raise RuntimeError(f"impl='triton' can't run: {triton_unavailable}")
    return requested


def _automatic(device_type: str, dense: bool, has_cuda: bool, has_triton: bool) -> Impl:
    if dense and device_type == "cpu":
        return "cpu"
    if dense and device_type == "cuda":
        return "cuda" if has_cuda else "triton" if has_triton else "reference"
    return "reference"


def _check_device(requested: Impl, device_type: str, triton_unavailable: str | None) -> None:
    if requested == "triton":
        interpreted = device_type == "cpu" and triton_unavailable is None
        fits, wanted = device_type in TRITON_DEVICES or interpreted, "GPU"
    else:
        fits, wanted = device_type == requested, requested
    if not fits:
        raise ValueError(
            f"impl={requested!r} works on {wanted} tensors, got tensors on {device_type}; "
            "move them, or use impl='auto'"
        )


def product_way(
    samples: int, positions: int, rows: int, columns: int, dtype: torch.dtype
) -> Literal["kernel", "library"]:
    """Return what forms a linear layer's squared product on the CPU: the kernel, or PyTorch's own.

    The kernel, which measured faster nearly everywhere, up to 50 times for few positions and a
    large weight. But its tiles have at least four rows (two below AVX-512), which one or two rows
    leave empty: from 64 positions on PyTorch's product is up to twice as fast there.
    """
    return "library" if rows <= 2 and positions >= 64 else "kernel"
