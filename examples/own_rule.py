"""Fira around an optimizer of your own: a rule of a few lines (here Lion's), in a DeepSpeed loop with a JSON config.

    python examples/own_rule.py                                            # one process, GPU or CPU
    deepspeed --num_gpus 2 examples/own_rule.py
    torchrun --standalone --nproc_per_node 2 examples/own_rule.py --steps 500 --stage 3

`ds_fira.plug` brings the subspaces, the residual and its limiter, ZeRO's sharding and checkpoints;
docs/plug_and_play.md says what a rule may do. The loop is DeepSpeed's own, and the same for `"type": "FiraAdam"`.
"""

from __future__ import annotations

import argparse
import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

import ds_fira


class Lion(ds_fira.Rule):
    """The sign of a momentum (Chen et al., 2023, Algorithm 2): one state, and every element of a step of one size."""

    beta1: float = 0.9  # hyper-parameters: settings of the optimizer, in the JSON and as keywords
    beta2: float = 0.99
    states: ClassVar = {"momentum": "first"}  # linear in the gradient, so that a refresh can rotate it
    elementwise: ClassVar = True  # each element depends on its own gradient and state alone: ZeRO may cut a matrix

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """The step before its size; `grad` and `states` are of the projected matrix's shape, or of a parameter's."""
        momentum = states["momentum"]
        direction = momentum.mul(self.beta1).add_(grad, alpha=1 - self.beta1).sign_()
        momentum.mul_(self.beta2).add_(grad, alpha=1 - self.beta2)
        return direction


FiraLion = ds_fira.plug(Lion)
ds_fira.register(FiraLion)  # now "type": "FiraLion" is an optimizer of DeepSpeed's


def configuration(options: argparse.Namespace) -> dict[str, object]:
    """The DeepSpeed config, as it would stand in a JSON file."""
    return {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage},
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "FiraLion",
            "params": {"lr": options.lr, "rank": options.rank, "alpha": 0.25, "update_proj_gap": 50, "beta2": 0.98},
        },
    }


def main() -> None:
    """Train a small network to predict another one's outputs."""
    parser = argparse.ArgumentParser(description="Train with Fira around Lion under DeepSpeed.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="of ZeRO")
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--rank", type=int, default=8, help="of the projection")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    options = parser.parse_args()

    ds_fira.init_distributed()  # then DeepSpeed: it may be imported before or behind ds_fira
    import deepspeed
    import deepspeed.comm as dist

    torch.manual_seed(0)  # the same teacher and the same start on every rank
    teacher, model = (nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)) for _ in range(2))
    try:
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configuration(options))[
            0
        ]
    except ValueError as error:  # a wrong setting: the same sentence on every rank
        ds_fira.shutdown()
        print(f"own_rule.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    teacher = teacher.to(engine.device, torch.bfloat16)
    torch.manual_seed(1 + dist.get_rank())  # other samples on every rank
    for step in range(1, options.steps + 1):
        inputs = torch.randn(options.batch_size, 64, device=engine.device, dtype=torch.bfloat16)
        with torch.no_grad():
            wanted = teacher(inputs)
        loss = nn.functional.mse_loss(engine(inputs).float(), wanted.float())
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0 and (step % 20 == 0 or step == options.steps):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)

    figures, memory = ds_fira.metrics(engine), ds_fira.memory_report(engine)  # collective calls: on every rank
    if dist.get_rank() == 0:
        print(
            f"{figures['projected_matrices']} projected matrices, {figures['refreshes']} bases computed, "
            f"{max(memory['optimizer_state_bytes']):,} bytes of state on the fullest rank"
        )
    ds_fira.shutdown(engine)


if __name__ == "__main__":
    main()
