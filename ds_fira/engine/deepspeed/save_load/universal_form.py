"""Write a rank's states so that DeepSpeed's `ds_to_universal` reads our files as they are, and loses nothing of them.

The converter knows two states of every parameter, `exp_avg` and `exp_avg_sq`, of the parameter's own size. A file of
ours therefore shows it these two (`ds_fira/checkpoint/payload.py`): of a parameter that is not projected the moments
themselves, of any other a tensor on the meta device, so that whoever takes it for moments is stopped by torch and not
given zeros. All that the converter does not know is the rank's payload: bases, low-rank moments, limiters, step counts,
and the description of what lies where. It carries a payload along in the two places that it copies whatever they hold:

- stages 1 and 2: what is no tensor in the states of a group goes to a file of its own, in the folder of each parameter
  of that group. A last group, of no elements of any parameter, has the payload, and for its one parameter a name that
  leads out of the converter's temporary folder into one beside the weights: `payload_folder`;
- stage 3: the files of the model's states, one a rank, are copied as they are.

In our own files nothing is there twice: the tensors of both views are the same. But of a pipeline the converter copies
no file of a layer, so that the first rank of a stage has its buffers and frozen weights in the payload.

Of what AutoTP has sliced the converter puts the slices together, tensors without content too. Of what AutoTP has left
whole it compares what the ranks have, which such tensors do not bear: the description of where it lies (`slicing.py`)
names one rank a copy then, and there is nothing to compare.

What it relies on, of DeepSpeed 0.17 to 0.19: `extract_zero_shards`, `extract_zero_shards_stage3` and
`dump_param_fragment` of `deepspeed/checkpoint/ds_to_universal.py`, the copies at the end of its `main`, and that
`_validate_autotp_conversion_support` (from 0.19 on) stops with the reason that a checkpoint has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from deepspeed.checkpoint.constants import (
    GROUP_PADDINGS,
    PARAM_SLICE_MAPPINGS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ds_fira.checkpoint.named_state import KEY
from ds_fira.checkpoint.payload import PAYLOAD, UNTRAINED, fold
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.core.whole_model import TIED
from ds_fira.engine.deepspeed.holders import Holders
from ds_fira.engine.deepspeed.pipeline import second_copies
from ds_fira.engine.deepspeed.save_load.files import BASE_OPTIMIZER, MASTERS, normalized
from ds_fira.engine.deepspeed.save_load.fill import untrained_tensors
from ds_fira.engine.deepspeed.save_load.slicing import AFFINE_MAP, AFFINE_MAP_PARAMS, pattern_of, undescribed

_PAYLOADS = "ds_fira_states"
_UNSUPPORTED = "autotp_unsupported_parameter_patterns"


def payload_folder(number: int, of_pipeline: bool) -> str:
    """The folder of a universal checkpoint in which payloads of stages 1 and 2 are.

    Args:
        number: of the slice of the module, or of the stage of the pipeline, whose ranks they are of.
        of_pipeline: which of the two.
    """
    # The converter itself adds the number of the slice, and has one for all stages.
    return f"{_payload_name(number)}/0" if of_pipeline else f"{_PAYLOADS}/{number}"


def _payload_name(stage: int | None) -> str:
    return _PAYLOADS if stage is None else f"{_PAYLOADS}/stage_{stage:02d}"


def add_info(engine: DeepSpeedEngine, model: dict[str, object]) -> None:
    """Add to what is saved with the module's weights what the converter asks for, unless the user has.

    Args:
        engine: that saves.
        model: the content of the file; changed.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0 or (stage == 3 and engine.fira_holders.slices == 1):
        return
    # AutoTP's own is the module's.
    info = dict(model.get(UNIVERSAL_CHECKPOINT_INFO) or {})
    info = model[UNIVERSAL_CHECKPOINT_INFO] = _without_frozen(engine, info) if engine.fira_holders.slices > 1 else info
    info.setdefault(UNIVERSAL_CHECKPOINT_VERSION_KEY, UNIVERSAL_CHECKPOINT_VERSION_VALUE)
    if found := _unsupported(engine):
        info[_UNSUPPORTED] = {**info.get(_UNSUPPORTED, {}), **found}


def _without_frozen(engine: DeepSpeedEngine, info: Mapping[str, object]) -> dict[str, object]:
    """AutoTP's lists of patterns without those of frozen weights, over which the converter would stop: it has none."""
    trained = {name for listed in engine.basic_optimizer.members for name, _ in listed}
    frozen = {pattern_of(name) for name in normalized(dict(engine.module.named_parameters())).keys() - trained}

    def known(item: object) -> bool:
        return not frozen.intersection(item["patterns"] if isinstance(item, Mapping) else [item])

    return {key: list(filter(known, value)) if isinstance(value, list) else value for key, value in info.items()}


