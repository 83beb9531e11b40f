"""Put the CRC-32 of neighbouring byte ranges together, so that several processes can sum one file without reading it.

A CRC-32 is a remainder: the bytes are a polynomial over GF(2), the first bit the highest power, and the remainder is
that of dividing by `POLYNOMIAL`. Appending n bytes multiplies what came before by x^(8n). So the sum of A followed by B
is that of A times x^(8n), n the length of B, plus that of B; the inversions that the standard puts at both ends cancel.
Numbers are reflected, as `zlib.crc32` has them: bit 31 is the coefficient of x^0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # x^0


def _multiply(first: int, second: int) -> int:
    """The product of two polynomials, modulo `POLYNOMIAL`."""
    product = 0
    while first:
        if first & _ONE:
            product ^= second
        first = (first << 1) & 0xFFFFFFFF
        second = (second >> 1) ^ (POLYNOMIAL if second & 1 else 0)
    return product


@functools.cache
def _power(exponent: int) -> int:
    """x^(2^exponent), modulo `POLYNOMIAL`."""
    if exponent == 0:
        return _ONE >> 1
    half = _power(exponent - 1)
    return _multiply(half, half)


@functools.lru_cache(maxsize=4096)
def _appended(length: int) -> int:
    """x^(8 length), modulo `POLYNOMIAL`."""
    product, exponent = _ONE, 3
    while length:
        if length & 1:
            product = _multiply(product, _power(exponent))
        length, exponent = length >> 1, exponent + 1
    return product


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte ranges, one after the other.

    Args:
        first: of the first one.
        second: of the second one.
        length: of the second one, in bytes.
    """
    return _multiply(_appended(length), first) ^ second


def combined(sums: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of many neighbouring ranges, each given as (its CRC-32, its bytes), in order."""
    total = 0
    for crc, length in sums:
        total = combine(total, crc, length)
    return total
