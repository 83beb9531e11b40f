"""The CRC-32 of two pieces of a file, put together: each may have been read or written by another process.

A CRC-32 is the remainder of a polynomial over the two-element field. To append n bytes multiplies what stands before by
x to the power of 8n. Both is arithmetic modulo the CRC's polynomial, here as zlib keeps it: the coefficient of x to the
power of 0 in the highest bit.
"""

from __future__ import annotations

from functools import cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def _times(first: int, second: int) -> int:
    """The product of two polynomials, modulo the CRC's."""
    product = 0
    while first:
        if first & _ONE:
            product ^= second
        first = (first << 1) & 0xFFFFFFFF
        # The second one times x, reduced.
        second = (second >> 1) ^ (_POLYNOMIAL if second & 1 else 0)
    return product


@cache
def _squared(times: int) -> int:
    """The polynomial x, squared so many times."""
    return 1 << 30 if times == 0 else _times(_squared(times - 1), _squared(times - 1))


@cache
def _shift(length: int) -> int:
    """The power of x whose exponent is the number of bits in so many bytes."""
    power, bits, number = _ONE, length * 8, 0
    while bits:
        if bits & 1:
            power = _times(_squared(number % 32), power)
        bits, number = bits >> 1, number + 1
    return power


def crc32_combine(first: int, second: int, length_of_second: int) -> int:
    """The CRC-32 of two pieces, one behind the other, from theirs.

    Args:
        first: `zlib.crc32` of the first piece.
        second: of the second.
        length_of_second: in bytes.
    """
    return _times(_shift(length_of_second), first) ^ second
