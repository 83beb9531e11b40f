"""Engines with DeepSpeed's MoE layers on real ranks, and what they trained with, by names that all ranks know."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

import ds_fira
from ds_fira.core.selection import experts_of
from ds_fira.engine.deepspeed.weight_sync import check_sync
from ds_fira.tools.doctor.examine import examine
from tests.distributed.autoep_net import AutoNet
from tests.distributed.goes_on import goes_on

HIDDEN, INNER = 12, 20
# So many that each expert gets a gradient of more than the rank: what rounding makes of the rest would be no basis.
TOKENS = 128
STEPS = 7


class Expert(nn.Module):
    """Two matrices with biases, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) to the same."""
        return self.down(torch.relu(self.up(self.norm(x))))


class ExpertNet(nn.Module):
    """A dense layer, and an MoE layer for each (experts, ep_size), of which the last has PR-MoE's residual if asked."""

    def __init__(self, layers: list[tuple[int, int]], use_residual: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(5, HIDDEN, bias=False)  # which would draw all tokens to one expert
        self.layers = nn.ModuleList(
            MoE(
                HIDDEN,
                Expert(),
                num_experts=experts,
                ep_size=ep_size,
                use_rts=False,
                min_capacity=0,
                use_residual=use_residual and number == len(layers) - 1,
            )
            for number, (experts, ep_size) in enumerate(layers)
        )
        self.out = nn.Linear(HIDDEN, 7)
        for layer in self.layers:  # DeepSpeed copies one expert, and they would all learn alike
            for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                first = _ep_rank(layer.ep_size) * layer.num_local_experts
                generator = torch.Generator().manual_seed(100 + first + index)
                for param in expert.parameters():
                    param.data += 0.1 * torch.randn(param.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, 5) to a loss."""
        hidden, extra = self.embed(x), 0.0
        for layer in self.layers:
            found, auxiliary, _ = layer(hidden)
            hidden, extra = hidden + found, extra + auxiliary
        return (self.out(hidden) ** 2).float().mean() + 0.1 * extra


def _ep_rank(ep_size: int) -> int:
    return torch.distributed.get_rank() % ep_size


def parts_of(module: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """By the name of a parameter on this rank: what it has, each with its name on all ranks and its index.

    That is all of it, but of what AutoEP has put together each expert.
    """
    found = {}
    for name, param in module.named_parameters():
        experts = experts_of(param)
        if experts is not None:
            found[name] = [(f"{name}[{number}]", index) for index, number in enumerate(experts)]
            continue
        match = re.fullmatch(r"(layers\.(\d+)\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)", name)
        if match is None:
            found[name] = [(name, ...)]
            continue
        layer = module.layers[int(match[2])]
        number = _ep_rank(layer.ep_size) * layer.num_local_experts + int(match[3])
        found[name] = [(f"{match[1]}{number}{match[4]}", ...)]
    return found


def _elements(name: str, start: int, part: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, int, Tensor]]:
    """Elements of a parameter from `start` on, those of each expert of a 3-D one by its name."""
    size = math.prod(shape[-2:]) if len(shape) == 3 else None
    while size is not None and part.numel():
        number, first = divmod(start, size)
        own = part[: size - first]
        yield f"{name}[{number}]", first, own
        start, part = start + own.numel(), part[own.numel() :]
    if size is None:
        yield name, start, part


def build(ds_config: dict[str, Any], layers: list[Any], way: str = "json", frozen: float | None = None, **kwargs: Any):
    """An engine; `way` says how it gets the optimizer: "json", or "object" for one that is made of the model.

    With AutoEP in its config, `layers` are numbers of experts. A matrix of every rank's first expert is frozen with the
    value `frozen` and its rank, where that is given.
    """
    torch.manual_seed(0)
    model = AutoNet(layers) if "expert_parallel" in ds_config else ExpertNet(layers, **kwargs)
    if ds_config.get("bf16", {}).get("enabled"):
        model = model.bfloat16()
    for name, param in model.named_parameters():
        if frozen is not None and "deepspeed_experts.0.up" in name:
            param.requires_grad_(False).fill_(frozen + torch.distributed.get_rank())
    if way == "json":
        params: list[Any] = list(model.parameters())
        if ds_config["optimizer"]["type"] == "AdamW":  # whose groups are the user's to split
            trained = {"params": [param for param in params if param.requires_grad], "name": "all"}
            params = split_params_into_different_moe_groups_for_optimizer(trained)
        return deepspeed.initialize(model=model, config=ds_config, model_parameters=params)[0]
    params = ds_config["optimizer"]["params"]
    rest = {key: value for key, value in ds_config.items() if key != "optimizer"}
    return deepspeed.initialize(model=model, config=rest, optimizer=ds_fira.FiraAdam(model, **params))[0]


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Tokens (TOKENS, 5), other ones in every step and on every rank."""
    return torch.randn(TOKENS, 5, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def steps_of(engine: Any, first: int, last: int) -> list[float]:
    """Train; the losses."""
    rank, dtype = torch.distributed.get_rank(), engine.module.embed.weight.dtype
    losses = []
    for step in range(first, last):
        loss = engine(batch(step, rank, dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _names_in(name: str, shape: tuple[int, ...]) -> list[str]:
    return [f"{name}[{number}]" for number in range(shape[0])] if len(shape) == 3 else [name]


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The weights on this rank, by their names on all."""
    parts, params = parts_of(engine.module), dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {own: params[name].detach()[index].clone() for name, listed in parts.items() for own, index in listed}


def train(ds_config: dict[str, Any], layers: list[tuple[int, int]], **kwargs: Any) -> dict[str, Any]:
    """What a rank trained with: weights before and after, its own and the given gradients of steps, norms, the plan."""
    engine = build(ds_config, layers, **kwargs)
    parts, grads, norms = parts_of(engine.module), [], []
    for name, param in engine.module.named_parameters():
        param.register_hook(
            lambda grad, name=name: grads[-1].update({own: grad.detach()[index].clone() for own, index in parts[name]})
        )
    before, optimizer = weights_of(engine), engine.basic_optimizer
    shapes = {record.name: record.shape for record in optimizer.inventory}
    losses: list[float] = []
    given: list[list[tuple[str, int, Tensor]]] = []

    def see(stepped: Any, *_: Any) -> None:  # of ZeRO a call for every group
        for param in (param for group in stepped.param_groups for param in group["params"]):
            for held in optimizer.attachment.slices[param]:
                part = param.grad.reshape(-1)[held.offset : held.offset + held.stop - held.start]
                given[-1] += _elements(held.name, held.start, part.float().clone(), shapes[held.name])

    optimizer.register_step_pre_hook(see)
    for step in range(STEPS):
        grads.append({})
        given.append([])
        losses += steps_of(engine, step, step + 1)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    result = {
        "before": before,
        "after": weights_of(engine),
        "grads": grads,
        "given": given,
        "norms": norms,
        "losses": losses,
        "projected": sorted(
            name for record in optimizer.inventory if record.matrices for name in _names_in(record.name, record.shape)
        ),
        "ranked": sorted(
            own
            for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
            for name, shape in members
            if "rank" in group
            for own in _names_in(name, shape)
        ),
        "listed": sorted(own for name, shape in shapes.items() for own in _names_in(name, shape)),
        "ways": sorted(
            {matrix.way for layout in optimizer.layouts for matrix in layout.split if "expert" in matrix.name}
        ),
        "sizes": sorted({len(layout.unsplit) for layout in optimizer.layouts}),
        "groups": [(group.get("name"), group.get("moe", False), "rank" in group) for group in optimizer.param_groups],
        "metrics": ds_fira.metrics(engine),
        "held": ds_fira.memory_report(engine)["optimizer_state_bytes"],
        "formula": ds_fira.memory_report(engine)["paper_formula_bytes"],
    }
    engine.destroy()
    return result


def diagnose(ds_config: dict[str, Any], layers: list[tuple[int, int]], folder: str) -> dict[str, Any]:
    """What the doctor says of the same training before it starts, and at stage 3."""
    model, size = ExpertNet(layers), torch.distributed.get_world_size()
    file = Path(folder, f"{torch.distributed.get_rank()}.json")
    file.write_text(json.dumps(ds_config))
    found = examine(file, model, size)
    file.write_text(json.dumps({**ds_config, "zero_optimization": {"stage": 3}}))
    return {
        "refusals": found.refusals,
        "held": list(found.state_bytes),
        "formula": found.formula_bytes,
        "notes": found.notes,
        "at stage 3": examine(file, model, size).refusals,
    }


def run(
    ds_config: dict[str, Any],
    layers: list[tuple[int, int]],
    steps: tuple[int, int],
    load: str | None = None,
    save: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """A run as `goes_on` makes it, of an engine that `build` makes of the other arguments."""
    engine = build(ds_config, layers, **kwargs)
    try:
        return goes_on(engine, steps_of, weights_of, (*steps, STEPS), load, save)
    finally:
        engine.destroy()


def tell(ds_config: dict[str, Any], layers: list[tuple[int, int]]) -> dict[str, Any]:
    """The steps at which factors were recorded, by weight; and what a flipped bit of an expert on rank 1 gives."""
    engine = build(ds_config, layers)
    steps_of(engine, 0, STEPS)
    result: dict[str, Any] = {"factors": {name: one["steps"] for name, one in ds_fira.scaling_factors(engine).items()}}
    if torch.distributed.get_rank() == 1:
        first = engine.module.layers[0]
        weight = (
            first.experts.w1
            if isinstance(engine.module, AutoNet)
            else first.deepspeed_moe.experts.deepspeed_experts[1].up.weight
        )
        with torch.no_grad():
            weight.view(-1)[0] += 1
    try:
        check_sync(engine)
        result["message"] = ""
    except RuntimeError as error:
        result["message"] = str(error)
    engine.destroy()
    return result


def refusals(ds_config: dict[str, Any]) -> list[str]:
    """What is said of experts that DeepSpeed would mix up, and of an optimizer whose groups a scheduler holds."""
    layers, found = [(2, 2)], []
    wrong = {**ds_config, "zero_optimization": {"stage": 1, "contiguous_gradients": False}}
    models = [ExpertNet(layers) for _ in range(3)]
    models[2].layers[0].deepspeed_moe.experts.deepspeed_experts[0].up.weight.requires_grad = False
    rest = {key: value for key, value in ds_config.items() if key != "optimizer"}
    optimizer = ds_fira.FiraAdam(models[1], **ds_config["optimizer"]["params"])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for arguments in (
        {"model": models[0], "config": wrong, "model_parameters": list(models[0].parameters())},
        {"model": models[2], "config": ds_config, "model_parameters": list(models[2].parameters())},
        {"model": models[1], "config": rest, "optimizer": optimizer},
    ):
        try:
            deepspeed.initialize(**arguments)
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found
