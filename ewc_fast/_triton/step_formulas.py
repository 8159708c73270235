"""The optimizers' formulas of ``csrc/math.h``, once more for Triton: on values in registers."""

import triton
import triton.language as tl

from ewc_fast._triton.formulas import divide


@triton.jit
def decayed_gradient(weight_decay, grad, param):
    """Return the gradient with weight decay in it; without any, theta may be infinite."""
    return tl.where(weight_decay != 0, grad + weight_decay * param, grad)


@triton.jit
def moved_towards(share, origin, goal):
    """Return ``origin`` moved a share of the way to ``goal``: exactly there for the whole way."""
    way = goal - origin
    return tl.where(share < 0.5, origin + share * way, goal - way * (1.0 - share))


@triton.jit
def larger_or_nan(one, other):
    """Return the larger of two values, or the first if that is NaN."""
    return tl.where((one != one) | (one >= other), one, other)


@triton.jit
def adam_second_moment(beta2, share, second, grad):
    """Return beta2 v + (1 - beta2) g^2."""
    return beta2 * second + share * grad * grad


@triton.jit
def adam_param(kept, step_size, root_correction, eps, param, first, second):
    """Return theta after a step; ``second`` is the largest so far with amsgrad."""
    root = divide(square_root(second), root_correction) + eps
    return kept * param - divide(step_size * first, root)


@triton.jit
def sgd_buffer(momentum, gain, buffer, grad, BEGINS: tl.constexpr):
    """Return mu b + (1 - d) g; the buffer begins as the gradient, undamped."""
    if BEGINS:
        moved = grad
    else:
        moved = momentum * buffer + gain * grad
    return moved


@triton.jit
def sgd_param(lr, momentum, param, grad, buffer, NESTEROV: tl.constexpr):
    """Return theta after a step; ``buffer`` is the gradient itself without momentum."""
    if NESTEROV:
        direction = grad + momentum * buffer
    else:
        direction = buffer
    return param - lr * direction


@triton.jit
def path_term(grad, before, after):
    """Return what a step adds to the path integral: the fall of the loss that its way explains."""
    return grad * (before - after)


@triton.jit
def power(base, exponent):
    """Return a float64 to a whole power below 2^25, by squaring: Triton has no power."""
    result = tl.zeros_like(base) + 1.0
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def square_root(value):
    """Take the root to nearest; ``sqrt`` of float32 would be an approximation."""
    if value.dtype == tl.float32:
        root = tl.sqrt_rn(value)
    else:
        root = tl.sqrt(value)
    return root
