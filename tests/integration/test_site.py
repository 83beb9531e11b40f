"""The documentation site: it builds without a warning, its links lead somewhere, and it fetches nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = ROOT / "docs" / "external_links.txt"
# What a browser loads by itself; a link waits for a click.
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed; pip install 'ds_fira[docs]'"
)


@dataclass
class Page(HTMLParser):
    """What a page of the site refers to, and the anchors it has."""

    path: Path
    links: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif LOADED.get(tag, "") in given:
            self.loaded.add(given[LOADED[tag]])


def is_external(link: str) -> bool:
    return link.startswith(("http://", "https://", "//"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # The theme advertises its successor among the warnings.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def targets(page: Page) -> Iterator[tuple[str, Path, str]]:
    """Every link that stays on the site: as it is written, the file, the anchor."""
    for link in page.links | page.loaded:
        if not is_external(link) and not link.startswith(("mailto:", "data:", "javascript:")):
            address, anchor = urldefrag(link)
            yield link, (page.path.parent / unquote(address)).resolve() if address else page.path, unquote(anchor)


def test_every_page_is_built(site: Path, pages: dict[Path, Page]) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert written == {path.relative_to(site) for path in pages} - {Path("404.html")}
    assert not (site / "tools").exists()


def test_internal_links_lead_to_what_is_there(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for page in pages.values():
        if page.path.name == "404.html":  # its links begin at the root of a server
            continue
        for link, file, anchor in targets(page):
            there = file.is_relative_to(site.resolve()) and file.exists()
            if not there or (anchor and file in pages and anchor not in pages[file].anchors):
                broken.append((page.path.name, link))
    assert not broken


def test_external_links_are_those_that_are_listed(pages: dict[Path, Page]) -> None:
    """No network is asked: whoever adds one adds it to the list, and has opened it."""
    found = {link for page in pages.values() for link in page.links if is_external(link)}
    assert sorted(found) == LISTED.read_text().split()


def test_nothing_is_fetched_from_a_network(pages: dict[Path, Page]) -> None:
    assert not {link for page in pages.values() for link in page.loaded if is_external(link)}


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    import ds_fira

    undocumented = {"__version__"}
    expected = {f"ds_fira.{name}" for name in set(ds_fira.__all__) - undocumented}
    assert expected <= pages[site / "api.html"].anchors
