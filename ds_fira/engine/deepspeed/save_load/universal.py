"""Load what DeepSpeed's `ds_to_universal` made of a checkpoint, where `checkpoint.load_universal` asks for it.

DeepSpeed's own loader goes by param groups and knows an Adam's states. Here a universal checkpoint is one more source
of named states, and what `load.py` does with those of other ranks it does with these, at every stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.checkpoint import safe_load
from ds_fira.checkpoint.named_state import SavedState
from ds_fira.checkpoint.payload import PAYLOAD
from ds_fira.checkpoint.tag_folder import find_tag_fault, shown
from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.engine.deepspeed.save_load.check import agreed, gathered
from ds_fira.engine.deepspeed.save_load.fill import untrained
from ds_fira.engine.deepspeed.save_load.for_others import load_masters
from ds_fira.engine.deepspeed.save_load.slicing import recut, untrained_here
from ds_fira.engine.deepspeed.save_load.universal_files import (
    LATEST,
    UniversalFiles,
    find_damage,
    is_universal,
    read_latest,
)
from ds_fira.engine.deepspeed.save_load.written import Loaded, load_untrained, of_one_file
from ds_fira.optim.base import LowRankOptimizer


def find_tag(folder: Path, asked: str | None) -> str:
    """The name of the universal checkpoint to load.

    Args:
        folder: it lies in.
        asked: by the caller; None for what the converter made last.

    Raises:
        ValueError: there is none.
    """
    asked = read_latest(folder) if asked is None else asked
    if not asked:
        why = f"no {folder / LATEST} names one"
    elif (fault := find_tag_fault(folder, asked)) is not None:
        why = f"nothing can be loaded under tag {shown(asked)}, which {fault}"
    elif not is_universal(folder / asked):
        why = f"{folder / asked} is no universal checkpoint"
    else:
        return asked
    raise ValueError(
        f"checkpoint.load_universal = True, and {why}; make one with python -m deepspeed.checkpoint.ds_to_universal "
        f"--input_folder {folder / 'TAG'} --output_folder {folder / 'TAG_universal'}, or remove load_universal: a "
        "checkpoint is loaded on any number of ranks, at any stage, as it is."
    )


def load_universal(load: Callable[..., Loaded], call: inspect.BoundArguments) -> Loaded:
    """`load_checkpoint` of an engine of ours whose config has `checkpoint.load_universal`; a collective call."""
    given = call.arguments
    engine, asked = given["self"], None if given["tag"] is None else str(given["tag"])
    optimizer: LowRankOptimizer = engine.basic_optimizer

    def find() -> str | None:
        return find_tag(Path(given["load_dir"]), asked) if optimizer.communicator.dp_rank == 0 else None

    given["tag"] = gathered(optimizer, find)[0]
    with replaced(engine, load_universal_checkpoint=lambda: False):
        return load(*call.args, **call.kwargs)


def require_undamaged(optimizer: LowRankOptimizer, folder: Path) -> None:
    """Read this rank's share of a universal checkpoint's files for their sums, and what they would import.

    Raises:
        ValueError: one is missing, has changed, or cannot be read without running it.
    """
    files = UniversalFiles.find(folder, unpickle=optimizer.unpickle_checkpoints)
    rank, size = optimizer.communicator.dp_rank, optimizer.communicator.dp_size
    for path in files.paths[rank::size]:
        fault = find_damage(path)
        if fault is not None:
            raise ValueError(f"{path}: {fault}; convert the checkpoint again.")
        if not optimizer.unpickle_checkpoints:
            safe_load.read(path)


def load_weights(
    engine: DeepSpeedEngine, folder: Path, load_engine_state: Callable[..., Loaded], options: Mapping[str, bool]
) -> Loaded:
    """Load a universal checkpoint's weights, and begin the optimizer's states anew; a collective call.

    Args:
        engine: of any stage.
        folder: of the tag.
        load_engine_state: DeepSpeed's `_load_checkpoint` of this engine, which does the rest.
        options: its keyword arguments.

    Raises:
        ValueError: the checkpoint lacks a trained parameter, the same on every rank.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    trained = {name: shape for listed in optimizer.members for name, shape in listed}
    saved = SavedState()
    with agreed(optimizer):
        number = engine.fira_holders.slice_number
        files = UniversalFiles.find(folder, unpickle=optimizer.unpickle_checkpoints, of_slice=number)
        files.add_weights(saved, trained)
        recut(saved, files, engine.module, engine.fira_holders)
        rest = untrained_here(files, engine.module, engine.fira_holders, untrained(engine))
    names = rest.keys() - trained.keys()
    with replaced(
        engine,
        **of_one_file(files),
        load_module_state_dict=lambda **_: load_untrained(engine, rest, names),
    ):
        # At stage 3 it would look for the weights in files of that stage.
        path, client_state = load_engine_state(
            **{**options, "load_optimizer_states": engine.zero_optimization_stage() > 0}
        )
    load_masters(engine, saved, engine.fira_holders)
    client_state.pop(PAYLOAD, None)
    return path, client_state
