"""What is checked of a checkpoint before DeepSpeed loads it: an error on one rank would leave the others waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_fira.checkpoint.manifest import listed_files
from ds_fira.core.algorithms import ALGORITHMS
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, load
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.sharding.comm import Communicator


def agree(communicator: Communicator, error: Exception | None, name: str) -> None:
    """Stop on every rank if any has failed.

    Args:
        communicator: of the ranks.
        error: of this rank, of whatever kind; None without one.
        name: of the optimizer.

    Raises:
        ValueError: with the text of the first rank that failed, one sentence.
    """
    texts = communicator.gather_objects(None if error is None else sentence(error, name, communicator.dp_rank))
    failed = [text for text in texts if text is not None]
    if failed:
        raise ValueError(failed[0]) from error


def sentence(error: Exception, name: str, rank: int = 0) -> str:
    """What an error of loading says, with the optimizer's name before it."""
    if not isinstance(error, ValueError):
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name}: rank {rank} could not load the checkpoint ({told}); load another tag."
    return str(error) if str(error).partition(":")[0] in ALGORITHMS else f"{name}: {error}"


def require_loadable(engine: Any, folder: Path, model_only: bool = False) -> None:
    """Stop on every rank if a file of a checkpoint cannot be read without running what stands in it; collective.

    DeepSpeed reads one file on one rank, where an error would leave the others waiting. So all are looked into before:
    each by one of the ranks that share a storage.

    Args:
        engine: that loads.
        folder: of the tag.
        model_only: leave out the optimizer's files, which are not read.

    Raises:
        ValueError: with the file, what it would import, and the remedy.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    communicator, error = optimizer.communicator, None
    try:
        listed = listed_files(folder)
        paths = sorted(folder.glob("*model_states.pt" if model_only else "*_states.pt")) if folder.is_dir() else []
        paths = [path for path in paths if listed is None or path.name in listed]
        first, step = (0, 1) if engine.use_node_local_storage() else (communicator.dp_rank, communicator.dp_size)
        for path in paths[first::step]:
            load(path)
    except Exception as raised:
        error = raised
    agree(communicator, error, optimizer.algorithm.name)


def require_own_share(engine: Any, folder: Path) -> None:
    """Stop on every rank unless each finds the states that it saved, whole; a collective call.

    For a checkpoint that DeepSpeed loads by itself, the same ranks having saved it. Stage 3 has its tensors in the
    param groups meanwhile (`stepped_params`).

    Raises:
        ValueError: with what is missing or another's, and the remedy.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    error = None
    try:
        files = CheckpointFiles.find(folder, every=False, unpickle=optimizer.unpickle_checkpoints)
        if files.models:
            _, state_dict = files.of_rank(optimizer.communicator.dp_rank)
            optimizer.require_fit(state_dict)
    except Exception as raised:
        error = raised
    agree(optimizer.communicator, error, optimizer.algorithm.name)
