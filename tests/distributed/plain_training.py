"""Train with torch's AdamW in DeepSpeed: `python plain_training.py imported|alone PORT FOLDER` prints what came out.

`imported` imports this package first. At several stages and dtypes a run trains, saves and is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator

# Stage, dtype, and how DeepSpeed gets the optimizer.
RUNS = [(0, "float32", "object"), (0, "float16", "object"), (2, "float16", "function"), (3, "bfloat16", "object")]
STEPS = 4


def build(stage: int, dtype: str, given: str) -> deepspeed.DeepSpeedEngine:
    """An engine of one small model; in fp16 its loss scale grows every third step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).to(getattr(torch, dtype))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 6, "loss_scale_window": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
    }

    def make(params: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(params, lr=0.02)

    params = list(model.parameters())
    optimizer = make if given == "function" else make(params)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer, model_parameters=params)[0]


def train(engine: deepspeed.DeepSpeedEngine, seed: int) -> list[object]:
    """Losses, a digest of the weights, steps and the loss scale."""
    torch.manual_seed(seed)
    losses = []
    for _ in range(2 * STEPS):
        loss = engine(torch.randn(2, 6, dtype=engine.module[0].weight.dtype)).float().square().mean()
        losses.append(engine.backward(loss, scale_wrt_gas=True).item())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = b"".join(
            p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in engine.module.parameters()
        )
    scaler = getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)
    return [losses, hashlib.sha256(weights).hexdigest(), engine.global_steps, getattr(scaler, "cur_scale", None)]


def main(how: str, port: str, folder: str) -> None:
    """Print one line of JSON."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if how == "imported":
        import ds_fira  # noqa: F401
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True
    found: list[object] = []
    for stage, dtype, given in RUNS:
        saved = Path(folder, f"{stage}_{dtype}")
        engine = build(stage, dtype, given)
        found.append(train(engine, 1))
        engine.save_checkpoint(str(saved), client_state={"mine": 1})
        engine.destroy()
        engine = build(stage, dtype, given)
        path, client_state = engine.load_checkpoint(str(saved))
        found.append([Path(path).relative_to(folder).as_posix(), sorted(client_state), *train(engine, 2)])
        engine.destroy()
    found.append(sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
