"""Settings and versions of DeepSpeed that are not supported: each is refused in one sentence, before training begins.

docs/compatibility.md lists what is supported and what is refused; `python -m tests.compatibility.matrix` writes it from
a run.
"""

from __future__ import annotations

import functools
import warnings

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups
from packaging.version import Version
from torch import nn

from ds_fira.core.algorithms import Algorithm
from ds_fira.optim.expert_groups import ALL_ALIKE, keys_of

# DeepSpeed releases of three minors that the tests run with: ds_fira reads private attributes, which may change between
# them. 0.18.8 and 0.18.9 fail in a step of stage 2 under torch 2.13, with torch's AdamW too. `bash
# launch/test_versions.sh` runs with each.
TESTED = ("0.17.6", "0.18.4", "0.19.8")

# Options of ZeRO++ and parameter offload: DeepSpeed reads them at stage 3 only, and says nothing at the others.
STAGE_3_ONLY = {
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zero_hpz_partition_size": 1,
}
REMOVE = "remove it"
# The same of offload: the block, its device, what to do instead.
DEVICES_OF_STAGE_3 = (
    ("offload_optimizer", "nvme", "use device = 'cpu'"),
    ("offload_param", "cpu", REMOVE),
    ("offload_param", "nvme", REMOVE),
)


def is_tested(version: str) -> bool:
    """Whether a DeepSpeed version is of a minor release that is tested, and no newer than the one tested."""
    found = Version(version)
    return any(found.release[:2] == Version(tested).release[:2] and found <= Version(tested) for tested in TESTED)


@functools.cache
def warn_if_untested(version: str, name: str) -> None:
    """Warn, once, of a DeepSpeed version that is not tested.

    Args:
        version: of DeepSpeed.
        name: of the optimizer.
    """
    if not is_tested(version):
        warnings.warn(
            f"{name}: DeepSpeed {version} is not among the tested versions {', '.join(TESTED)}, whose internals "
            'ds_fira reads; if something is off, use one of them: pip install "deepspeed==' + TESTED[-1] + '".',
            stacklevel=2,
        )


def warn_of_state_dtype(engine: DeepSpeedEngine, name: str) -> None:
    """Warn where DeepSpeed's setting for the states of its own Adam is on, and ours for low-rank states is not given.

    Args:
        engine: its config has been read.
        name: of the optimizer, which the config names.
    """
    wanted = _at(engine._config, "bfloat16_config.bf16_optimizer_states")
    if wanted and "state_dtype" not in (engine.optimizer_params() or {}):
        warnings.warn(
            f"{name}: bf16.bf16_optimizer_states = True is about DeepSpeed's own Adam, and states are kept in float32; "
            "set state_dtype in optimizer.params to 'bfloat16', or to 'float32' to keep them so.",
            stacklevel=2,
        )


def refuse_unsupported(engine: DeepSpeedEngine, name: str) -> None:
    """Stop before the engine does any work if low-rank states do not support its config.

    Args:
        engine: its config has been read.
        name: of the optimizer.

    Raises:
        ValueError: names the setting, its value and what to use instead.
    """
    for sentence in unsupported_settings(engine, name):
        raise ValueError(sentence)


def unsupported_settings(engine: DeepSpeedEngine, name: str) -> list[str]:
    """Everything in an engine's config that low-rank states do not support, a sentence each.

    Args:
        engine: its config has been read.
        name: of the optimizer.
    """
    refused = {**_refused(engine, name), **_without_effect(engine), **_refused_before_0_19(engine)}
    refused |= _refused_with_autotp(engine)
    return [f"{name}: {sentence}" for sentence, is_set in refused.items() if is_set]


