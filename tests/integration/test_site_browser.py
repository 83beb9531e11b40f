"""The site in a browser, at the width of a phone and of a desk: nothing is wider than the screen."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.test_site import pytestmark as needs_mkdocs
from tests.integration.test_site import site  # noqa: F401  a fixture

WIDTHS = {"phone": 390, "desk": 1440}
# Wide tables, long code, plots, the reference and the front page.
SHOWN = ("index", "start", "choosing", "configs", "api", "troubleshooting")
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<!doctype html><body><pre id="found"></pre>{frames}<script>
window.onload = () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const inside = frame.contentDocument.documentElement;
    found[frame.title] = [inside.scrollWidth, inside.clientWidth];
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""

pytestmark = [
    needs_mkdocs,
    pytest.mark.full,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium; install it, or name one in CHROMIUM"),
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Not to the output of the tests."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def browse(page: str, profile: Path, *options: str) -> str:
    """What chromium prints of a page."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        *options,
        page,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(site: Path, address: str, tmp_path: Path, width: str) -> None:  # noqa: F811
    """Every page in a frame of that width, all in one browser."""
    pages = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
    frames = (f'<iframe src="{name}" title="{name}" width="{WIDTHS[width]}" height="800"></iframe>' for name in pages)
    measuring = site / f"measure_{width}.htm"
    measuring.write_text(MEASURE.format(frames="".join(frames)))
    dumped = browse(f"{address}/{measuring.name}", tmp_path / "profile", "--dump-dom", "--virtual-time-budget=60000")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)[1]))
    assert set(found) == set(pages)
    assert not {name: sizes for name, sizes in found.items() if sizes[0] > sizes[1]}


def test_pages_look_as_they_should(address: str, tmp_path: Path) -> None:
    """Screenshots to look at; DS_FIRA_SCREENSHOTS names the folder."""
    folder = Path(os.environ.get("DS_FIRA_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        for width, pixels in WIDTHS.items():
            picture = folder / f"{name}_{width}.png"
            options = (f"--screenshot={picture}", f"--window-size={pixels},1200", "--hide-scrollbars")
            browse(f"{address}/{name}.html", tmp_path / "profile", *options)
            assert picture.stat().st_size > 10_000, picture
