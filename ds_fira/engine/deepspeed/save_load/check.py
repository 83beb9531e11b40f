"""Check a checkpoint on every rank before DeepSpeed loads it: an error on one rank would leave the others waiting."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from torch import Tensor

from ds_fira.checkpoint.errors import load_sentence
from ds_fira.checkpoint.named_state import StateDict
from ds_fira.checkpoint.safe_load import SETTING, UnsafeFileError
from ds_fira.checkpoint.shared_read import SharedRead
from ds_fira.checkpoint.tag_folder import matching_files
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles, load
from ds_fira.optim.base import LowRankOptimizer

T = TypeVar("T")


@contextmanager
def agreed(optimizer: LowRankOptimizer) -> Iterator[None]:
    """Stop on every rank if what is done inside fails on any; as `gathered`."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    _settle(optimizer, error, None)


def gathered(optimizer: LowRankOptimizer, function: Callable[[], T]) -> list[T]:
    """What a function returns on every rank, in order of rank; inside an engine a collective call.

    Args:
        optimizer: gives the ranks, and its name to the sentence.
        function: that may fail on some.

    Raises:
        ValueError: with the sentence of the first rank that failed, the same on every rank.
    """
    answer = error = None
    try:
        answer = function()
    except Exception as raised:
        error = raised
    return _settle(optimizer, error, answer)


def _settle(optimizer: LowRankOptimizer, error: Exception | None, answer: T) -> list[T]:
    communicator = optimizer.communicator
    rank = 0 if communicator is None else communicator.dp_rank
    text = None if error is None else load_sentence(error, optimizer.algorithm.name, rank)
    told = [(text, answer)] if communicator is None else communicator.gather_objects((text, answer))
    failed = [text for text, _ in told if text is not None]
    if failed:
        raise ValueError(failed[0]) from error
    return [answer for _, answer in told]


def require_loadable(
    engine: DeepSpeedEngine, folder: Path, model_only: bool = False, reading: SharedRead | None = None
) -> None:
    """Raise if a file of a checkpoint cannot be read without running what stands in it.

    DeepSpeed reads one file on one rank, where an error would leave the others waiting. So all are looked into before:
    each by one of the ranks that share a storage.

    Args:
        engine: that loads.
        folder: of the tag.
        model_only: leave out the optimizer's files, which are not read.
        reading: of the folder; a rank looks into its own files, and those that are read by all are shared out.

    Raises:
        ValueError: with the file, what it would import, and the remedy; or with that of an expert that is missing.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    communicator = optimizer.communicator
    known = None if reading is None else reading.files
    files = CheckpointFiles.find(folder, False, optimizer.unpickle_checkpoints, reading)
    looks = files.models and communicator.dp_rank == 0 and not engine.use_node_local_storage()
    lost = files.lost_experts() if looks else []
    if lost:
        raise ValueError(f"{folder} lacks {lost[0]}, the weights of an expert; load another tag.")
    paths = matching_files(folder, "*model_states.pt" if model_only else "*_states.pt", known)
    first, step = (0, 1) if engine.use_node_local_storage() else (communicator.dp_rank, communicator.dp_size)
    for number, path in enumerate(paths):
        owner = None if known is None else known[path.name].rank
        if number % step == first if owner is None else owner == reading.rank:
            load(path, reading=reading)


def require_own_share(engine: DeepSpeedEngine, folder: Path, reading: SharedRead | None = None) -> StateDict | None:
    """Stop on every rank unless each finds the states that it saved, whole; a collective call.

    For a checkpoint that DeepSpeed loads by itself, the same ranks having saved it. Stage 3 has its tensors in the
    param groups meanwhile (`stepped_params`).

    Args:
        engine: that loads.
        folder: of the tag.
        reading: of the folder.

    Returns:
        The states; None where there are none, and at stage 0, where they may not have been read yet.

    Raises:
        ValueError: with what is missing or another's, and the remedy.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    state_dict = None
    with agreed(optimizer):
        known: Holders = engine.fira_holders
        files = CheckpointFiles.find(folder, False, optimizer.unpickle_checkpoints, reading, known.slice_number)
        if files.models:
            _, state_dict = files.of_rank(known.place)
            optimizer.require_fit(state_dict)
    return None if engine.zero_optimization_stage() == 0 else state_dict


def warn_if_unloadable(engine: DeepSpeedEngine, folder: Path, client_state: Mapping[str, object]) -> None:
    """Warn once, on rank 0, if the file that was just saved with the model's weights needs `unpickle_checkpoints`.

    Everything that a user adds is in that file; tensors are mapped, not read.

    Args:
        engine: that saved.
        folder: of the tag.
        client_state: as the user gave it.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    if engine.global_rank != 0 or optimizer.unpickle_checkpoints or getattr(engine, "fira_told_unloadable", False):
        return
    name = optimizer.algorithm.name
    try:
        for path in sorted(folder.glob("*mp_rank_00_model_states.pt"))[:1]:
            load(path)
    except UnsafeFileError as error:
        engine.fira_told_unloadable = True
        schedule = {} if engine.lr_scheduler is None else {"lr_scheduler": engine.lr_scheduler.state_dict()}
        keys = [key for key, value in {**client_state, **schedule}.items() if error.wanted in names_in(value)]
        where = f"client_state[{keys[0]!r}]" if keys and keys[0] in client_state else " and ".join(keys) or "the model"
        logger.warning(
            f"{name}: {where} holds {error.wanted or 'an object'}, which is saved but not loaded again, since that may "
            f'run code; save plain values and tensors in its place, or resume with "{SETTING}": true in the '
            "optimizer's params."
        )
    except (ValueError, OSError) as error:
        logger.warning(f"{name}: what was just saved cannot be read: {error}")


class _Pickler(pickle.Pickler):
    """Without the contents of tensors."""

    def persistent_id(self, found: object) -> str | None:
        return "tensor" if isinstance(found, Tensor | torch.UntypedStorage | torch.storage.TypedStorage) else None


def names_in(value: object) -> set[str]:
    """The classes and functions that a pickle of a value names, with their modules; not those of tensors."""
    buffer = io.BytesIO()
    # Protocol 2 is torch.save's.
    _Pickler(buffer, protocol=2, fix_imports=False).dump(value)
    found = pickletools.genops(buffer.getvalue())
    return {name.replace(" ", ".") for operation, name, _ in found if operation.name == "GLOBAL"}
