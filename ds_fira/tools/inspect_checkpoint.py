"""`ds-fira checkpoint FOLDER`: what is saved there, whether it is complete, and where it can go on.

Nothing that stands in a file is run, and there is no switch for it: what cannot be read so is told as a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from ds_fira.checkpoint.manifest import find_damage, find_fault
from ds_fira.checkpoint.named_state import KEY, SavedState
from ds_fira.checkpoint.safe_load import UnsafeFileError
from ds_fira.checkpoint.tag_folder import in_order, read_latest
from ds_fira.core import quantization
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, normalized
from ds_fira.tools.commands import Answer, add

# Settings of the projected groups that a resumed run has to keep, and those it may change.
SHOWN = ("rank", "proj_type", "formulation", "update_proj_gap", "alpha", "subspace", "state_dtype")
NAMED = 5  # of the tensors that are not finite
FINE, FAULTY = 0, 1  # and 2 for arguments that are not legal, as of argparse
EPILOG = """exit status:
  0  every checkpoint listed is complete and, as far as was asked, unchanged and finite
  1  one of them is missing, not complete, changed, unreadable or not finite
  2  the folder holds no checkpoint, or the arguments are not legal

Standard output holds what was asked for and nothing else, with --json one JSON document; messages go to standard error.
Nothing that stands in a file is run.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command to argparse's `commands`."""
    parser = add(
        commands,
        "checkpoint",
        run,
        help="what a checkpoint folder holds, and whether it is complete",
        description="Lists the checkpoints of a folder, the one that load_checkpoint takes first.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, help="as given to engine.save_checkpoint")
    parser.add_argument("--tag", help="only this one, and all of its states: what they are, whether they are finite")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> Answer:
    """What the arguments ask for.

    Raises:
        ValueError: there is no checkpoint.
    """
    where = printable(str(args.folder))
    if not args.folder.is_dir():
        raise ValueError(f"{where} is no folder; name one that holds checkpoints.")
    with _data_only():
        try:
            tags = in_order(args.folder, args.tag or read_latest(args.folder), only=args.tag is not None)
        except Exception as error:
            raise ValueError(f"{where} cannot be looked into ({_told(error)}); name another folder.") from error
        found = [describe_tag(args.folder, tag, args.verify, args.tag is not None) for tag in tags if tag]
    if not found:
        raise ValueError(f"{where} holds no checkpoint; name another folder.")
    if args.json:
        text = json.dumps(_plain(found), indent=2)
    else:
        text = "\n".join(printable(line) for entry in found for line in lines(entry))
    fine = all(entry["fault"] is None and entry.get("states", {"finite": True})["finite"] for entry in found)
    return Answer(text, FINE if fine else FAULTY)


@contextlib.contextmanager
def _data_only() -> Iterator[None]:
    """No class that a library trusts is taken from a file."""
    trusted = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        add_safe_globals(trusted)


def describe_tag(folder: Path, tag: str, verify: bool = False, with_states: bool = False) -> dict[str, object]:
    """One checkpoint: its fault if it has one, else step, ranks, ZeRO stage and settings; its states where asked."""
    path = folder / tag
    entry: dict[str, object] = {"tag": tag, "latest": False, "fault": None}
    try:
        entry["latest"] = tag == read_latest(folder)
        entry["fault"] = find_fault(path) or (find_damage(path) if verify else None)
        if entry["fault"] is None:
            entry |= _content(path)
            if with_states:
                entry["states"] = states(CheckpointFiles.find(path))
    except Exception as error:  # a strange folder can hold anything
        entry["fault"] = _told(error)
    return entry


def _content(path: Path) -> dict[str, object]:
    files = CheckpointFiles.find(path)
    if not files.models:
        raise ValueError("it holds no file with the weights of a model, such as mp_rank_00_model_states.pt")
    model = files.model()
    wrapper, state_dict = files.optimizer_state(0)
    groups = [group for group in state_dict["param_groups"] if group.get("rank") is not None]
    return {
        "step": int(model["global_steps"]),
        "ranks": int(model["dp_world_size"]),
        **({"slices": files.slices} if files.slices > 1 else {}),
        "zero_stage": int(wrapper.get("zero_stage", 0 if files.at_stage_0 else 1)),
        "resumable_elsewhere": KEY in state_dict,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "settings": [dict(items) for items in sorted({tuple((n, g.get(n)) for n in SHOWN) for g in groups}, key=str)],
    }


def states(files: CheckpointFiles) -> dict[str, object]:
    """The states of one checkpoint: matrices by shape and step, and whether all numbers are finite.

    Args:
        files: of the checkpoint, of all ranks.

    Returns:
        `matrices`, how many there are of a kind; `under_adamw`, parameters with states but no projection; `checked`,
        the kinds of tensors that were read; `finite`, whether all their elements are; `not_finite`, of the others kind
        and name, at most the first few of a kind.

    Raises:
        ValueError: a file cannot be read.
    """
    saved = files.read()
    kinds: Counter[str] = Counter()
    for parts in saved.matrices.values():
        held, state = parts[0]
        m, n = held.shape
        steps = f"step {int(state.step)}, basis of step {int(state.refresh_step)}"
        kinds[f"{m} x {n}, {held.side}, rank {held.rank}, {steps}"] += 1
    checked: dict[str, None] = {}
    faulty: dict[str, dict[str, None]] = defaultdict(dict)
    for kind, name, tensor in _tensors(files, saved):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        checked[kind] = None
        if not bool(torch.isfinite(tensor).all()):
            faulty[kind][name] = None
    return {
        "matrices": dict(kinds),
        "under_adamw": len({held.param for parts in saved.moments.values() for held, _ in parts}),
        "finite": not faulty,
        "checked": list(checked),
        "not_finite": [_named(kind, list(names)) for kind, names in faulty.items()],
    }


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind} of {', '.join(names[:NAMED])}{more}"


