"""What the ranks of a test pool run to see whether drifting weights are found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_fira.engine.deepspeed import tensor_hash, weight_sync
from tests.distributed.zero_jobs import Net, batches, build


def train_with_flip(
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    steps: int,
    flip: tuple[int, int, str] | None,
    default: int | None = None,
) -> tuple[int, str, list[int], int]:
    """Train with a frozen embedding, and flip the lowest bit of one weight on one rank, as a broken memory would.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        steps: optimizer steps.
        flip: in which step, counted from 1 and when its new weights are there, on which rank, the first element of
            which parameter; "master" is stage 0's copy of the first. None for no flip.
        default: steps between two comparisons at stage 0 where none are given; None for what the package has.

    Returns:
        Steps made without an error, the error's text, the steps at which hashes were compared, and the collectives
        that FiraAdam counts.
    """
    weight_sync.DEFAULT, usual = default or weight_sync.DEFAULT, weight_sync.DEFAULT
    torch.manual_seed(0)
    model = Net(shapes)
    model.embedding.weight.requires_grad_(False)
    engine = build(ds_config, shapes, model=model)
    optimizer = engine.basic_optimizer
    combine, make_step = tensor_hash.combine, engine.optimizer.step
    compared: list[int] = []

    def counted(hashes: Tensor) -> Tensor:
        compared.append(engine.global_steps)
        return combine(hashes)

    def step_and_flip() -> None:
        make_step()
        if flip is not None and flip[:2] == (engine.global_steps + 1, torch.distributed.get_rank()):
            named = dict(engine.module.named_parameters())
            weight = optimizer.param_groups[0]["params"][0] if flip[2] == "master" else named[flip[2]]
            weight.data.view({2: torch.int16, 4: torch.int32}[weight.element_size()]).view(-1)[0] ^= 1

    tensor_hash.combine, engine.optimizer.step = counted, step_and_flip
    raised = ""
    try:
        for tokens in batches(steps, torch.distributed.get_rank()):
            engine.backward(engine(tokens))
            engine.step()
    except RuntimeError as error:
        raised = str(error)
    finally:
        tensor_hash.combine, weight_sync.DEFAULT = combine, usual
        del engine.optimizer.step
    done, collectives = engine.global_steps, optimizer.communicator.collectives
    engine.destroy()
    return done, raised, compared, collectives