def for_converter(engine: DeepSpeedEngine, wrapper: dict[str, object], model: dict[str, object]) -> dict[str, object]:
    """What is saved of a rank's optimizer wrapper, as the converter can read it.

    Args:
        engine: that saves, of stage 1, 2 or 3.
        wrapper: the state dict of the optimizer wrapper.
        model: the content of the file of the model's states; at stage 3 it gets the payload.
    """
    if _unsupported(engine):
        return wrapper
    sliced = engine.zero_optimization_stage() == 3
    base, masters = (names[sliced] for names in (BASE_OPTIMIZER, MASTERS))
    tensors: Sequence[Tensor] = wrapper[masters]
    paddings = [0] * len(tensors) if sliced else list(wrapper[GROUP_PADDINGS])
    sizes = [tensor.numel() + padding for tensor, padding in zip(tensors, paddings, strict=True)]
    seen, payload = fold(wrapper[base], sizes, engine.global_steps - engine.skipped_steps)
    states = {"state": seen, "param_groups": payload["param_groups"]}
    if engine.fira_holders.slices > 1:
        _compare_nothing(engine, seen, payload["param_groups"], model)
    if sliced:
        model[PAYLOAD] = payload
        return {**wrapper, base: {**states, KEY: payload[KEY]}}  # by which the two files are known to belong together
    first, second = ADAM_STATES
    pipeline = isinstance(engine.module, PipelineModule)
    if pipeline and engine.fira_holders.dense.dp_rank == 0:
        payload = {**payload, UNTRAINED: untrained_tensors(engine)}
    name = f"../{_payload_name(engine.module.stage_id if pipeline else None)}"
    seen[len(tensors)] = {first: payload, second: None}
    return {
        **wrapper,
        base: {**states, PAYLOAD: payload},
        masters: [*tensors, torch.empty(0)],
        GROUP_PADDINGS: [*paddings, 0],
        PARAM_SLICE_MAPPINGS: [*_mappings(engine), {name: fragment_address(numel=0, start=0)}],
    }


def _unsupported(engine: DeepSpeedEngine) -> dict[str, str]:
    """The states of an engine that the converter cannot put together, each with the reason and the remedy."""
    holders: Holders = engine.fira_holders
    slices = undescribed(engine.module, holders.slices)
    beside = [name for name in holders.order if name.startswith(f"{TIED}.") and "@" in name]  # of `untied_names`
    found = {
        "the experts of a DeepSpeed MoE layer": ("each rank saves others under the same name", engine.has_moe_layers),
        f"the slices of {', '.join(slices[:3])}": ("AutoTP does not say which rows or columns they have", slices),
        f"{', '.join(beside[:3])}": ("stages have others beside a tied weight under the same name", beside),
    }
    return {
        what: f"{reason}; load the checkpoint as it is, on any number of data-parallel ranks"
        for what, (reason, is_so) in found.items()
        if is_so
    }


def _mappings(engine: DeepSpeedEngine) -> list[dict[str, fragment_address]]:
    """Which elements of which parameters each flat partition holds.

    DeepSpeed's own list of it is wrong where `round_robin_gradients` changes their order.
    """
    optimizer = engine.basic_optimizer
    full = {name.replace("_orig_mod.", ""): name for name in engine.param_names.values()}
    # What stages of a pipeline share, the first of them tells: they may cut it in other places.
    elsewhere = second_copies(engine.module) if isinstance(engine.module, PipelineModule) else ()
    return [
        {
            full[held.param]: fragment_address(numel=held.stop - held.start, start=held.offset)
            for held in optimizer.attachment.slices[param]
            if held.param not in elsewhere
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def _compare_nothing(
    engine: DeepSpeedEngine,
    seen: Mapping[int, Mapping[str, object]],
    groups: Sequence[Mapping[str, object]],
    model: dict[str, object],
) -> None:
    """Let the converter compare no copies of what AutoTP has left whole and has moments without content."""
    empty = {number for number, state in seen.items() if any(state[key].is_meta for key in ADAM_STATES)}
    listed = zip(groups, engine.basic_optimizer.members, strict=True)
    names = [name for group, members in listed if empty & {*group["params"]} for name, _ in members]
    info = model.get(UNIVERSAL_CHECKPOINT_INFO) or {}  # of a rank that saves no such file
    described = info.get(AFFINE_MAP) or {}
    maps = dict(described.get(AFFINE_MAP_PARAMS) or {})
    for pattern in {pattern_of(name) for name in names} & maps.keys():
        ranks = {
            rank: {**own, "pieces": [{**piece, "locations": [rank]} for piece in own["pieces"]]}
            for rank, own in maps[pattern]["ranks"].items()
        }
        maps[pattern] = {**maps[pattern], "ranks": ranks}
    if maps:
        model[UNIVERSAL_CHECKPOINT_INFO] = {**info, AFFINE_MAP: {**described, AFFINE_MAP_PARAMS: maps}}