def _tensors(files: CheckpointFiles, saved: SavedState) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor: its kind, its name, the elements; in a flat tensor those of a name."""
    for of_slice in files.of_all_slices():
        for number in range(len(of_slice.models)):
            for name, value in normalized(of_slice.model(number)["module"]).items():
                if isinstance(value, Tensor):
                    yield "the module's weights", name, value
    for name, parts in saved.weights.items():
        for held, flat in parts:
            yield "master weights", name, flat[held.offset :][: held.stop - held.start]
    for name, parts in saved.matrices.items():
        for _, part in parts:
            yield "bases", name, part.basis
            if part.residual_norm is not None:
                yield "limiters", name, part.residual_norm
            if part.residual_avg_sq is not None:
                yield "averages", name, part.residual_avg_sq
            for stored in part.moments.values():
                for suffix, tensor in stored.items():
                    yield "moments" if suffix == quantization.VALUES else "scales of moments", name, tensor
    scales: set[int] = set()
    for name, parts in saved.moments.items():
        for held, state in parts:
            for stored in state.moments.values():
                values, scale = stored[quantization.VALUES].reshape(-1), stored.get(quantization.SCALE)
                yield "moments", name, values[held.offset :][: held.stop - held.start]
                if scale is not None and id(scale) not in scales:
                    scales.add(id(scale))
                    yield "scales of moments", name, scale


def _told(error: Exception) -> str:
    """An error as a phrase."""
    if isinstance(error, UnsafeFileError):
        return error.found
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if not isinstance(error, ValueError | OSError):
        text = f"its content makes no sense ({type(error).__name__}{': ' if text else ''}{text})"
    return text.rstrip(".")


def _plain(value: object) -> object:
    """As JSON can hold it, whatever a file held."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def printable(text: str) -> str:
    """Text with names in it that somebody else chose: no control characters for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines(entry: Mapping[str, object]) -> list[str]:
    """A checkpoint as text."""
    mark = " (latest)" if entry["latest"] else ""
    if entry["fault"]:
        return [f"{entry['tag']}{mark}: not complete: {entry['fault']}"]
    size = entry["bytes"] / 1e9
    slices = f" with {entry['slices']} slices of the model each" if "slices" in entry else ""
    where = "any number of ranks" if entry["resumable_elsewhere"] else "as many ranks only (saved by an older version)"
    text = [
        f"{entry['tag']}{mark}: complete, step {entry['step']}, {entry['ranks']} ranks{slices} at ZeRO stage "
        f"{entry['zero_stage']}, {size:.3g} GB, can be resumed on {where}"
    ]
    text += ["  " + ", ".join(f"{name} {value}" for name, value in group.items()) for group in entry["settings"]]
    if "states" in entry:
        found = entry["states"]
        text += [f"  {count} matrices of {kind}" for kind, count in found["matrices"].items()]
        text.append(f"  {found['under_adamw']} parameters without a projection")
        if found["finite"]:
            text.append(f"  all finite: {', '.join(found['checked'])}")
        else:
            text.append(f"  NOT FINITE: {'; '.join(found['not_finite'])}: load an older one")
    return text
