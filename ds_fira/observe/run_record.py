"""What a run says of itself beside its csv files: settings, configuration, versions and devices, at each of its starts.

`FILE` lies in the folder of DeepSpeed's csv monitor. A run that is resumed adds a start; the page of plots
(`ds_fira.tools.run_report`) reads them back.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import torch

FILE, FORMAT = "fira_run.json", 1
PACKAGES = ("ds_fira", "deepspeed", "torch", "triton", "transformers", "accelerate")
# Parts of names in a configuration whose texts open something, as the api_key of DeepSpeed's Comet block.
SECRET = ("api_key", "token", "secret", "password")


class Start(TypedDict):
    """One start of a run.

    Attributes:
        step: optimizer steps made before it.
        samples: of all ranks, seen before it.
        at: date and time in UTC, ISO 8601.
        optimizer: its class.
        settings: of the param groups that are projected, by name; all values that occur.
        event_steps: optimizer steps from one event in the csv files to the next.
        samples_per_step: of all ranks.
        ranks: data-parallel processes.
        parameters: elements of all parameters that are trained.
        projected_matrices: of these.
        config: the DeepSpeed configuration as the engine was given it.
        environment: `python`, `device`, `system`, and versions of packages.
    """

    step: int
    samples: int
    at: str
    optimizer: str
    settings: dict[str, list[object]]
    event_steps: int
    samples_per_step: int
    ranks: int
    parameters: int
    projected_matrices: int
    config: dict[str, object]
    environment: dict[str, str]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, str]:
    """The device by its name, and the versions of what computes on it."""
    found = {"device": _device_name(device), "system": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.machine()}, {threads} thread{'s' * (threads != 1)} a rank"


def settings_of_all(groups: Iterable[Mapping[str, object]]) -> dict[str, list[object]]:
    """By name, the values that a setting has in some groups, each once and in their order."""
    found: dict[str, list[object]] = {}
    for group in groups:
        for name, value in group.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    return found


def without_secrets(config: object) -> object:
    """The same configuration with texts under names such as `api_key` hidden, in every block."""
    if isinstance(config, Mapping):
        hidden = {name for name in config if any(part in str(name).lower() for part in SECRET)}
        return {
            name: "hidden" if name in hidden and isinstance(value, str) else without_secrets(value)
            for name, value in config.items()
        }
    return [without_secrets(item) for item in config] if isinstance(config, list | tuple) else config


def add_start(folder: Path, start: Start) -> None:
    """Add a start to the record in a folder; one from the same step or a later one is replaced, as its values are.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        earlier = [each for each in read_starts(folder) if each["step"] < start["step"]]
    except ValueError:  # it says how this run began, and keeps no training from going on
        earlier = []
    scratch = folder / f".{FILE}.partial"
    scratch.write_text(json.dumps({"format": FORMAT, "starts": [*earlier, start]}, indent=1, default=str) + "\n")
    os.replace(scratch, folder / FILE)


def read_starts(folder: Path) -> list[Start]:
    """The starts of the run whose csv files lie in a folder, in their order; none where it has no record.

    Raises:
        ValueError: the file is none that `add_start` wrote; one sentence.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        starts = content["starts"]
        if not all(Start.__required_keys__ <= each.keys() for each in starts):
            raise ValueError("a start lacks a part")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        said = str(error) if isinstance(error, ValueError | OSError) else "it has another shape"
        raise ValueError(f"{path} cannot be read as the record of a run: {said}; remove it.") from error
    return starts
