"""Load what other ranks, another ZeRO stage or dtype saved, when a user calls `engine.load_checkpoint`.

Reads DeepSpeed's own checkpoint files, of all ranks that saved, each byte on one rank, and copies what this rank needs.
Where nothing but time has passed (the same ranks, stage, dtype and settings), DeepSpeed loads its files itself, which
it finds in memory.

`files.py` and `written.py` say what it relies on in DeepSpeed 0.17 to 0.19.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import logger

from ds_fira.checkpoint.errors import errors_name
from ds_fira.checkpoint.named_state import KEY, SavedState
from ds_fira.checkpoint.payload import PAYLOAD
from ds_fira.checkpoint.rates import carry_rates
from ds_fira.checkpoint.reconcile import SavedGroup, refuse_changed_structure, without
from ds_fira.checkpoint.safe_load import only_safe_loads
from ds_fira.engine.deepspeed.attach import attach
from ds_fira.engine.deepspeed.chosen import trains_ours
from ds_fira.engine.deepspeed.projection import project_as_saved
from ds_fira.engine.deepspeed.save_load.adam_files import given_names, left_out, maker_of, read_adam, warn_of_adam
from ds_fira.engine.deepspeed.save_load.calls import replaced
from ds_fira.engine.deepspeed.save_load.check import agreed, gathered, require_loadable, require_own_share
from ds_fira.engine.deepspeed.save_load.files import CheckpointFiles
from ds_fira.engine.deepspeed.save_load.fill import (
    fill_elsewhere,
    fill_own,
    opened,
    release,
    release_payloads,
    untrained,
)
from ds_fira.engine.deepspeed.save_load.for_others import load_into_other, made_here
from ds_fira.engine.deepspeed.save_load.pick import current_reading
from ds_fira.engine.deepspeed.save_load.slicing import recut, untrained_here
from ds_fira.engine.deepspeed.save_load.universal import load_weights, require_undamaged
from ds_fira.engine.deepspeed.save_load.universal_files import find_files, is_universal
from ds_fira.engine.deepspeed.save_load.written import (
    Loaded,
    carry_loss_scale,
    load_layers,
    load_untrained,
    of_one_file,
    stepped_params,
    write_back,
)
from ds_fira.engine.deepspeed.schedulers import carried_schedule
from ds_fira.optim.base import LowRankOptimizer


class Header(NamedTuple):
    """What a checkpoint says of the run that saved it.

    Attributes:
        layout: a digest of what lay where on all of its ranks; None where the states of the first rank do not say.
        groups: its param groups; none where they do not say.
        adam: its optimizer, where that is an Adam of another package; else None.
        pipeline: whether its module was a pipeline.
    """

    layout: str | None = None
    groups: Sequence[SavedGroup] = ()
    adam: str | None = None
    pipeline: bool = False


def read_header(optimizer: LowRankOptimizer, folder: Path) -> Header:
    """Read what a checkpoint says of the run that saved it.

    Raises:
        ValueError: it cannot be read.
    """
    files = find_files(folder, False, optimizer.unpickle_checkpoints, current_reading())
    state_dict = files.optimizer_state(0)[1] if files.models else {}
    if KEY in state_dict:
        saved = SavedState()
        for number in files.first_of_stages():
            saved.add(files.optimizer_state(number)[1])
        return Header(state_dict[KEY].get("layout"), saved.groups, pipeline=files.of_pipeline)
    return Header(adam=maker_of(files, state_dict) if state_dict else None, pipeline=files.models and files.of_pipeline)


def load_elsewhere(
    engine: DeepSpeedEngine,
    folder: Path,
    load_engine_state: Callable[..., Loaded],
    options: Mapping[str, bool],
    adam: str | None = None,
) -> Loaded:
    """Load a checkpoint that was saved by other ranks, another stage, dtype, settings or an Adam of another package.

    Args:
        engine: of any stage; its module, optimizer, loss scale and counters are set.
        folder: of the tag.
        load_engine_state: DeepSpeed's `_load_checkpoint` of this engine, which does the rest.
        options: its keyword arguments.
        adam: the optimizer that saved it, where that is none of this package.

    Returns:
        What DeepSpeed's returns: the path and the client state.

    Raises:
        ValueError: the checkpoint does not fit, the same on every rank.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    communicator, stage = optimizer.communicator, engine.zero_optimization_stage()
    reading, wanted = current_reading(), []
    if reading is not None:
        reading.spread_structure([name for name in reading.images if reading.files[name].rank is not None])
    number = engine.fira_holders.slice_number
    with agreed(optimizer):
        files = find_files(folder, True, optimizer.unpickle_checkpoints, reading, number)
        saved = files.read() if adam is None else read_adam(files, adam, given_names(engine))
        recut(saved, files, engine.module, engine.fira_holders)
        saved.groups = without(saved.groups, optimizer.elsewhere)
        refuse_changed_structure(saved.groups, optimizer.param_groups, optimizer.members)
        if reading is not None:
            with stepped_params(engine):
                wanted = reading.touched_by(lambda: optimizer.restore(saved, weights=True, rehearsal=True))
    # The file of the module's weights is one that this run would have written, or has the layers of a pipeline beside.
    alike = files.slices == engine.fira_holders.slices and (len(files.models) == 1 or files.of_pipeline)
    simple, methods = stage < 3 and alike and not files.partitioned and not is_universal(folder), {}
    if reading is not None:
        reading.deliver(wanted)
        methods = fill_elsewhere(reading, files, engine, options, simple)
    if not saved.weights:
        load_layers(engine, saved, folder)
    with agreed(optimizer):
        with stepped_params(engine):
            optimizer.restore(saved, weights=True)
        if adam is None:
            optimizer.carry_groups(saved)
        else:
            carry_rates(saved.groups, optimizer.param_groups, optimizer.members)
        rest = {} if simple else untrained_here(files, engine.module, engine.fira_holders, untrained(engine))
    if not simple:
        # What is trained comes from the masters, experts too, of which stage 3 writes no files.
        methods = {"load_module_state_dict": lambda **_: load_untrained(engine, rest, untrained(engine))}
        methods["has_moe_layers"] = False
    with replaced(engine, **of_one_file(files), **methods):
        # Under ZeRO it leaves the optimizer to the caller; at stage 0 it would load it here.
        path, client_state = load_engine_state(
            **{**options, "load_optimizer_states": stage > 0, "load_lr_scheduler_states": False}
        )
    model = files.model()
    if options.get("load_lr_scheduler_states", True) and engine.lr_scheduler is not None and model["lr_scheduler"]:
        with carried_schedule(engine, saved.groups, own_rates=adam is not None):
            engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    write_back(engine)
    carry_loss_scale(engine.optimizer, files.optimizer_state(0)[0])
    for key in ("optimizer", "lr_scheduler", PAYLOAD):
        client_state.pop(key, None)
    release(reading)
    if adam is not None:
        warn_of_adam(optimizer, adam, left_out(files), stacklevel=6)
    if communicator.dp_rank == 0:
        logger.info(
            f"{optimizer.algorithm.name}: resumed at step {engine.global_steps} on {communicator.dp_size} ranks at "
            f"ZeRO stage {stage} from {max(1, len(files.optimizers))} files of optimizer states"
        )
    return path, client_state


