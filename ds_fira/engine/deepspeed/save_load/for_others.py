"""Load a checkpoint of this package's optimizers into an engine that trains with another one: all but their states.

Weights, counts, generators and the place of the schedule go on; the other optimizer starts with states of its own,
from zero. By itself DeepSpeed stops over the number of param groups, at stage 0 it leaves master weights as they were,
and it takes a schedule's lists as long as another optimizer's groups.

What it relies on, of DeepSpeed 0.17 to 0.19, beside what `load.py` does: `FP16_Optimizer`, which FusedAdam has at
stage 0, keeps the module's parameters in `fp16_groups`, and `refresh_fp32_params` takes its master weights from them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_fira.checkpoint import tag_folder
from ds_fira.checkpoint.errors import errors_name
from ds_fira.checkpoint.manifest import MANIFEST
from ds_fira.checkpoint.named_state import KEY as DESCRIPTION
from ds_fira.checkpoint.named_state import SavedState
from ds_fira.checkpoint.payload import PAYLOAD
from ds_fira.checkpoint.rates import carry_rates, with_own_rates
from ds_fira.checkpoint.reconcile import Members, carry_schedule
from ds_fira.checkpoint.restore import restore_weights
from ds_fira.core.selection import first_element, shape_of
from ds_fira.engine.deepspeed.flat_groups import stepped_groups
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.engine.deepspeed.save_load.client_state import KEY, set_rng_state
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from ds_fira.engine.deepspeed.save_load.slicing import recut, untrained_here
from ds_fira.engine.deepspeed.save_load.universal_files import UniversalFiles, find_files, is_universal, read_latest
from ds_fira.engine.deepspeed.save_load.written import (
    Loaded,
    carry_loss_scale,
    load_untrained,
    of_one_file,
    write_back,
)
from ds_fira.sharding.geometry import ParamSlice


def made_here(folder: Path) -> bool:
    """Whether an engine with an optimizer of this package has saved a checkpoint; opens no other's files."""
    universal = is_universal(folder)
    if not universal and not (folder / MANIFEST).is_file():
        return False
    try:
        if universal:
            return UniversalFiles.find(folder).ours
        # Another optimizer may have been saved over it since, which leaves the manifest.
        files = CheckpointFiles.find(folder, every=False)
        return bool(files.models) and DESCRIPTION in files.optimizer_state(0)[1]
    except ValueError:
        return False


def load_beside(load: Callable[..., Loaded], call: inspect.BoundArguments) -> Loaded:
    """`load_checkpoint` of an engine with another optimizer: of a checkpoint of ours it takes over all there is.

    That goes the way of `load_into_other`, whether the caller asks for states or not.
    """
    given = call.arguments
    engine, folder = given["self"], Path(given["load_dir"])
    universal = engine.load_universal_checkpoint()
    tag = given["tag"]
    if tag is None:
        tag = read_latest(folder) if universal else tag_folder.read_latest(folder)
    if not tag or (given["load_module_only"] and not universal) or not made_here(folder / str(tag)):
        return load(*call.args, **call.kwargs)
    given |= {"tag": str(tag), "load_optimizer_states": True}
    given["load_lr_scheduler_states"] &= not given["load_module_only"]
    with replaced(engine, **({"load_universal_checkpoint": lambda: False} if universal else {})):
        return load(*call.args, **call.kwargs)


