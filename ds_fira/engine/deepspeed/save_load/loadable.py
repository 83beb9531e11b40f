"""Say at the save, not at the resume, that a checkpoint cannot be loaded without running what stands in it."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_fira.checkpoint.safe_load import SETTING, UnsafeFileError
from ds_fira.engine.deepspeed.save_load.files import load


def warn_if_unloadable(engine: Any, folder: Path, client_state: Mapping[str, Any]) -> None:
    """Warn once, on rank 0, if the file that was just saved with the model's weights needs `unpickle_checkpoints`.

    Everything that a user adds is in that file; tensors are mapped, not read.

    Args:
        engine: that saved.
        folder: of the tag.
        client_state: as the user gave it.
    """
    optimizer = engine.basic_optimizer
    if engine.global_rank != 0 or optimizer.unpickle_checkpoints or getattr(engine, "fira_told_unloadable", False):
        return
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    try:
        for path in files[:1]:
            load(path)
    except UnsafeFileError as error:
        engine.fira_told_unloadable = True
        schedule = {} if engine.lr_scheduler is None else {"lr_scheduler": engine.lr_scheduler.state_dict()}
        keys = [key for key, value in {**client_state, **schedule}.items() if error.wanted in names_in(value)]
        where = f"client_state[{keys[0]!r}]" if keys and keys[0] in client_state else " and ".join(keys) or "the model"
        logger.warning(
            f"{optimizer.algorithm.name}: {where} holds {error.wanted or 'an object'}, which is saved but not loaded "
            f'again, since that may run code; save plain values and tensors in its place, or resume with "{SETTING}": '
            "true in the optimizer's params."
        )
    except (ValueError, OSError) as error:
        logger.warning(f"{optimizer.algorithm.name}: what was just saved cannot be read: {error}")


class _Pickler(pickle.Pickler):
    """Without the contents of tensors."""

    def persistent_id(self, found: Any) -> str | None:
        return "tensor" if isinstance(found, Tensor | torch.UntypedStorage | torch.storage.TypedStorage) else None


def names_in(value: Any) -> set[str]:
    """The classes and functions that a pickle of a value names, with their modules; not those of tensors."""
    buffer = io.BytesIO()
    # Protocol 2 is torch.save's.
    _Pickler(buffer, protocol=2, fix_imports=False).dump(value)
    found = pickletools.genops(buffer.getvalue())
    return {name.replace(" ", ".") for operation, name, _ in found if operation.name == "GLOBAL"}
