"""DeepSpeed's features beside the options of the matrix: each tried on real ranks, held against one process as there.

`FEATURES` is what `python -m tests.compatibility.matrix` runs, and docs/compatibility.md lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.compatibility import option_jobs
from tests.compatibility.engine_ways import (
    compiled_engine,
    compiled_model,
    deepcompiled,
    generating,
    in_float16,
    sparse_embedding,
)
from tests.compatibility.expert_features import moe
from tests.compatibility.object_features import fira_object, object_of_accelerate, replaced_object
from tests.compatibility.offload_features import offloaded_between_steps, on_nvme, partly_offloaded
from tests.compatibility.option_jobs import PARAMS, forget_engines, try_config
from tests.compatibility.param_jobs import ROWS
from tests.compatibility.pipe_features import pipeline
from tests.compatibility.sequence_jobs import ulysses
from tests.compatibility.tensor_parallel_features import tensor_parallel
from tests.distributed.autoep_net import autoep
from tests.distributed.nvme_jobs import operator_is_built
from tests.distributed.zero_jobs import config

SUPPORTED, REFUSED, REMOVED = "supported", "refused", "DeepSpeed's refusal"
# Of what FiraAdam refuses: torch's AdamW does not train with it here either; DeepSpeed does not read it.
NEITHER, WITHOUT_EFFECT = "AdamW fails too", "no effect"


@dataclass(frozen=True)
class Feature:
    """Something that DeepSpeed offers.

    Attributes:
        name: as the page calls it; settings in the notation of the JSON.
        expected: "supported", "refused" by FiraAdam, "DeepSpeed's refusal", or a kind of FiraAdam's refusals.
        stages: at which it is tried.
        dtype: of the module: "fp32", "bf16", "fp16".
        extra: added to the config, as `tests.distributed.zero_jobs.config` takes it.
        top: added at the top of the config as it is.
        way: tries it under a config.
        ready: whether this machine has what it takes.
    """

    name: str
    expected: str = SUPPORTED
    stages: tuple[int, ...] = (1, 2)
    dtype: str = "bf16"
    extra: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    way: Callable[[dict[str, Any]], dict[str, Any]] = try_config
    ready: Callable[[], bool] = lambda: True

    def ds_config(self, stage: int) -> dict[str, Any]:
        """The DeepSpeed config at a stage."""
        return {**config(stage, self.dtype, PARAMS, **{"gradient_clipping": 1.0, **self.extra}), **self.top}


DEEPCOMPILE = {"compile": {"deepcompile": True}}
PIPELINE = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 8}
OFFLOAD = {"device": "cpu", "pin_memory": False}
AUTOTP, TWO_SLICES = "tensor parallelism: `tensor_parallel.autotp_size`", {"tensor_parallel": {"autotp_size": 2}}
FEATURES = [
    Feature("`engine.compile()`", stages=(0, 1, 2, 3), way=compiled_engine),
    Feature("`torch.compile(model)` before `deepspeed.initialize`", stages=(0, 1, 2), way=compiled_model),
    # With torch's AdamW too.
    Feature("the same at stage 3", REMOVED, stages=(3,), way=compiled_model),
    Feature("`compile.deepcompile`", NEITHER, (2,), extra=DEEPCOMPILE, way=deepcompiled),
    Feature(
        "`compile.deepcompile` at stage 0, which is torch.compile", stages=(0,), extra=DEEPCOMPILE, way=compiled_engine
    ),
    Feature("sequence parallelism: Ulysses, DeepSpeed's `parallel_state_sp`", stages=(1, 2), dtype="fp32", way=ulysses),
    Feature(AUTOTP, stages=(0, 1, 2, 3), dtype="fp32", extra=TWO_SLICES, way=tensor_parallel),
    Feature("experts: `deepspeed.moe.layer.MoE`, `ep_size` 1 and 2", stages=(0, 1, 2), dtype="fp32", way=moe),
    Feature("experts: `deepspeed.moe.layer.MoE` at stage 3", REMOVED, stages=(3,), dtype="fp32", way=moe),
    Feature("experts: `expert_parallel` (AutoEP)", stages=(0, 1, 2, 3), dtype="fp32", extra=autoep(2), way=moe),
    Feature("ZeRO++: `zero_quantized_weights`", WITHOUT_EFFECT, extra={"zero_zero_quantized_weights": True}),
    Feature(
        "ZeRO++: `zero_quantized_nontrainable_weights`",
        WITHOUT_EFFECT,
        extra={"zero_zero_quantized_nontrainable_weights": True},
    ),
    Feature("ZeRO++: `zero_quantized_gradients`", WITHOUT_EFFECT, extra={"zero_zero_quantized_gradients": True}),
    Feature("ZeRO++: `zero_hpz_partition_size`", WITHOUT_EFFECT, extra={"zero_zero_hpz_partition_size": 2}),
    Feature(
        "`offload_optimizer.device` = nvme",
        WITHOUT_EFFECT,
        extra={"zero_offload_optimizer": {"device": "nvme", "nvme_path": "."}},
    ),
    Feature("`offload_param`", WITHOUT_EFFECT, extra={"zero_offload_param": {"device": "cpu"}}),
    Feature("ZeRO++ at stage 3: `zero_hpz_partition_size`", stages=(3,), extra={"zero_zero_hpz_partition_size": 2}),
    Feature("`offload_param` at stage 3", stages=(3,), extra={"zero_offload_param": OFFLOAD}),
    Feature(
        "`offload_param` and `offload_optimizer` at stage 3",
        stages=(3,),
        extra={"zero_offload_param": OFFLOAD, "zero_offload_optimizer": OFFLOAD},
    ),
    Feature("`sub_group_size` smaller than a parameter", stages=(3,), extra={"zero_sub_group_size": 100}),
    Feature(
        "`stage3_param_persistence_threshold` = 0", stages=(3,), extra={"zero_stage3_param_persistence_threshold": 0}
    ),
    Feature(
        "`offload_optimizer.ratio` below 1 at stage 3 (Twin-Flow)",
        stages=(3,),
        extra={"zero_offload_optimizer": {**OFFLOAD, "ratio": 0.5}, "zero_sub_group_size": 50},
        way=partly_offloaded,
    ),
    Feature(
        "`offload_optimizer.device` = nvme at stage 3; low-rank states stay in host memory",
        stages=(3,),
        extra={"zero_offload_optimizer": {"device": "nvme"}},
        way=on_nvme,
        ready=operator_is_built,
    ),
    Feature(
        "the same and `offload_param.device` = nvme; reads and writes overlap (`pipeline_read`, `pipeline_write`)",
        stages=(3,),
        extra={
            "zero_offload_param": {"device": "nvme"},
            "zero_offload_optimizer": {
                "device": "nvme",
                "pipeline_read": True,
                "pipeline_write": True,
                "buffer_count": 8,
            },
        },
        way=on_nvme,
        ready=operator_is_built,
    ),
    Feature(
        "SuperOffload", REFUSED, stages=(1, 2, 3), extra={"zero_offload_optimizer": {**OFFLOAD, "super_offload": True}}
    ),
    Feature("ZenFlow", REFUSED, stages=(1, 2, 3), extra={"zero_zenflow": {}, "zero_offload_optimizer": OFFLOAD}),
    Feature("`engine.offload_states()`, `engine.reload_states()`", stages=(1, 2, 3), way=offloaded_between_steps),
    Feature("an optimizer object", stages=(0, 1, 2, 3), way=fira_object),
    Feature(
        "an optimizer object under offload",
        stages=(1, 2, 3),
        extra={"zero_offload_optimizer": OFFLOAD},
        way=fira_object,
    ),
    Feature(
        "another optimizer made of a FiraAdam's groups: DeepSpeed's own, as accelerate makes under offload",
        stages=(1, 2, 3),
        extra={"zero_offload_optimizer": OFFLOAD},
        way=object_of_accelerate,
    ),
    Feature("another optimizer made of a FiraAdam's groups: any other", REFUSED, way=replaced_object),
    *(Feature(name, SUPPORTED if good else REFUSED, stages, way=way) for name, good, stages, way in ROWS),
    Feature("`elastic_checkpoint`", stages=(1, 2, 3), extra={"zero_elastic_checkpoint": True}),
    Feature("`hybrid_engine`", stages=(0, 1, 2, 3), extra={"hybrid_engine": {"enabled": True}}, way=generating),
    Feature(
        "`torch_autocast` in bfloat16",
        stages=(0, 1, 2, 3),
        dtype="fp32",
        extra={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ),
    Feature(
        "`torch_autocast` in float16",
        stages=(0, 1, 2, 3),
        dtype="fp32",
        extra={"torch_autocast": {"enabled": True, "dtype": "float16"}},
        way=in_float16,
    ),
    Feature("`fp16.loss_scale`, static", stages=(0, 1, 2, 3), dtype="fp16", extra={"fp16": {"loss_scale": 128}}),
    Feature(
        "`fp16.loss_scale_window`: the scale grows in every step",
        stages=(0, 1, 2, 3),
        dtype="fp16",
        extra={"fp16": {"initial_scale_power": 4, "loss_scale_window": 1}},
    ),
    Feature(
        "`bf16.immediate_grad_update`",
        extra={"bf16": {"immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    Feature("`bf16.check_grad_overflow` = false", stages=(1, 2, 3), extra={"bf16": {"check_grad_overflow": False}}),
    Feature("`communication_data_type` = fp32", stages=(0, 1, 2, 3), extra={"communication_data_type": "fp32"}),
    Feature(
        "`prescale_gradients`, `gradient_predivide_factor`; `reduce_scatter` = false",
        stages=(0, 1, 2),
        dtype="fp32",
        extra={"prescale_gradients": True, "gradient_predivide_factor": 2.0, "zero_reduce_scatter": False},
    ),
    Feature(
        "`prescale_gradients` at stage 2 with `reduce_scatter`",
        REMOVED,
        stages=(2,),
        extra={"prescale_gradients": True},
    ),
    Feature(
        "`compute_grad_norm` = false, without clipping",
        extra={"zero_compute_grad_norm": False, "gradient_clipping": 0.0},
    ),
    Feature(
        "`reduce_bucket_size`, `allgather_bucket_size` smaller than a parameter",
        extra={"zero_reduce_bucket_size": 50, "zero_allgather_bucket_size": 50},
    ),
    Feature("`allgather_partitions` = false", extra={"zero_allgather_partitions": False}),
    Feature("`use_multi_rank_bucket_allreduce` = false", extra={"zero_use_multi_rank_bucket_allreduce": False}),
    Feature("`parameter_alignment`", extra={"zero_parameter_alignment": True}),
    Feature("`ignore_unused_parameters` = false", extra={"zero_ignore_unused_parameters": False}),
    Feature("`zero_allow_untested_optimizer`", top={"zero_allow_untested_optimizer": True}),
    Feature("`nn.Embedding(sparse=True)`", NEITHER, stages=(0, 1, 2, 3), way=sparse_embedding),
    *(
        Feature(f"`{name}`", REMOVED, stages=(1,), extra={name: {"enabled": True}})
        for name in (
            "amp",
            "curriculum_learning",
            "progressive_layer_drop",
            "eigenvalue",
            "quantize_training",
            "elasticity",
            "compression_training",
        )
    ),
    Feature("`sparse_gradients`", REMOVED, stages=(1,), extra={"sparse_gradients": True}),
    Feature("`mics_shard_size` (MiCS)", REMOVED, stages=(1,), extra={"zero_mics_shard_size": 2}),
    # Last: what DeepSpeed leaves of an engine that it refuses is in the way of stage 3 later in the same process.
    Feature("pipeline parallelism: `PipelineModule` of two stages", stages=(0, 1), dtype="fp32", way=pipeline),
    Feature("the same at stage 2", REMOVED, stages=(2,), dtype="fp32", way=pipeline),
]


def merged(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of features in the order of `FEATURES`, with what has been found anew of some; without others' names."""
    anew = {entry["name"] for entry in found}
    results = [entry for entry in before if entry["name"] not in anew] + found
    order = {feature.name: number for number, feature in enumerate(FEATURES)}
    return sorted((entry for entry in results if entry["name"] in order), key=lambda entry: order[entry["name"]])