def load_into_other(
    load_checkpoint: Callable[..., Loaded], engine: DeepSpeedEngine, load_dir: str, tag: str, **options: bool
) -> Loaded:
    """`_load_checkpoint` of an engine whose optimizer is none of this package's, from a checkpoint that is.

    Raises:
        ValueError: the checkpoint lacks a trained parameter.
    """
    holders = Holders(engine)
    files = find_files(Path(load_dir, tag), of_slice=holders.slice_number)
    if files.of_pipeline and not is_universal(Path(load_dir, tag)):
        raise ValueError(
            f"the checkpoint in {Path(load_dir, tag)} was made by an optimizer of ds_fira in a PipelineModule, of "
            "which another optimizer can take the weights only; load with load_module_only=True, or convert it by "
            "ds_to_universal, and set checkpoint.load_universal = true."
        )
    saved = files.read()
    recut(saved, files, engine.module, holders)
    members = _members(engine, holders)
    name, kind = saved.algorithm.name, type(engine.basic_optimizer).__name__
    wanted = {*holders.names.values()} - {param for part in members for param, _ in part}
    rest, stage = untrained_here(files, engine.module, holders, wanted), engine.zero_optimization_stage()
    if engine.has_moe_layers and not files.partitioned:
        rest |= files.module()  # experts have files of their own, and names that all ranks know
    with replaced(
        engine,
        **of_one_file(files),
        load_module_state_dict=lambda **_: load_untrained(engine, rest, wanted, holders.names),
        has_moe_layers=False,  # whose weights are among the masters, or frozen
    ):
        # Under ZeRO it leaves the optimizer to the caller; at stage 0 it would load it here.
        path, client_state = load_checkpoint(
            engine, load_dir, tag, **{**options, "load_optimizer_states": stage > 0, "load_lr_scheduler_states": False}
        )
    with errors_name(kind):
        load_masters(engine, saved, holders)
    schedule = client_state.pop("lr_scheduler", None)
    for key in ("optimizer", PAYLOAD):
        client_state.pop(key, None)
    if options.get("load_lr_scheduler_states", True):
        carry_rates(saved.groups, engine.basic_optimizer.param_groups, members)
        if schedule and engine.lr_scheduler is not None:
            own = engine.lr_scheduler.state_dict()
            state = with_own_rates(carry_schedule(schedule, own, saved.groups, members), own)
            engine.lr_scheduler.load_state_dict(state)
    carry_loss_scale(engine.optimizer, files.optimizer_state(0)[0])
    ranks = client_state.get(KEY, {}).get("ranks", ())
    if dist.get_rank() < len(ranks):
        set_rng_state(ranks[dist.get_rank()]["rng"])
    if dist.get_rank() == 0:
        rates = sorted({float(group["lr"]) for group in engine.basic_optimizer.param_groups})
        warnings.warn(
            f"the checkpoint was made by {name}, and this engine trains with {kind}: weights, counts, data and the "
            f"schedule's place go on, and {kind}'s moments and their own step count start at zero, at lr = "
            f"{', '.join(f'{rate:.3g}' for rate in rates[:3])}; warm the rate up over some 100 steps "
            f"(docs/migrate.md), or set optimizer.type = {name!r} to go on with {name}.",
            stacklevel=8,
        )
    return path, client_state


def _members(engine: DeepSpeedEngine, holders: Holders) -> list[Members]:
    """Names and shapes of the parameters of every param group."""
    found: list[Members] = [[] for _ in engine.basic_optimizer.param_groups]
    for number, params in _stepped(engine, holders):
        found[number] += [(holders.names.get(id(param), ""), shape_of(param)) for param in params]
    return found


def load_masters(engine: DeepSpeedEngine, saved: SavedState, holders: Holders) -> None:
    """Set the stepped weights, and by them the module's; a collective call."""
    names = holders.labels
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        params = [param for group in engine.optimizer.fp16_groups for param in group]
        firsts = [first_element(param) for param in params]
        slices = [ParamSlice(names[id(p)], 0, n, n + p.numel()) for n, p in zip(firsts, params, strict=True)]
        restore_weights(saved, [(p, (part,)) for p, part in zip(params, slices, strict=True)])
        engine.optimizer.refresh_fp32_params()
        return
    flats = stepped_groups(engine, holders.of)
    restore_weights(saved, [(flat.hp_partition, flat.slices(flat.communicator.dp_rank, names)) for flat in flats])
    write_back(engine)


def _stepped(engine: DeepSpeedEngine, holders: Holders) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """The module's parameters with the number of their param group."""
    if hasattr(engine.optimizer, "fp32_groups_flat"):  # FusedAdam at stage 0
        yield from enumerate(engine.optimizer.fp16_groups)
        return
    for flat in stepped_groups(engine, holders.of):
        yield flat.group, flat.lp_params
