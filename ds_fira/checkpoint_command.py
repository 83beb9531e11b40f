"""`python -m ds_fira checkpoint FOLDER`: what is saved there, whether it is complete, and where it can go on."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint import KEY, SavedState
from ds_fira.tags import find_damage, find_fault, in_order, read_latest
from ds_fira.zero_files import CheckpointFiles, load

# Settings of the projected groups that a resumed run has to keep, and those it may change.
SHOWN = ("rank", "proj_type", "formulation", "update_proj_gap", "subspace", "state_dtype")


def register(commands: Any) -> None:
    """Add the sub-command to argparse's `commands`."""
    parser = commands.add_parser(
        "checkpoint",
        help="what a checkpoint folder holds, and whether it is complete",
        description="Lists the checkpoints of a folder, the one that load_checkpoint takes first.",
    )
    parser.add_argument("folder", type=Path, help="as given to engine.save_checkpoint")
    parser.add_argument("--tag", help="only this one, and all of its matrices' states")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what the arguments ask for.

    Raises:
        ValueError: there is no checkpoint, or the one asked for cannot be read.
    """
    tags = in_order(args.folder, args.tag or read_latest(args.folder), only=args.tag is not None)
    if not tags:
        raise ValueError(f"{args.folder} holds no checkpoint{f' {args.tag}' if args.tag else ''}; name another folder.")
    found = [describe_tag(args.folder, tag, args.verify) for tag in tags]
    if args.tag is not None and not found[0]["fault"]:
        found[0]["states"] = states(args.folder / args.tag)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for entry in found:
        print("\n".join(lines(entry)))


def describe_tag(folder: Path, tag: str, verify: bool = False) -> dict[str, Any]:
    """One checkpoint: its fault if it has one, else step, ranks, ZeRO stage and settings."""
    path = folder / tag
    fault = find_fault(path) or (find_damage(path) if verify else None)
    entry: dict[str, Any] = {"tag": tag, "latest": tag == read_latest(folder), "fault": fault}
    if fault:
        return entry
    files = CheckpointFiles.find(path)
    model = load(files.models[0])
    wrapper, state_dict = files.optimizer_state(0)
    groups = [group for group in state_dict["param_groups"] if group.get("rank") is not None]
    return {
        **entry,
        "step": model["global_steps"],
        "ranks": model["dp_world_size"],
        "zero_stage": int(wrapper.get("zero_stage", 1 if files.optimizers else 0)),
        "resumable_elsewhere": KEY in state_dict,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "settings": [dict(items) for items in sorted({tuple((n, g[n]) for n in SHOWN) for g in groups}, key=str)],
    }


def states(path: Path) -> dict[str, Any]:
    """What the states of one checkpoint are: matrices by shape and step, and whether all are finite."""
    saved: SavedState = CheckpointFiles.find(path).read()
    kinds: Counter[str] = Counter()
    finite = True
    for parts in saved.matrices.values():
        place, state = parts[0]
        m, n = place.shape
        steps = f"step {int(state.step)}, basis of step {int(state.refresh_step)}"
        kinds[f"{m} x {n}, {place.side}, rank {place.rank}, {steps}"] += 1
        kept = [tensor for _, part in parts for tensor in (part.basis, part.residual_norm) if tensor is not None]
        finite &= all(map(_finite, kept))
    moments = sum(pieces[0][1].step is not None for pieces in saved.moments.values())
    return {"matrices": dict(kinds), "under_adamw": moments, "finite": finite}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def lines(entry: dict[str, Any]) -> list[str]:
    """A checkpoint as text."""
    mark = " (latest)" if entry["latest"] else ""
    if entry["fault"]:
        return [f"{entry['tag']}{mark}: not complete: {entry['fault']}"]
    size = entry["bytes"] / 1e9
    where = "any number of ranks" if entry["resumable_elsewhere"] else "as many ranks only (saved by an older version)"
    text = [
        f"{entry['tag']}{mark}: complete, step {entry['step']}, {entry['ranks']} ranks at ZeRO stage "
        f"{entry['zero_stage']}, {size:.3g} GB, can be resumed on {where}"
    ]
    text += ["  " + ", ".join(f"{name} {value}" for name, value in group.items()) for group in entry["settings"]]
    if "states" in entry:
        text += [f"  {count} matrices of {kind}" for kind, count in entry["states"]["matrices"].items()]
        text.append(f"  {entry['states']['under_adamw']} parameters under AdamW")
        text.append(
            "  bases and limiters are finite" if entry["states"]["finite"] else "  NOT FINITE: load an older one"
        )
    return text
