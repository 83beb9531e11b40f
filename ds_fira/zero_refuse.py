"""What of DeepSpeed FiraAdam does not support: refused before training, on every rank, with one sentence."""

from __future__ import annotations

from typing import Any

from torch import nn


def refuse_unsupported(engine: Any) -> None:
    """Stop before the engine does any work if FiraAdam does not support its config.

    Raises:
        ValueError: names the setting, its value and what to use instead.
    """
    _refuse_offload(engine._config.zero_config)
    if engine.pipeline_parallelism:
        raise ValueError(
            f"FiraAdam: {type(engine).__name__} is not supported yet, because its stages hold different layers; give "
            "deepspeed.initialize a module that is no PipelineModule and use ZeRO stage 1 or 2."
        )
    tensor_parallel = max(engine.autotp_size(), _model_parallel_size(engine.mpu))
    if tensor_parallel > 1:
        raise ValueError(
            f"FiraAdam: tensor parallelism of size {tensor_parallel} (tensor_parallel.autotp_size, or an mpu) is not "
            "supported yet, because a rank would see a part of every matrix; set it to 1."
        )
    if engine.zero_elastic_checkpoint():
        raise ValueError(
            "FiraAdam: zero_optimization.elastic_checkpoint = True is not supported, because it gives every rank rank "
            "0's low-rank state on loading; set it to false."
        )
    if engine._config.zero_config.zenflow is not None:
        raise ValueError(
            "FiraAdam: zero_optimization.zenflow is not supported, because it steps its own Adam; remove it."
        )


def _refuse_offload(zero: Any) -> None:
    """Stop where DeepSpeed would keep, or step, FiraAdam's states in ways that know only AdamW's."""
    optimizer, params = zero.offload_optimizer, zero.offload_param
    for block, found in (("offload_optimizer", optimizer), ("offload_param", params)):
        if found is not None and found.device == "nvme":
            raise ValueError(
                f"FiraAdam: zero_optimization.{block}.device = 'nvme' is not supported yet, because low-rank states "
                "are not swapped; use 'cpu'."
            )
    if optimizer is not None and optimizer.super_offload:
        raise ValueError(
            "FiraAdam: zero_optimization.offload_optimizer.super_offload = True is not supported, because it steps its "
            "own Adam; set it to false."
        )
    if optimizer is not None and zero.stage == 3 and optimizer.ratio != 1.0:
        raise ValueError(
            f"FiraAdam: zero_optimization.offload_optimizer.ratio = {optimizer.ratio} is not supported, because the "
            "part that stays on the GPU is stepped by torch's AdamW; set it to 1.0."
        )


def refuse_unsupported_module(module: nn.Module, has_moe_layers: bool) -> None:
    """Stop if the module gives gradients that FiraAdam cannot take.

    Raises:
        ValueError: the module has sparse embeddings, complex parameters or DeepSpeed MoE layers.
    """
    if has_moe_layers:
        raise ValueError(
            "FiraAdam: DeepSpeed MoE layers are not supported yet, because their experts have process groups of their "
            "own; use a dense model, or one whose experts are ordinary parameters, such as transformers' Mixtral."
        )
    for name, submodule in module.named_modules():
        if isinstance(submodule, nn.Embedding | nn.EmbeddingBag) and submodule.sparse:
            raise ValueError(f"FiraAdam: {name}.sparse = True gives sparse gradients; build it with sparse=False.")
    for name, param in module.named_parameters():
        if param.is_complex():
            raise ValueError(f"FiraAdam: {name} has dtype {param.dtype}; keep it as real numbers (torch.view_as_real).")


def _model_parallel_size(mpu: Any) -> int:
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1