def _refused(engine: DeepSpeedEngine, name: str) -> dict[str, object]:
    """By sentence, whether a setting is on that is not supported."""
    config, zero, stage = engine._config, engine._config.zero_config, engine.zero_optimization_stage()
    pipeline, (dtype, _) = isinstance(engine, PipelineEngine), engine.get_data_types()
    mpu_size = _model_parallel_size(engine.mpu)
    return {
        # Of bf16 the wrapper is that of stage 1; that of fp16 sums norms over the stages group by group.
        f"zero_optimization.stage = 0 is not supported with {str(dtype)[6:]} in a PipelineModule; set it to 1, which "
        "takes less memory and sends no more.": pipeline and stage == 0 and dtype != torch.float32,
        "tensor_parallel.autotp_size above 1 is not supported in a PipelineModule, whose stages would hold slices of "
        "different layers; set it to 1.": pipeline and engine.autotp_size() > 1,
        f"an mpu with tensor parallelism of size {mpu_size} is not supported, because its parameters do not say which "
        "slice of which matrix they are; give none, and set tensor_parallel.autotp_size.": mpu_size > 1,
        "zero_optimization.zenflow is not supported, because it steps its own Adam; remove it.": zero.zenflow,
        "zero_optimization.offload_optimizer.super_offload = True is not supported, because it steps its own Adam on "
        "the CPU; set it to false.": _at(zero, "offload_optimizer.super_offload"),
        f"compile.deepcompile = True is not supported at stage {stage}, because its passes run on CUDA alone, where "
        f"{name} has not trained with them; set it to false and call engine.compile().": stage > 0
        and config.compile_config.deepcompile,
        # Apex was removed in 0.19.
        "amp.enabled = True is not supported; use the bf16 or the fp16 block.": _at(config, "amp_enabled"),
    }


def _refused_with_autotp(engine: DeepSpeedEngine) -> dict[str, object]:
    """By sentence, whether a setting is on that AutoTP's slices of matrices exclude."""
    size, version = engine.autotp_size(), deepspeed.__version__
    setting, optimizer = f"tensor_parallel.autotp_size = {size}", engine.client_optimizer
    recorder = getattr(optimizer, "recorder", None)
    recorded = (engine.optimizer_params() or {}).get("record_scaling_factors") if optimizer is None else recorder
    if size <= 1:
        return {}
    return {
        f"{setting} is supported from DeepSpeed 0.19 on, and this is {version}; set it to 1, or use DeepSpeed "
        "0.19.": Version(version) < Version("0.19"),
        f"record_scaling_factors is not supported with {setting}; set it to 0.": recorded,
    }


def _without_effect(engine: DeepSpeedEngine) -> dict[str, object]:
    """By sentence, whether a setting is on that DeepSpeed ignores below stage 3, and says nothing."""
    zero, stage = engine._config.zero_config, engine.zero_optimization_stage()
    settings = [(name, getattr(zero, name), getattr(zero, name) != off, REMOVE) for name, off in STAGE_3_ONLY.items()]
    settings += [
        (f"{block}.device", repr(device), _at(zero, f"{block}.device") == device, remedy)
        for block, device, remedy in DEVICES_OF_STAGE_3
    ]
    return {
        f"zero_optimization.{name} = {value} has no effect at stage {stage}, since DeepSpeed reads it at stage 3 only; "
        f"{remedy}.": stage < 3 and is_set
        for name, value, is_set, remedy in settings
    }


def _refused_before_0_19(engine: DeepSpeedEngine) -> dict[str, object]:
    """By sentence, whether a setting is on with which older DeepSpeed gave wrong gradients on two ranks, or failed."""
    version, stage = deepspeed.__version__, engine.zero_optimization_stage()
    if Version(version) >= Version("0.19"):
        return {}
    zero, (dtype, accumulated) = engine._config.zero_config, engine.get_data_types()
    wrong = {
        "bf16.enabled = True at stage 0": stage == 0 and dtype == torch.bfloat16,
        f"data_types.grad_accum_dtype = {engine._config.grad_accum_dtype!r}": dtype != accumulated,
        "zero_optimization.contiguous_gradients = False": stage > 0 and not zero.contiguous_gradients,
        "zero_optimization.reduce_scatter = False": stage > 0 and not zero.reduce_scatter,
    }
    return {
        f"zero_optimization.stage = 3 is supported from DeepSpeed 0.19 on, and this is {version}; use stage 2, or "
        "DeepSpeed 0.19.": stage == 3,
        **{
            f"{setting} is not supported with DeepSpeed {version}, which gives wrong gradients with it; change the "
            "setting, or use DeepSpeed 0.19.": is_set
            for setting, is_set in wrong.items()
        },
    }


