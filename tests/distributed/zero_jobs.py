"""What the ranks of a test pool run: small trainings through a real DeepSpeed engine."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.distributed.probes import count_decompositions, describe_groups, stepped_and_states


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
    model = kwargs.pop("model", None)
    if model is None:
        model = Net(shapes)
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
    ds_config: dict[str, Any],
    shapes: list[tuple[int, int]],
    steps: int,
    faults: dict[int, tuple[str, float | str | tuple[int, float]]] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train, recording the gradients FiraAdam sees.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        steps: optimizer steps.
        faults: by step, a parameter's name and the value its whole gradient takes on every rank, "rank 1", or the index
            of one element and its value.
        **kwargs: for `build`.

    Returns:
        `gradients`: per step, by param group, the gradients of its parameters (under ZeRO one flat partition); `start`
        and `weights`: by group the parameters before and after; `state`: by group their states; `groups`: see
        `describe_groups`; `module`: the module's parameters; `losses`, `bytes_sent`, `layouts`, `metrics`, `memory`.
    """
    engine = build(ds_config, shapes, **kwargs)
    optimizer = fira_of(engine)
    params = [list(group["params"]) for group in optimizer.param_groups]
    record: list[dict[int, list[Tensor | None]]] = []

    def see(stepped: Any, args: Any, kwargs: Any) -> None:
        if stepped.suspended:
            return
        for group in stepped.param_groups:
            i = next(i for i, members in enumerate(params) if members[0] is group["params"][0])
            record[-1][i] = [None if p.grad is None else p.grad.clone() for p in group["params"]]

    optimizer.register_step_pre_hook(see)
    decompositions = count_decompositions()
    start = [[param.detach().clone() for param in group] for group in params]
    named = dict(engine.module.named_parameters())
    accumulation = ds_config.get("gradient_accumulation_steps", 1)
    losses = []
    for index, tokens in enumerate(batches(steps * accumulation, torch.distributed.get_rank())):
        step = index // accumulation
        if index % accumulation == 0:
            record.append({})
        name, value = (faults or {}).get(step, (None, 0.0))
        fault = named[name].register_hook(functools.partial(faulty, value=value)) if name else None
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        if fault is not None:
            fault.remove()
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "gradients": record,
        "start": start,
        "weights": [[param.detach().clone() for param in group] for group in params],
        "state": [[{k: v.clone() for k, v in optimizer.state[p].items()} for p in group] for group in params],
        "groups": describe_groups(engine),
        "module": {name: param.detach().clone() for name, param in engine.module.named_parameters()},
        "losses": losses,
        "lr": [group["lr"] for group in optimizer.param_groups],
        "decompositions": decompositions(),
        "collectives": optimizer.communicator.collectives,
        "bytes_sent": optimizer.communicator.bytes_sent,
        "layouts": optimizer.layouts,
        "metrics": ds_fira.metrics(engine),
        "memory": ds_fira.memory_report(engine),
    }
    del optimizer
    engine.destroy()
    return result


def faulty(grad: Tensor, value: float | str | tuple[int, float]) -> Tensor:
    """A gradient of one value everywhere, of rank 1, or with one element changed."""
    if isinstance(value, tuple):
        grad = grad.clone()
        grad.view(-1)[value[0]] = value[1]
        return grad
    return grad[:, :1] @ grad[:1] if value == "rank 1" else torch.full_like(grad, value)


def train_with_object(
    settings: dict[str, Any], shapes: list[tuple[int, int]], as_callable: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """`train` with an optimizer object over `ds_fira.param_groups`, or a function that makes one."""
    torch.manual_seed(0)
    model = Net(shapes)
    if as_callable:
        return train(
            shapes=shapes,
            model=model,
            optimizer=lambda params: ds_fira.FiraAdam(params, **settings),
            model_parameters=list(model.parameters()),
            **kwargs,
        )
    optimizer = ds_fira.FiraAdam(ds_fira.param_groups(model, **settings))
    return train(shapes=shapes, model=model, optimizer=optimizer, **kwargs)


def train_with_groups(shapes: list[tuple[int, int]], **kwargs: Any) -> dict[str, Any]:
    """`train` with param groups of the user's, none of which says what is projected."""
    torch.manual_seed(0)
    model = Net(shapes)
    first = [model.layers[0].weight, model.layers[1].weight, model.norm.weight]
    others = [param for param in model.parameters() if all(param is not member for member in first)]
    groups = [{"params": first, "lr": 0.02, "weight_decay": 0.3, "name": "first"}, {"params": others}]
    return train(shapes=shapes, model=model, model_parameters=groups, **kwargs)


def train_with_param_groups(shapes: list[tuple[int, int]], preset: str | None, **kwargs: Any) -> dict[str, Any]:
    """`train` with `ds_fira.param_groups` as model parameters."""
    torch.manual_seed(0)
    model = Net(shapes)
    groups = ds_fira.param_groups(model, rank=2, weight_decay=0.1, preset=preset)
    return train(shapes=shapes, model=model, model_parameters=groups, **kwargs)


class ExpertNet(nn.Module):
    """Five experts in one 3-D tensor, of which a token uses one."""

    class Experts(nn.Module):
        """Holds the experts."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6, 7) * 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.experts = self.Experts()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        weight = self.experts.weight[tokens % 5]
        return (weight @ hidden.unsqueeze(-1)).tanh().square().mean() + hidden.square().mean()


def train_experts(**kwargs: Any) -> dict[str, Any]:
    """`train` with `ExpertNet`."""
    torch.manual_seed(0)
    return train(shapes=[], model=ExpertNet(), **kwargs)


def try_to_build(
    cases: list[tuple[dict[str, Any], str | None]], shapes: list[tuple[int, int]]
) -> list[tuple[str, str]]:
    """Build an engine for every case; returns the type and the text of what each raised.

    Args:
        cases: a DeepSpeed config, and what to do to the model first: "sparse", "complex" or None.
        shapes: of the linear layers.
    """
    raised = []
    for ds_config, change in cases:
        model = Net(shapes)
        if change == "sparse":
            model.embedding.sparse = True
        if change == "complex":
            model.rotation = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        try:
            build(ds_config, shapes, model=model)
            raised.append(("", ""))
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    return raised


def resume(ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, save_at: int, folder: str) -> bool:
    """Whether a run saved at a step and loaded into a new engine ends with the weights and states of the whole run."""
    tokens = batches(steps, torch.distributed.get_rank())

    def advance(engine: Any, first: int, last: int) -> None:
        for batch in tokens[first:last]:
            engine.backward(engine(batch))
            engine.step()

    def snapshot(engine: Any) -> list[Tensor]:
        return [tensor.clone() for tensor in stepped_and_states(engine)]

    whole = build(ds_config, shapes)
    advance(whole, 0, save_at)
    whole.save_checkpoint(folder)
    advance(whole, save_at, steps)
    expected = snapshot(whole)
    whole.destroy()
    resumed = build(ds_config, shapes, seed=7)
    resumed.load_checkpoint(folder)
    advance(resumed, save_at, steps)
    found = snapshot(resumed)
    resumed.destroy()
    assert len(found) == len(expected)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
