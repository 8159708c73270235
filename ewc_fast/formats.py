r"""How a Fisher diagonal is kept in less memory: the 8-bit format, encoded and decoded in PyTorch.

This module is the specification of **e5m3**, an unsigned 8-bit floating format with 5 bits of
exponent, 3 of mantissa and a scale for each block of 256 consecutive elements in the order of
memory (the last block may be shorter). With the byte :math:`8 e + m`,

.. math:: F = S \cdot 2^{e - 31} (1 + m / 8), \qquad F = 0 \text{ for the byte } 0.

The scale :math:`S` is a power of two kept as float32, the least one with which the block's largest
entry is at most :math:`\tfrac{15}{8} S`. So decoding is exact in float32 (down to its denormals,
which round), and encoding what was decoded changes nothing. A block spans
:math:`\tfrac{15}{9} 2^{31}`, 9.5 decades, from its largest entry to its smallest; there are no
denormals, so that every entry has the same relative precision. What lies below the smallest code
goes to that or to 0, whichever is nearer.

Linear 8-bit codes are no alternative: a Fisher's entries spread over many decades, and most would
become 0. Rounded to nearest, an entry is at most 1/17 off, 2.2 % in the median and on average
(1/16 where it exceeds 15/8 of 2^127, which has no larger code). A sum that is written again and
again must round by chance, or addends below 1/32 of it would be lost: one such write is less than
1/9 off and right on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast.reference import random_bits

BLOCK = _checks.ENCODED_BLOCK
_LARGEST = 1.875  # in units of the scale, as is the next
_SMALLEST = 1.125 * 2.0**-31
_EXPONENTS = 96 << 23  # the byte 8 e + m, shifted by 20 and this added, is the float32 above
_DROPPED = 20  # bits of float32's mantissa beyond the 3 that are kept
_ONE_HALF = 1 << 31  # of 32 random bits
_STRETCH = 1 << 20  # elements encoded at once: bounds the temporaries

StorageName = Literal["float32", "bfloat16", "e5m3", "float32@cpu", "bfloat16@cpu", "e5m3@cpu"]


class Storage(NamedTuple):
    """How a Fisher is kept, and whether it and the anchor stay in the host's memory."""

    fisher: str
    on_cpu: bool

    @classmethod
    def named(cls, name: str) -> Storage:
        """Return the storage of that name."""
        _checks.one_of("storage", name, _checks.STORAGES)
        fisher, _, place = name.partition("@")
        return cls(fisher, place == "cpu")

    @property
    def name(self) -> str:
        """The name that :meth:`named` takes."""
        return f"{self.fisher}@cpu" if self.on_cpu else self.fisher


def encode_e5m3(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (uint8, of the values' shape and order in memory) and the blocks' scales.

    ``values`` are finite and not negative, of any floating dtype; they are rounded to nearest.

    Raises
    ------
    ValueError
        For a negative, infinite or undefined value.

    Examples
    --------
    >>> codes, scales = encode_e5m3(torch.tensor([0.0, 1e-3, 1.0, 4.0]))
    >>> codes.tolist(), scales.tolist(), decode_e5m3(codes, scales).tolist()
    ([0, 152, 232, 248], [4.0], [0.0, 0.0009765625, 1.0, 4.0])
    """
    codes = torch.empty_like(values, dtype=torch.uint8)
    scales = torch.empty(-(-values.numel() // BLOCK), dtype=torch.float32, device=values.device)
    _write(codes, scales, values, None)
    return codes, scales


def decode_e5m3(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values, of the codes' shape and strides, that :func:`encode_e5m3` kept."""
    values = torch.empty_like(codes, dtype=torch.float32)
    flat_values, flat_codes = in_memory_order(values), in_memory_order(codes)
    for here, blocks in _stretches(codes.numel()):
        bits = (flat_codes[here].to(torch.int32) << _DROPPED) + _EXPONENTS
        bits.masked_fill_(flat_codes[here] == 0, 0)
        flat_values[here] = bits.view(torch.float32) * _for_each_element(scales[blocks], len(bits))
    return values


def reencode_e5m3_(codes: Tensor, scales: Tensor, values: Tensor, *, seed: int) -> None:
    """Write sums over what was there before: rounded by chance, but to nearest where 0 was.

    The 32 random bits of element ``i`` of the memory are ``random_bits(seed, i)``. Right on
    average, so that many small addends aren't lost: a sum's relative standard deviation is at most
    1/4, however many they are (a write's variance is at most addend x F / 8).
    """

    def random(here: slice) -> Tensor:
        elements = torch.arange(here.start, here.stop, device=codes.device)
        return random_bits(seed, elements).masked_fill_(
            in_memory_order(codes)[here] == 0, _ONE_HALF
        )

    _write(codes, scales, values, random)


def in_memory_order(dense: Tensor) -> Tensor:
    """Return the elements of a dense tensor as a vector in the order of memory, as a view."""
    return dense.as_strided((dense.numel(),), (1,))


def _write(
    codes: Tensor, scales: Tensor, values: Tensor, random: Callable[[slice], Tensor] | None
) -> None:
    _checks.mean_of_squares("values", values)
    if values.stride() != codes.stride():
        values = torch.empty_like(codes, dtype=values.dtype).copy_(values)
    flat_codes, flat_values = in_memory_order(codes), in_memory_order(values)
    for here, blocks in _stretches(values.numel()):
        bits = random(here) if random else None
        flat_codes[here], scales[blocks] = _encode(flat_values[here], bits)


def _stretches(numel: int) -> Iterator[tuple[slice, slice]]:
    """Yield elements and the blocks that hold them."""
    for start in range(0, numel, _STRETCH):
        stop = min(start + _STRETCH, numel)
        yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def _for_each_element(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:numel]


def _encode(values: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode a vector; in float64, where the division by a power of two is always exact."""
    scales = _scales_of(values)
    scaled = values.double() / _for_each_element(scales, len(values))
    single = scaled.clamp(_SMALLEST, _LARGEST).float()
    bits = single.view(torch.int32).long()
    if random is None:  # ties to the even neighbour
        bits += (1 << _DROPPED - 1) - 1 + (bits >> _DROPPED & 1)
        least = scaled >= _SMALLEST / 2
    else:
        bits += random >> 32 - _DROPPED
        least = scaled * 2.0**32 > random * _SMALLEST
    codes = (bits - _EXPONENTS >> _DROPPED).clamp_max_(255)
    codes = torch.where(scaled < _SMALLEST, least.long(), codes)
    return codes.masked_fill_(scaled == 0, 0).to(torch.uint8), scales.float()


def _scales_of(values: Tensor) -> Tensor:
    """Return each block's scale in float64, by its bits: powers of two are exact nowhere else."""
    padded = values.new_zeros(-(-len(values) // BLOCK) * BLOCK, dtype=torch.float64)
    padded[: len(values)] = values
    largest = padded.view(-1, BLOCK).amax(1)
    exponent = (largest.view(torch.int64) >> 52) - 1023
    power = (exponent.clamp_(-149, 127) + 1023 << 52).view(torch.float64)
    exponent += (largest > _LARGEST * power).long()
    return (exponent.clamp_(-149, 127) + 1023 << 52).view(torch.float64)
