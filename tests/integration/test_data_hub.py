"""C4 streamed over HTTP, from a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.data_jobs import write_c4
from tests.integration.hub_server import serve

# In a process of its own: the libraries read the hub's address when they are imported.
JOB = """
import json, sys
from tests.integration.data_jobs import message
from pretraining.sources import open_source
source = open_source("c4")
train = source.train
print(json.dumps({
    "name": source.name,
    "size": source.size,
    "files": train.files,
    "train": [list(train.read(file)) for file in range(len(train.files))],
    "later": list(train.read(1, 11)),
    "validation": list(source.validation.read_all()),
    "other": message(lambda: open_source("allenai/other")),
    "config": message(lambda: open_source("allenai/c4:xx")),
}))
"""


def test_c4_is_streamed_from_a_hub(tmp_path: Path) -> None:
    """`--data c4` finds the configuration `en` and its splits, reads documents in order, and goes on in a file."""
    content = write_c4(tmp_path / "repository" / "en", [30, 20])
    server = serve(tmp_path / "repository")
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", JOB], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["name"], found["size"]) == ("allenai/c4:en", None)
    assert [Path(name).name for name in found["files"]] == [f"c4-train.0000{i}-of-00002.json.gz" for i in range(2)]
    numbered = [[[number, text] for number, text in enumerate(file)] for file in content]
    assert found["train"] == numbered
    assert found["later"] == numbered[1][11:]
    assert len(found["validation"]) == 12
    assert found["other"].endswith("is no repository of the hub, or none that you may read")
    assert found["config"].startswith("--data allenai/c4:xx cannot be opened: BuilderConfig 'xx' not found")
