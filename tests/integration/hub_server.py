"""A hub on this machine: as much of the Hugging Face API, with byte ranges, as streaming one data set needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


class Handler(BaseHTTPRequestHandler):
    """Answers for the one repository `name`, whose files lie in `folder`."""

    name = "allenai/c4"
    folder: Path

    def do_GET(self) -> None:
        """Answer; the body is left out for HEAD."""
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if match := re.fullmatch(rf"/datasets/{self.name}/resolve/[^/]+/(.+)", path):
            self.file(files.get(match[1]))
        elif match := re.fullmatch(rf"/api/datasets/{self.name}/tree/{COMMIT}/?(.*)", path):
            self.json(listing(self.folder / match[1], self.folder))
        elif re.fullmatch(rf"/api/datasets/{self.name}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.json({"_id": "1", "id": self.name, "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def file(self, file: Path | None) -> None:
        """A file, or the range of it that was asked for."""
        if file is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{identity(file.name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], headers)
        else:
            self.answer(200, content, headers)

    def json(self, content: Any) -> None:
        """A JSON document."""
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Status, headers and body."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def identity(name: str) -> str:
    """What stands for the hash of a file's content."""
    return hashlib.sha1(name.encode()).hexdigest()


def listing(folder: Path, root: Path) -> list[dict[str, Any]]:
    """What lies in a folder of the repository."""
    entries = []
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        kind = {"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        entries.append({"path": name, "oid": identity(name), **kind})
    return entries


def serve(folder: Path) -> ThreadingHTTPServer:
    """Serve `folder`, which gets C4's card, until `shutdown` is called."""
    (folder / "README.md").write_text(CARD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
