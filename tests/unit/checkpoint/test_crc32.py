"""Sums of neighbouring ranges that are put together without reading them."""

from __future__ import annotations

import itertools
import random
import zlib

from ds_fira.checkpoint.crc32 import combine, combined


def test_combined_sums_are_zlibs() -> None:
    """Of any number of pieces, empty ones too."""
    chance = random.Random(1)
    content = chance.randbytes(1 << 20)
    for pieces in (1, 2, 2, 3, 50):
        cuts = sorted(
            [0, len(content), *(chance.choice([0, 9, 300, 1 << 19, len(content)]) for _ in range(pieces - 1))]
        )
        parts = [content[a:b] for a, b in itertools.pairwise(cuts)]
        assert combined((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(content)
    assert combine(zlib.crc32(b"ab"), zlib.crc32(b""), 0) == zlib.crc32(b"ab")


def test_sums_of_lengths_that_no_test_can_hold() -> None:
    """Zeros behind zeros: of 16 MB as zlib sums them, then twice as many again and again, up to a terabyte."""
    block, length = bytes(1 << 20), 1 << 20
    known = zlib.crc32(block)
    while length < 1 << 40:
        known, length = combine(known, known, length), 2 * length
        if length == 1 << 24:
            assert known == zlib.crc32(bytes(length))
    first, rest = zlib.crc32(b"start"), combine(known, zlib.crc32(bytes(5)), 5)
    assert combine(combine(first, known, length), zlib.crc32(bytes(5)), 5) == combine(first, rest, length + 5)