def refuse_unsupported_module(engine: DeepSpeedEngine, name: str) -> None:
    """Stop if the engine's module gives gradients that have no low-rank form here.

    Args:
        engine: has its module.
        name: of the optimizer.

    Raises:
        ValueError: the module has sparse embeddings, complex parameters, or experts that DeepSpeed would mix up.
    """
    module = engine.module
    _refuse_mixed_experts(engine, name)
    experts = [path for path, param in module.named_parameters() if keys_of(param)]
    if experts and isinstance(engine, PipelineEngine):
        raise ValueError(
            f"{name}: {experts[0]} is of a DeepSpeed MoE layer, which is not supported inside a PipelineModule; build "
            "the model as another module."
        )
    for path, submodule in module.named_modules():
        if isinstance(submodule, nn.Embedding | nn.EmbeddingBag) and submodule.sparse:
            raise ValueError(f"{name}: {path}.sparse = True gives sparse gradients; build it with sparse=False.")
    for path, param in module.named_parameters():
        if param.is_complex():
            raise ValueError(f"{name}: {path} has dtype {param.dtype}; keep it as real numbers (torch.view_as_real).")


def _refuse_mixed_experts(engine: DeepSpeedEngine, name: str) -> None:
    """Stop where DeepSpeed takes experts for the same that ranks hold under one name, whatever the optimizer."""
    stage, own = engine.zero_optimization_stage(), (None, ALL_ALIKE)
    apart = [each for each in engine.module.named_parameters() if keys_of(each[1]).get("name") not in own]
    frozen = [path for path, param in apart if not param.requires_grad]
    # stage_1_and_2.py, `buffered_reduce_fallback`: sums over all ranks. At stage 2 DeepSpeed refuses it itself.
    if apart and stage == 1 and not engine.zero_contiguous_gradients():
        raise ValueError(
            f"{name}: zero_optimization.contiguous_gradients = False is not supported with ep_size > 1, because "
            f"DeepSpeed then sums the gradients of different experts, as of {apart[0][0]}; remove it."
        )
    # engine.py, `frozen_param_fragments`: from stage 2 on the first rank's, by its names.
    parts = [path for path, param in engine.module.named_parameters() if keys_of(param) and not param.requires_grad]
    if parts and stage == 3:  # engine.py, `_save_moe_checkpoint`: it would stop the first save
        raise ValueError(
            f"{name}: zero_optimization.stage = 3 is not supported with frozen experts, as of {parts[0]}, which "
            "DeepSpeed does not save there; use stage 1, or let them train."
        )
    if frozen and stage == 2:
        raise ValueError(
            f"{name}: zero_optimization.stage = 2 is not supported with frozen experts and ep_size > 1, because "
            f"DeepSpeed then loads those of the first rank on every rank, as of {frozen[0]}; use stage 1, or let them "
            "train."
        )


def refuse_sharding(algorithm: Algorithm, unprojected: bool, stage: int) -> None:
    """Stop if ZeRO would take apart what the algorithm's rule has to see whole.

    Args:
        algorithm: of the optimizer.
        unprojected: whether it trains anything that is not projected.
        stage: of ZeRO.

    Raises:
        ValueError: names the rule and what to use instead.
    """
    setting = f"zero_optimization.stage = {stage}" if stage else "tensor_parallel.autotp_size > 1"
    if algorithm.rule is not None and not algorithm.rule.elementwise and unprojected:
        raise ValueError(
            f"{algorithm.name}: {setting} takes the parameters that are not projected apart, and "
            f"{algorithm.rule.__name__}.elementwise = False says that they cannot be; use stage 0 without AutoTP, or "
            "train only projected parameters."
        )


def _model_parallel_size(mpu: object) -> int:
    # DeepSpeed's own mpu for Ulysses calls its sequence-parallel group the model-parallel one too, and AutoTP's is a
    # module of DeepSpeed.
    if hasattr(mpu, "initialize_sequence_parallel") or mpu is groups:
        return 1
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


def _at(block: object, path: str) -> object:
    """A setting below a block of the config by its path; None where the block, or this release, has none."""
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), block)