def load_states(
    load_checkpoint: Callable[..., Loaded], engine: DeepSpeedEngine, load_dir: str, tag: str, **options: bool
) -> Loaded:
    """`_load_checkpoint`: loads what other ranks, another stage or dtype saved; runs no code of a file."""
    engine.fira_has_loaded, engine.fira_states = False, None
    if not trains_ours(engine):
        folder = Path(load_dir, str(tag))
        plain = options.get("load_module_only") and not is_universal(folder)
        if plain or engine.optimizer is None or not made_here(folder):
            return load_checkpoint(engine, load_dir, tag, **options)
        engine.fira_has_loaded = True
        return load_into_other(load_checkpoint, engine, load_dir, str(tag), **options)
    optimizer, folder = engine.basic_optimizer, Path(load_dir, str(tag))
    optimizer_too = options.get("load_optimizer_states", True) and not options.get("load_module_only", False)
    reading, methods, groups, universal = current_reading(), {}, (), is_universal(folder)
    with only_safe_loads(not optimizer.unpickle_checkpoints, opened(reading)):
        if reading is not None:
            reading.spread_structure([name for name in reading.images if reading.files[name].rank is None])

        def look() -> Header | None:
            if universal:
                require_undamaged(optimizer, folder)
            elif not optimizer.unpickle_checkpoints:
                # Stage 3 takes the weights from the optimizer's files.
                require_loadable(engine, folder, not optimizer_too and engine.zero_optimization_stage() < 3, reading)
            if not optimizer_too and not universal:
                _refuse_other_slices(find_files(folder, False, reading=reading), engine.fira_holders.slices)
            reads = optimizer_too and optimizer.communicator.dp_rank == 0
            return read_header(optimizer, folder) if reads else None

        header = gathered(optimizer, look)[0]
        load_engine_state = functools.partial(load_checkpoint, engine, load_dir, tag)
        if universal and not optimizer_too:
            return load_weights(engine, folder, load_engine_state, options)
        if optimizer_too:
            groups = without(header.groups, optimizer.elsewhere)
            with agreed(optimizer):
                _refuse_other_module(engine, header, groups, universal)
            with errors_name(optimizer.algorithm.name):
                project_as_saved(optimizer, groups, functools.partial(attach, engine))
            # DeepSpeed itself has no weights to set where they are swapped out.
            swapped = getattr(engine.optimizer, "params_in_nvme_and_cpu", False)
            other = header.adam is not None or header.layout not in (None, optimizer.attachment.digest)
            if universal or swapped or other:
                engine.fira_has_loaded = True
                return load_elsewhere(engine, folder, load_engine_state, options, header.adam)
            with stepped_params(engine):
                engine.fira_states = require_own_share(engine, folder, reading)
        if reading is not None:
            methods = fill_own(reading, engine, options)
        with replaced(engine, **methods), carried_schedule(engine, groups):
            loaded = load_checkpoint(engine, load_dir, tag, **options)
        release(reading)
        (loaded[1] or {}).pop(PAYLOAD, None)
        return loaded


