"""What a kernel moves, counted in its PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[bfus](\d+)\b")
_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")
# Bytes of the widest access.
WIDEST = 16


@dataclass(frozen=True)
class Traffic:
    """Bytes that one thread moves, each instruction once.

    Attributes:
        loaded: from memory.
        stored: to memory.
        copied: from memory to shared memory in one turn of an innermost loop; pipelines are filled before it.
        wide: the share of loaded and stored bytes that goes in units of 16, the most that an instruction takes.
    """

    loaded: int
    stored: int
    copied: int
    wide: float


def traffic(ptx: str) -> Traffic:
    """Count the loads, stores and asynchronous copies of a thread in a kernel's PTX.

    An access of a single byte is a flag, one of a single float64 a sum; neither is part of a tile.
    """
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for kind, vector, bits in _ACCESS.findall(ptx):
        if vector or bits not in ("8", "64"):
            widths[kind].append(int(vector or 1) * int(bits) // 8)
    every = [*widths["ld"], *widths["st"]]
    wide = sum(width for width in every if width == WIDEST) / sum(every) if every else 0.0
    copies = [int(size, 0) for loop in innermost(ptx) for size in _COPY.findall(loop)]
    return Traffic(sum(widths["ld"]), sum(widths["st"]), sum(copies), wide)


def innermost(ptx: str) -> list[str]:
    """The texts of the loops of one block: from a label to a branch back to it, without a label between.

    A compiler makes one of the inner loop of a product. Around it blocks may stand in any order.
    """
    loops, begin, label = [], 0, ""
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        if match := _LABEL.match(line):
            begin, label = number, match[1]
        elif (match := _BRANCH.search(line)) and match[1] == label:
            loops.append("\n".join(lines[begin : number + 1]))
    return loops
