"""What a kernel moves, counted in its PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[bfus](\d+)\b")
_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one thread moves, each instruction once.

    Attributes:
        loaded: from memory.
        stored: to memory.
        copied: from memory to shared memory in one turn of an innermost loop; pipelines are filled before it.
        narrowest: of its loads and stores.
    """

    loaded: int
    stored: int
    copied: int
    narrowest: int


def traffic(ptx: str) -> Traffic:
    """Count the loads, stores and asynchronous copies of a thread in a kernel's PTX.

    An access of a single byte is a flag and no part of a tile.
    """
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for kind, vector, bits in _ACCESS.findall(ptx):
        widths[kind].append(int(vector or 1) * int(bits) // 8)
    tiles = [width for width in (*widths["ld"], *widths["st"]) if width > 1]
    copies = [int(size, 0) for loop in innermost(ptx) for size in _COPY.findall(loop)]
    return Traffic(sum(widths["ld"]), sum(widths["st"]), sum(copies), min(tiles, default=0))


def innermost(ptx: str) -> list[str]:
    """The texts of the loops that hold no other loop: from a label to a branch back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    back = [(labels[match[1]], number) for number, line in enumerate(lines) if (match := _BRANCH.search(line))]
    loops = [(first, last) for first, last in back if first <= last]
    inner = [loop for loop in loops if not any(loop[0] <= a and b <= loop[1] for a, b in loops if (a, b) != loop)]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]
