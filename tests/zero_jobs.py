"""What the ranks of a test pool run: small trainings through a real DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import ds_fira
from ds_fira.zero import fira_of


class Net(nn.Module):
    """Linear layers of given shapes (out, in), each with its own input, an embedding, a norm and a head."""

    def __init__(self, shapes: list[tuple[int, int]], vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        loss = nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), tokens.flatten())
        for layer in self.layers:
            repeats = -(-layer.in_features // hidden.shape[-1])
            wide = hidden.repeat(1, 1, repeats)[..., : layer.in_features]
            loss = loss + torch.tanh(layer(wide)).square().mean()
        return loss


def config(stage: int, dtype: str, params: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """A DeepSpeed config; `zero_*` in extra go to zero_optimization, the rest to the top."""
    zero = {key.removeprefix("zero_"): value for key, value in extra.items() if key.startswith("zero_")}
    top = {key: value for key, value in extra.items() if not key.startswith("zero_")}
    result = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "FiraAdam", "params": params},
        "zero_optimization": {"stage": stage, **zero},
    }
    if dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if dtype == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    for key, value in top.items():
        result[key] = {**result[key], **value} if isinstance(result.get(key), dict) else value
    return result


def build(ds_config: dict[str, Any], shapes: list[tuple[int, int]], seed: int = 0, **kwargs: Any):
    """A DeepSpeed engine around `Net`, the same on every rank."""
    torch.manual_seed(seed)
    model = kwargs.pop("model", None) or Net(shapes)
    if ds_config.get("bf16", {}).get("enabled"):
        model = model.bfloat16()
    if ds_config.get("fp16", {}).get("enabled"):
        model = model.half()
    if "model_parameters" not in kwargs and "optimizer" not in kwargs:
        kwargs["model_parameters"] = list(model.parameters())
    return deepspeed.initialize(model=model, config=ds_config, **kwargs)[0]


def batches(steps: int, rank: int, seed: int = 1) -> list[Tensor]:
    """Token batches (2, 5), different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randint(0, 11, (2, 5), generator=generator) for _ in range(steps)]


def train(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, same_data: bool = False
) -> dict[str, Any]:
    """Train, recording the flat gradients FiraAdam sees.

    Returns:
        `gradients`: per step, by group, this rank's flat gradient; `start` and `weights`: this rank's flat master
        weights by group before and after; `state`: FiraAdam's state by group; `groups`: by group the settings and the
        (name, shape, offset) of its parameters in the whole buffer; `losses`; `bytes_sent`; `metrics`; `memory`.
    """
    engine = build(ds_config, shapes)
    optimizer = fira_of(engine)
    params = [group["params"][0] for group in optimizer.param_groups]
    gradients: list[dict[int, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: gradients[-1].update(
            {i: p.grad.clone() for i, p in enumerate(params) if any(p is q for g in opt.param_groups for q in g["params"])}
        )
    )
    start = [param.detach().clone() for param in params]
    accumulation = ds_config.get("gradient_accumulation_steps", 1)
    losses = []
    for tokens in batches(steps * accumulation, 0 if same_data else torch.distributed.get_rank()):
        if engine.is_gradient_accumulation_boundary() or not gradients:
            gradients.append({})
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    result = {
        "gradients": gradients,
        "start": start,
        "weights": [param.detach().clone() for param in params],
        "state": [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params],
        "groups": describe_groups(engine),
        "module": {name: param.detach().float().clone() for name, param in engine.module.named_parameters()},
        "losses": losses,
        "bytes_sent": optimizer.channel.bytes_sent,
        "layouts": optimizer.layouts,
        "metrics": ds_fira.metrics(engine),
        "memory": ds_fira.memory_report(engine),
    }
    del optimizer, params
    engine.destroy()
    return result


def describe_groups(engine: Any) -> list[dict[str, Any]]:
    """By param group: its settings and what lies where in the whole buffer, read from DeepSpeed independently of us."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    wrapper = engine.optimizer
    result = []
    for i, group in enumerate(fira_of(engine).param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        members = []
        if hasattr(wrapper, "bit16_groups_flat"):
            base = wrapper.bit16_groups_flat[i].data_ptr()
            size = wrapper.bit16_groups_flat[i].element_size()
            # Where ZeRO really put a parameter: by address.
            members = [
                (names[id(param)], tuple(param.shape), (param.data_ptr() - base) // size)
                for param in wrapper.bit16_groups[i]
            ]
        elif hasattr(wrapper, "bf16_groups_flat"):
            base = wrapper.bf16_groups_flat[i].data_ptr()
            members = [
                (names[id(param)], tuple(param.shape), (param.data_ptr() - base) // 2) for param in wrapper.bf16_groups[i]
            ]
        result.append({"settings": settings, "members": members})
    return result
