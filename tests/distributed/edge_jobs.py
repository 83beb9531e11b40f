"""What ranks run for tests/distributed/test_edges.py."""

from __future__ import annotations

import warnings

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import ds_fira
from tests.distributed.zero_jobs import Net, batches, build, config

SHAPES = [(6, 8)]


def train_with_an_empty_weight(stages: list[int]) -> list[list[float]]:
    """Losses of a model with a 0 x 6 weight, FiraAdam from the JSON and, at stage 0, as an object."""
    found = []
    for stage, as_object in [(stage, False) for stage in stages] + [(0, True)]:
        torch.manual_seed(0)
        model = Net(SHAPES)
        model.unused = nn.Linear(6, 0, bias=False)
        ds_config, kwargs = config(stage, "fp32", {"lr": 0.01, "rank": 2, "update_proj_gap": 2}), {}
        if as_object:
            del ds_config["optimizer"]
            kwargs["optimizer"] = ds_fira.FiraAdam(model, rank=2)
        engine, losses = build(ds_config, SHAPES, model=model, **kwargs), []
        for batch in batches(3, torch.distributed.get_rank()):
            loss = engine(batch) + engine.module.unused(torch.ones(6)).sum()
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        engine.destroy()
        found.append(losses)
    return found


def thaw(stages: list[int], thawed: bool) -> list[str]:
    """What a step says once a layer has gradients that had none when the engine was built, at every stage."""
    told = []
    for stage in stages:
        torch.manual_seed(0)
        model = Net([*SHAPES, (5, 6)])
        name, frozen = list(model.named_parameters())[-1]
        frozen.requires_grad_(False)
        before = frozen.detach().clone()
        ds_config = config(stage, "fp32", {"lr": 0.01, "rank": 2, "update_proj_gap": 2})
        engine, told_here = build(ds_config, SHAPES, model=model), "trained"
        for step, batch in enumerate(batches(3, torch.distributed.get_rank())):
            frozen.requires_grad_(thawed and step == 1)
            engine.backward(engine(batch))
            try:
                engine.step()
            except (ValueError, RuntimeError) as error:
                told_here = str(error).replace(name, "NAME")
                break
        if stage < 3 and not torch.equal(before, frozen.detach()):
            told_here = "changed"
        engine.destroy()
        told.append(told_here)
    return told


class Convolved(nn.Module):
    """Has no linear weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.convolution = nn.Embedding(11, 4), nn.LayerNorm(4), nn.Conv1d(4, 3, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of tokens, (batch, length)."""
        return self.convolution(self.norm(self.embedding(tokens)).mT).square().mean()


def tokens_of(step: int, rank: int) -> torch.Tensor:
    """Tokens of a step on a rank."""
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def train_without_linear_weights(stages: list[int], preset: str | None) -> list[tuple[list[str], list[torch.Tensor]]]:
    """Of every stage what was warned of, and the weights after three steps."""
    found = []
    for stage in stages:
        torch.manual_seed(0)
        params = {"rank": 2, "preset": preset} if preset else {"rank": 2, "lr": 0.01}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = build(config(stage, "fp32", params), SHAPES, model=Convolved())
        for step in range(3):
            engine.backward(engine(tokens_of(step, torch.distributed.get_rank())))
            engine.step()
        weights = [
            safe_get_full_fp32_param(param).clone() if stage else param.detach().clone()
            for param in engine.module.parameters()
        ]
        found.append(([str(one.message) for one in caught if "linear weight" in str(one.message)], weights))
        engine.destroy()
    return found