def _refuse_other_slices(files: CheckpointFiles, now: int) -> None:
    """Stop where weights alone are asked for that lie in other slices: DeepSpeed would put them together by itself."""
    if files.models and files.slices != now:
        raise ValueError(
            f"load_optimizer_states = False with tensor_parallel.autotp_size = {now} cannot load what was saved with "
            f"{files.slices}, since ranks had other slices of every matrix; load the optimizer states too, or convert "
            "the checkpoint by ds_to_universal, and set checkpoint.load_universal = true."
        )


def _refuse_other_module(
    engine: DeepSpeedEngine, header: Header, groups: Sequence[SavedGroup], universal: bool
) -> None:
    """Stop where a pipeline's checkpoint meets another kind of module, or what only some of its stages would refuse."""
    pipeline, optimizer = isinstance(engine.module, PipelineModule), engine.basic_optimizer
    if header.layout is None and header.adam is None:
        return
    if header.pipeline != pipeline:
        before, now = ("a PipelineModule", "no") if header.pipeline else ("another module", "a")
        raise ValueError(
            f"the checkpoint is of {before}, whose files are others, and this engine trains {now} PipelineModule; "
            "build the model as it was."
        )
    if header.adam is not None and pipeline and not universal:
        raise ValueError(
            f"the checkpoint was made by {header.adam} in a PipelineModule, of which nothing but weights can be taken "
            "over; convert it by ds_to_universal, and set checkpoint.load_universal = true, or load with "
            "load_optimizer_states=False and load_lr_scheduler_states=False."
        )
    if pipeline and header.adam is None:
        refuse_changed_structure(groups, optimizer.param_groups, optimizer.members)


def load_zero_states(load_zero: Callable[..., bool], engine: DeepSpeedEngine, *args: object, **kwargs: object) -> bool:
    """`_load_zero_checkpoint`: only where `load_states` has not loaded the states; runs no code of a file."""
    if getattr(engine, "fira_has_loaded", False):
        return True
    enabled = trains_ours(engine) and not engine.basic_optimizer.unpickle_checkpoints
    own, methods = vars(engine).pop("fira_states", None), {}
    if own is not None:
        # DeepSpeed finds them in the form that its converter reads.
        optimizer: LowRankOptimizer = engine.basic_optimizer
        methods = {"load_state_dict": lambda _: type(optimizer).load_state_dict(optimizer, own)}
    with only_safe_loads(enabled, opened(current_reading())), replaced(engine.basic_optimizer, **methods):
        loaded = load_zero(engine, *args, **kwargs)
    if own is not None:
        release_payloads(current_reading())
    return loaded
