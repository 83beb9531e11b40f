"""What the devices can do that a step is predicted for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Card:
    """What a device can do.

    Attributes:
        bandwidth: bytes per second, read and written, of a large copy.
        l2: bytes per second out of the L2 cache.
        products: operations per second of large products by precision.
        source: what of this is measured.
    """

    bandwidth: float
    l2: float
    products: dict[str, float]
    source: str


ASSUMED = "assumed: four fifths of the data sheet's rates or a little more"
CARDS = {
    "a100": Card(1.75e12, 4.0e12, {"tf32": 1.25e14, "bfloat16": 2.5e14}, ASSUMED),
    "h100": Card(3.0e12, 5.5e12, {"tf32": 4.0e14, "bfloat16": 8.0e14}, ASSUMED),
    "h200": Card(
        4.3e12, 5.5e12, {"tf32": 4.0e14, "bfloat16": 7.9e14}, "copy and bfloat16 products as one H200 made them"
    ),
    "b200": Card(6.8e12, 9.0e12, {"tf32": 9.0e14, "bfloat16": 1.8e15}, ASSUMED),
}


def measured_card(lines: Iterable[dict[str, Any]], instead: Card) -> Card:
    """The ceilings that stage 0 of the check has measured; what it lacks stays as it is."""
    found: dict[str, float] = {}
    for line in lines:
        if line["stage"] == 0 and line["value"] is not None:
            found |= {"copy": line["value"]} if line["what"] == "copy" else {}
            found |= {line["precision"]: line["value"]} if line["what"] == "product" else {}
    products = {name: found.get(name, rate / 1e12) * 1e12 for name, rate in instead.products.items()}
    bandwidth = found.get("copy", instead.bandwidth / 1e12) * 1e12
    return replace(instead, bandwidth=bandwidth, products=products, source="copy and products measured; L2 assumed")