def joined(features: Iterable[Feature]) -> list[Feature]:
    """The same at their last stages, those in one that a config turns on and of which none sets what another sets."""
    result: list[Feature] = []
    for feature in features:
        feature = replace(feature, stages=feature.stages[-1:])
        own = feature.extra.keys() | feature.top.keys()
        alike = ("expected", "stages", "dtype", "way")
        for place, other in enumerate(result):
            taken = own & (other.extra.keys() | other.top.keys() | {"gradient_clipping"})
            same = all(getattr(feature, key) == getattr(other, key) for key in alike)
            if same and not taken and (feature.expected, feature.way) == (SUPPORTED, try_config):
                extra, top = {**other.extra, **feature.extra}, {**other.top, **feature.top}
                result[place] = replace(other, name=f"{other.name}; {feature.name}", extra=extra, top=top)
                break
        else:
            result.append(feature)
    return result


# Experts, slices, pipelines, groups and states of parameters have tests of their own in every run. DeepCompile's AdamW
# compiles for a minute before it fails.
ELSEWHERE = (moe, tensor_parallel, pipeline, deepcompiled, *(way for *_, way in ROWS))
JOINED = joined(feature for feature in FEATURES if feature.way not in ELSEWHERE)


def try_features(chosen: list[tuple[int, int]], together: bool = False) -> list[dict[str, Any]]:
    """What became of features, by position in `FEATURES`, or `JOINED`, and stage; see `option_jobs.try_config`."""
    answers, option_jobs.TRIES_ADAMW = [], not together
    for position, stage in chosen:
        feature = (JOINED if together else FEATURES)[position]
        forget_engines()
        answers.append(feature.way(feature.ds_config(stage)))
    return answers
