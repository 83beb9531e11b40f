"""Write a rank's states so that DeepSpeed's `ds_to_universal` reads our files as they are, and loses nothing of them.

The converter knows two states of every parameter, `exp_avg` and `exp_avg_sq`, of the parameter's own size. A file of
ours therefore shows it these two (`ds_fira/checkpoint/payload.py`): of a parameter that is not projected the moments
themselves, of any other a tensor on the meta device, so that whoever takes it for moments is stopped by torch and not
given zeros. All that the converter does not know is the rank's payload: bases, low-rank moments, limiters, step counts,
and the description of what lies where. It carries a payload along in the two places that it copies whatever they hold:

- stages 1 and 2: what is no tensor in the states of a group goes to a file of its own, in the folder of each parameter
  of that group. A last group, of no elements of any parameter, has the payload, and for its one parameter a name that
  leads out of the converter's temporary folder into one beside the weights: `PAYLOADS`;
- stage 3: the files of the model's states, one a rank, are copied as they are.

In our own files nothing is there twice: the tensors of both views are the same.

What it relies on, of DeepSpeed 0.17 to 0.19: `extract_zero_shards`, `extract_zero_shards_stage3` and
`dump_param_fragment` of `deepspeed/checkpoint/ds_to_universal.py`, the copies at the end of its `main`, and that
`_validate_autotp_conversion_support` (from 0.19 on) stops with the reason that a checkpoint has.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from ds_fira.checkpoint.payload import PAYLOAD, fold
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.engine.deepspeed.save_load.files import BASE_OPTIMIZER, MASTERS

# The folder of a universal checkpoint in which the payloads of stages 1 and 2 are, and their files in it.
PAYLOADS = "ds_fira_states"
_OUT_OF_TEMPORARY = f"../{PAYLOADS}"
_UNSUPPORTED = "autotp_unsupported_parameter_patterns"


def add_info(engine: DeepSpeedEngine, model: dict[str, object]) -> None:
    """Add to what is saved with the module's weights what the converter asks for, unless the user has.

    Args:
        engine: that saves.
        model: the content of the file; changed.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    info = model.setdefault(UNIVERSAL_CHECKPOINT_INFO, {})
    info.setdefault(UNIVERSAL_CHECKPOINT_VERSION_KEY, UNIVERSAL_CHECKPOINT_VERSION_VALUE)
    if found := _unsupported(engine):
        info[_UNSUPPORTED] = {**info.get(_UNSUPPORTED, {}), **found}


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
    if sliced:
        model[PAYLOAD] = payload
        return {**wrapper, base: {**states, KEY: payload[KEY]}}  # by which the two files are known to belong together
    first, second = ADAM_STATES
    seen[len(tensors)] = {first: payload, second: None}
    return {
        **wrapper,
        base: {**states, PAYLOAD: payload},
        masters: [*tensors, torch.empty(0)],
        GROUP_PADDINGS: [*paddings, 0],
        PARAM_SLICE_MAPPINGS: [*_mappings(engine), {_OUT_OF_TEMPORARY: fragment_address(numel=0, start=0)}],
    }


def _unsupported(engine: DeepSpeedEngine) -> dict[str, str]:
    """The states of an engine that the converter cannot put together, each with the reason and the remedy."""
    found = {
        "the experts of a DeepSpeed MoE layer": ("each rank saves others under the same name", engine.has_moe_layers),
        "the low-rank states of slices of matrices": (
            "they are of the whole matrix, whose slices the ranks of AutoTP have",
            engine.fira_holders.slices > 1,
        ),
        "the layers of a PipelineModule": (
            "each stage saves its own",
            isinstance(engine.module, PipelineModule),
        ),
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
    return [
        {
            full[held.name]: fragment_address(numel=held.stop - held.start, start=held.offset)
            for held in optimizer.attachment.slices[param]
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]
