"""The formulas of ``csrc/math.h``, once more for Triton: on values in registers, of any dtype."""

import triton
import triton.language as tl


@triton.jit
def penalty_gradient(ewc_lambda, fisher, distance):
    """Return lambda F (theta - a); its product with the distance is twice the penalty."""
    return ewc_lambda * fisher * distance


@triton.jit
def decayed_sum(gamma, fisher, new_fisher):
    """Return F' = gamma F + F_t."""
    return gamma * fisher + new_fisher


@triton.jit
def merge(gamma, fisher, anchor, new_fisher, param):
    """Return F', a' = a + F_t / F' (theta - a), and the constant that two quadratics leave."""
    kept = gamma * fisher
    total = decayed_sum(gamma, fisher, new_fisher)
    distance = param - anchor
    # Where nothing is kept the anchor is the parameter itself, bit for bit; 0/0 is not chosen.
    share = tl.where(kept > 0, new_fisher / total, 1.0)
    merged = tl.where(kept > 0, anchor + share * distance, param)
    return total, merged, 0.5 * share * kept * distance * distance


@triton.jit
def proximal(strength, param, anchor):
    """Return (theta + s a) / (1 + s) as theta - (theta - a) / (1 + 1/s): exact at s = 0."""
    return param - divide(param - anchor, 1.0 + divide(1.0, strength))


@triton.jit
def decode(code, scale):
    """Return the Fisher S 2^(e - 31) (1 + m / 8) of the byte 8 e + m, and 0 of 0.

    Shifted by 20 the byte stands where a float32 has exponent and mantissa, the exponent 96 too
    small.
    """
    bits = code.to(tl.uint32)
    bits = tl.where(bits == 0, 0, (bits << 20) + (96 << 23)).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True) * scale


@triton.jit
def random_bits(seed, element):
    """Return 32 bits that depend on the seed and the element alone (murmur3's finaliser).

    ``seed`` is uint32, ``element`` int64.
    """
    low = element.to(tl.uint32) * 0x9E3779B1
    bits = seed ^ low ^ ((element >> 32).to(tl.uint32) * 0x7FEB352D)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def round_stochastically(value, random):
    """Return the bfloat16 below or above a float, above with the probability of what is dropped."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    kept = tl.where(value != value, quiet_nan, rounded)
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def divide(numerator, denominator):
    """Divide to nearest; ``/`` on float32 would be an approximation."""
    if denominator.dtype == tl.float32:
        quotient = tl.div_rn(numerator, denominator)
    else:
        quotient = numerator / denominator
    return quotient
