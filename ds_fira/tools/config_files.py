"""`ds-fira config NAME`: DeepSpeed files that come with the package, by name; docs/configs.md says which to take."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path

from ds_fira.tools.commands import Answer, add

# A link to the repository's folder of this name, of which every build makes a copy.
FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
EXAMPLES = """examples:
  ds-fira config zero2 > ds_config.json
  ds-fira config --list
"""


def files() -> dict[str, Path]:
    """Every file by its name without the ending."""
    return {path.stem: path for path in sorted(FOLDER.iterdir()) if path.suffix in (".json", ".yaml")}


def config_path(name: str) -> Path:
    """The file of a name.

    Raises:
        ValueError: there is none; one sentence with the nearest name.
    """
    found = files()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)[0]
        raise ValueError(f"no config is named {name!r}; did you mean {near!r}? There are {', '.join(found)}.")
    return found[name]


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add(
        commands,
        "config",
        run,
        help="print a DeepSpeed config with FiraAdam by its name",
        description="Prints a DeepSpeed config with FiraAdam, to be copied and changed.",
        epilog=EXAMPLES,
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("name", nargs="?", metavar="NAME", help="of a file, such as zero2")
    asked.add_argument("--list", action="store_true", help="the names, and what each file sets")


def run(args: argparse.Namespace) -> Answer:
    """The file, or the list of names.

    Raises:
        ValueError: there is no file of this name.
    """
    if not args.list:
        return Answer(config_path(args.name).read_text())
    found = files()
    width = max(map(len, found))
    return Answer("\n".join(f"{name:{width}}  {_summary(path)}" for name, path in found.items()))


def _summary(path: Path) -> str:
    """What a file sets, in its own words."""
    if path.suffix != ".json":
        return "for accelerate launch --config_file"
    content = json.loads(path.read_text())
    params, zero = content["optimizer"]["params"], content["zero_optimization"]
    precisions = [name for name in ("bf16", "fp16") if content.get(name, {}).get("enabled") is True]
    set_by = "set by the Hugging Face Trainer" if "auto" in content.values() else "fp32"
    parts = [
        content["optimizer"]["type"],
        f"ZeRO stage {zero['stage']}",
        *(precisions or [set_by]),
        f"rank {params['rank']}",
        *(f"{key} {params[key]}" for key in ("preset", "state_dtype") if key in params),
        *(f"{key} {zero[key]['device']}" for key in ("offload_optimizer", "offload_param") if key in zero),
        *(["activation_checkpointing"] if "activation_checkpointing" in content else []),
    ]
    return ", ".join(parts)
