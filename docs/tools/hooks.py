"""What the site does to a page before it becomes HTML: links to files of the repository, which a site does not have."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#\s]+)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links that leave `docs/` into their text: in the repository they lead to a file, on the site to nothing.

    A link to a file that is not there stays as it is, for `mkdocs build --strict` to stop at it.
    """
    return LINK.sub(_text_of, markdown)


def _text_of(link: re.Match[str]) -> str:
    if not (ROOT / link["path"]).exists():
        return link[0]
    # A path of its own says where the file is; other texts are followed by it.
    named = link["path"] in link["text"]
    return link["text"] if named else f"{link['text']} (`{link['path']}`)"
