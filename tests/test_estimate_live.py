"""The estimate agrees with the bytes that live DeepSpeed engines hold, category by category."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_fira.estimate import Setup, estimate
from tests.distributed import Pools

BOUND = 0.05
RANK = 64
BUCKET = 200_000
CATEGORIES = ("parameters", "gradients", "master_weights", "optimizer_states")
# Three layers: on two ranks one of the three down projections is cut.
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1500,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
Case = tuple[str, dict[str, Any], dict[str, Any]]
STAGES: list[Case] = [
    (method, {"zero_stage": stage, "dtype": "bf16"}, {}) for method in ("AdamW", "Fira") for stage in (0, 1, 2)
]
MORE: list[Case] = [
    ("Fira", {"zero_stage": 2, "dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 1, "dtype": "fp16"}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16", "master_weights": "bf16"}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "bf16", "master_weights": "bf16"}, {}),
    ("Fira", {"zero_stage": 1, "dtype": "bf16", "accumulation_dtype": "fp32"}, {}),
    ("AdamW", {"zero_stage": 2, "dtype": "bf16", "accumulation_dtype": "fp32"}, {}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16"}, {"state_dtype": "int8"}),
    ("Fira", {"zero_stage": 0, "dtype": "bf16"}, {"state_dtype": "bfloat16"}),
    ("Fira", {"zero_stage": 2, "dtype": "bf16", "offload": True}, {}),
    ("AdamW", {"zero_stage": 1, "dtype": "bf16", "offload": True}, {}),
    ("LoRA", {"zero_stage": 2, "dtype": "bf16"}, {}),
]


def ds_config(method: str, setup: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    if method == "Fira":
        optimizer = {"type": "FiraAdam", "params": {"lr": 1e-3, "rank": RANK, "subspace": "randomized", **params}}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": optimizer,
        "zero_optimization": {"stage": setup["zero_stage"], "reduce_bucket_size": BUCKET},
    }
    if setup["dtype"] != "fp32":
        config[setup["dtype"]] = {"enabled": True}
    if setup.get("master_weights") == "bf16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if "accumulation_dtype" in setup:
        config["data_types"] = {"grad_accum_dtype": setup["accumulation_dtype"]}
    if setup.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


@pytest.mark.parametrize(("world_size", "cases"), [(1, STAGES), (2, STAGES + MORE)], ids=["1 rank", "2 ranks"])
def test_estimate_agrees_with_live_engines(ranks: Pools, tmp_path: Path, world_size: int, cases: list[Case]) -> None:
    """Each category and their sum within 5% on every rank, and no tensors beside them that the estimate leaves out."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(MODEL))
    measured = ranks.run(
        world_size,
        "measure",
        module="tests.estimate_jobs",
        cases=[(ds_config(*case), RANK if case[0] == "LoRA" else None) for case in cases],
        config_file=str(model),
    )
    rows = []
    for index, (method, setup, params) in enumerate(cases):
        full = Setup(gpus=world_size, reduce_bucket_size=BUCKET, **setup)
        found = estimate(model, full, rank=RANK, **params).methods[method]
        for dp_rank in range(world_size):
            memory = found.by_rank[dp_rank if full.sharded else 0]
            live = measured[dp_rank][index]
            where = f"{method} {setup} {params} on rank {dp_rank} of {world_size}"
            own = {name: getattr(memory.device, name) + getattr(memory.host, name) for name in CATEGORIES}
            for name in CATEGORIES:
                assert own[name] == pytest.approx(live[name], rel=BOUND), f"{name}: {where}"
            total = sum(live[name] for name in CATEGORIES)
            assert sum(own.values()) == pytest.approx(total, rel=BOUND), where
            # Everything that the process holds: nothing else of size, but the buffers.
            most = sum(own.values()) + memory.device.backward_buffers + memory.host.backward_buffers
            assert live["all"] <= (1 + BOUND) * most, where
            if setup["zero_stage"] != 1:  # ZeRO-1 has given gradients up by then
                assert live["all"] >= (1 - BOUND) * sum(own.values()), where
            rows.append((where, *(f"{name} {own[name]} {live[name]}" for name in CATEGORIES)))
    print(*rows, sep="\n")
