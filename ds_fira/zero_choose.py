"""Which checkpoint `engine.load_checkpoint` takes: the newest that is complete, the same on every rank.

Written against DeepSpeed 0.19.8. What it relies on: `use_node_local_storage`, and that `latest` lies beside the tags.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.utils import logger

from ds_fira import tags
from ds_fira.comm import Channel
from ds_fira.tags import CheckpointError


def owns_storage(engine: Any) -> bool:
    """Whether this rank moves the files of its storage: rank 0, or the first of each node."""
    return (engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0


def choose(engine: Any, call: inspect.BoundArguments) -> str | None:
    """The tag to load, the same on every rank; None leaves it to DeepSpeed, which finds nothing.

    Raises:
        CheckpointError: the tag that was asked for is not complete, or none is where there should be one.
    """
    given, channel = call.arguments, Channel()
    folder, explicit = Path(given["load_dir"]), given["tag"] is not None
    partial = given["load_module_only"] or not given["load_optimizer_states"]
    model_only = partial and engine.zero_optimization_stage() < 3
    owner = owns_storage(engine)
    # Of rank 0: DeepSpeed alone writes `latest` on the first node only.
    wanted = channel.gather_objects(str(given["tag"]) if explicit else tags.read_latest(folder))[0]
    views: list[dict[str, str | None]] = []
    if owner:
        views = [{tag: tags.find_fault(folder / tag, model_only) for tag in tags.in_order(folder, wanted, explicit)}]
    views = [view for part in channel.gather_objects(views) for view in part]
    faults = {tags.LATEST: "it is empty"} if wanted == "" else {}
    for tag in views[0]:
        found = [view.get(tag, "it is missing on a node") for view in views]
        if not any(found):
            # Contents are read by all processes of a storage, each file by one.
            share = (0, 1) if engine.use_node_local_storage() else (channel.dp_rank, channel.dp_size)
            reads = owner or not engine.use_node_local_storage()
            found = channel.gather_objects(tags.find_damage(folder / tag, model_only, *share) if reads else None)
        if not any(found):
            _warn(folder, faults, f"loading {tag!r} instead" if faults else "")
            return tag
        faults[tag] = next(fault for fault in found if fault)
    if explicit or wanted is not None or any(not tags.is_leftover(tag) for tag in faults):
        told = "; ".join(f"{folder / tag}: {fault}" for tag, fault in faults.items())
        # Of rank 0: the others may come here later, when the folder has changed.
        others = [t for t in tags.in_order(folder, None) if t not in faults and tags.find_fault(folder / t) is None]
        others = channel.gather_objects(others)[0]
        remedy = f"load another tag, such as {others[0]!r}" if others else "load from another folder"
        raise CheckpointError(f"FiraAdam: no complete checkpoint to load ({told}): {remedy}.")
    _warn(folder, faults, "there is no complete one")
    return None


def _warn(folder: Path, faults: dict[str, str], outcome: str) -> None:
    """Name the checkpoints that are not taken, and why."""
    if faults and dist.get_rank() == 0:
        told = "; ".join(f"{tag}: {fault}" for tag, fault in faults.items())
        logger.warning(f"FiraAdam: in {folder} not every checkpoint is complete ({told}): {outcome}.")
