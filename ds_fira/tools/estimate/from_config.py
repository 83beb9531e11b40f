"""The setup that a DeepSpeed configuration describes."""

from __future__ import annotations

from collections.abc import Mapping

from ds_fira.tools.estimate.setup import REDUCE_BUCKET_SIZE, Setup


def setup_of(config: Mapping[str, object], *, gpus: int, seq_length: int, activation_checkpointing: bool) -> Setup:
    """Read a DeepSpeed configuration.

    Args:
        config: without "auto" values, and with `train_micro_batch_size_per_gpu`.
        gpus: data-parallel ranks.
        seq_length: tokens in a sequence.
        activation_checkpointing: whether layers are computed again in the backward pass.

    Raises:
        ValueError: as `Setup`.
    """
    zero, bf16, fp16 = (config.get(name) or {} for name in ("zero_optimization", "bf16", "fp16"))
    dtype = "bf16" if bf16.get("enabled") else "fp16" if fp16.get("enabled") else "fp32"
    low_precision_masters = bf16.get("bf16_master_weights_and_grads") or fp16.get("fp16_master_weights_and_grads")
    return Setup(
        gpus=gpus,
        zero_stage=zero.get("stage", 0),
        dtype=dtype,
        master_weights="bf16" if low_precision_masters else "fp32",
        accumulation_dtype=(config.get("data_types") or {}).get("grad_accum_dtype"),
        offload=((zero.get("offload_optimizer") or {}).get("device") or "none") != "none",
        reduce_bucket_size=int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)),
        overlap_comm=bool(zero.get("overlap_comm")),
        batch_size=config["train_micro_batch_size_per_gpu"],
        seq_length=seq_length,
        activation_checkpointing=activation_checkpointing,
    )
