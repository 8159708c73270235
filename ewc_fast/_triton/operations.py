"""What each list operation does with one block of elements. Formulas: ``formulas.py``.

The bytes are those of one float32 element and, behind the bar, of one beside bfloat16 parameters.
All is limited by memory: 10 to 40 arithmetic instructions an element, where an H200 has time for
over 90 while it moves 16 bytes. ``mask`` is ``None`` where the whole block exists.

A Fisher that is only read may be codes of 8 bits, with their ``scales`` (which else nobody reads):
1 + 4/256 bytes instead of 4, so that ``add_penalty_grad`` moves 17.02 | 11.02.
"""

import triton
import triton.language as tl

from ewc_fast._checks import ENCODED_BLOCK
from ewc_fast._triton.formulas import (
    decayed_sum,
    decode,
    merge,
    penalty_gradient,
    proximal,
    random_bits,
    round_stochastically,
)

_ENCODED_BLOCK = tl.constexpr(ENCODED_BLOCK)


@triton.jit
def add_penalty_grad(total, grad, param, fisher, anchor, scales, at, mask, ewc_lambda):
    """``g += lambda F (theta - a)``. Reads g, theta, F, a; writes g: 20 | 14 bytes."""
    distance = load(param, at, mask, total) - load(anchor, at, mask, total)
    pull = penalty_gradient(ewc_lambda, _load_fisher(fisher, scales, at, mask, total), distance)
    store(grad, at, mask, load(grad, at, mask, total) + pull)
    return total + pull * distance


@triton.jit
def penalty(total, param, fisher, anchor, scales, at, mask, ewc_lambda):
    """``sum lambda F (theta - a)^2``. Reads theta, F, a: 12 | 10 bytes."""
    distance = load(param, at, mask, total) - load(anchor, at, mask, total)
    pull = penalty_gradient(ewc_lambda, _load_fisher(fisher, scales, at, mask, total), distance)
    return total + pull * distance


@triton.jit
def penalty_grad(total, out, param, fisher, anchor, scales, at, mask, ewc_lambda):
    """``out = lambda F (theta - a)``. Reads theta, F, a; writes out: 16 | 12 bytes."""
    distance = load(param, at, mask, total) - load(anchor, at, mask, total)
    pull = penalty_gradient(ewc_lambda, _load_fisher(fisher, scales, at, mask, total), distance)
    store(out, at, mask, pull)


@triton.jit
def accumulate_square(
    total, fisher, grads, at, mask, weight, samples, sample_stride, seed, VECTOR: tl.constexpr
):
    """``F += w sum_n g_n^2``. Reads F and N gradients, writes F: 8 + 4 N | 8 + 2 N bytes."""
    squares = tl.zeros_like(total)
    for sample in range(samples):
        grad = grads + sample * sample_stride
        if mask is None:
            grad = tl.multiple_of(grad, VECTOR * grad.dtype.element_ty.primitive_bitwidth // 8)
        value = load(grad, at, mask, total)
        squares += value * value
    _store_fisher(fisher, at, mask, load(fisher, at, mask, total) + weight * squares, seed)


@triton.jit
def merge_(total, fisher, anchor, residual, new_fisher, param, at, mask, gamma, seed):
    """``F' = gamma F + F_t, a' = a + F_t / F' (theta - a)`` in float64, a as anchor + residual.

    Reads F, a, residual, F_t, theta; writes F, a, residual: 28 | 26 bytes.
    """
    exact_anchor = load(anchor, at, mask, total) + load(residual, at, mask, total)
    new = load(new_fisher, at, mask, total)
    old = load(fisher, at, mask, total)
    both, merged, constant = merge(gamma, old, exact_anchor, new, load(param, at, mask, total))
    kept = merged.to(anchor.dtype.element_ty)
    _store_fisher(fisher, at, mask, both, seed)
    store(anchor, at, mask, kept)
    store(residual, at, mask, merged - kept.to(tl.float64))
    return total + constant


@triton.jit
def merge_online(total, fisher, anchor, new_fisher, param, at, mask, gamma, seed):
    """``F' = gamma F + F_t, a' = theta``. Reads F, F_t, theta; writes F, a: 20 | 18 bytes."""
    new = load(new_fisher, at, mask, total)
    both = decayed_sum(gamma, load(fisher, at, mask, total), new)
    _store_fisher(fisher, at, mask, both, seed)
    store(anchor, at, mask, load(param, at, mask, total))


@triton.jit
def proximal_step(total, param, fisher, anchor, scales, at, mask, eta_lambda):
    """``theta -= (theta - a) / (1 + 1 / (eta lambda F))``. Reads theta, F, a: 16 | 12 bytes."""
    strength = eta_lambda * _load_fisher(fisher, scales, at, mask, total)
    theta = load(param, at, mask, total)
    store(param, at, mask, proximal(strength, theta, load(anchor, at, mask, total)))


@triton.jit
def load(pointer, at, mask, like):
    """Load elements, in the dtype of ``like``; bfloat16 has no arithmetic of its own."""
    if mask is None:
        value = tl.load(pointer + at)
    else:
        value = tl.load(pointer + at, mask=mask, other=0)
    return value.to(like.dtype)


@triton.jit
def store(pointer, at, mask, value):
    """Store elements, rounded to nearest; from float64 to bfloat16 by way of float32."""
    if pointer.dtype.element_ty == tl.bfloat16 and value.dtype == tl.float64:
        value = value.to(tl.float32)
    value = value.to(pointer.dtype.element_ty)
    if mask is None:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=mask)


@triton.jit
def _load_fisher(fisher, scales, at, mask, like):
    """Load a Fisher, decoded if it is in 8 bits, in the dtype of ``like``."""
    if fisher.dtype.element_ty == tl.uint8:
        # Threads that hold neighbours ask for one scale; it comes from the cache after the first.
        block = at // _ENCODED_BLOCK
        if mask is None:
            value = decode(tl.load(fisher + at), tl.load(scales + block))
        else:
            code = tl.load(fisher + at, mask=mask, other=0)
            value = decode(code, tl.load(scales + block, mask=mask, other=0))
        value = value.to(like.dtype)
    else:
        value = load(fisher, at, mask, like)
    return value


@triton.jit
def _store_fisher(fisher, at, mask, value, seed):
    """Store a Fisher, rounded by chance to bfloat16: small addends are not lost in a large sum."""
    if fisher.dtype.element_ty == tl.bfloat16:
        value = round_stochastically(value.to(tl.float32), random_bits(seed, at))
    store(fisher, at, mask, value)
