"""What a browser finds on the page of plots, for its tests."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree


class Page(HTMLParser):
    """Titles, captions, plots and table cells of a page, and whether it is one that a browser need not mend."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"h2": [], "figcaption": [], "td": [], "th": []}
        self.plots: list[ElementTree.Element] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect what the page loads; a plot has to be well-formed SVG."""
        self.loaded += [value for key, value in attributes if key in ("src", "href") and value]
        if tag == "img":
            kind, _, data = self.loaded[-1].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.plots.append(ElementTree.fromstring(base64.b64decode(data)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Every element is closed in order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text by element."""
        inside = next((tag for tag in reversed(self.open) if tag in self.found), None)
        if inside is not None:
            self.found[inside].append(data)


def points(plot: ElementTree.Element) -> int:
    """Places that the longest line of a plot goes through; letters have fewer than twenty."""
    drawn = [element.get("d", "") for element in plot.iter("{http://www.w3.org/2000/svg}path")]
    return max(len(re.findall(r"[ML] ", path)) for path in drawn)
