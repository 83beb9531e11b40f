"""Pipelines of DeepSpeed on real ranks, and what they trained with, by names that all ranks know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import groups
from torch import Tensor, nn

import ds_fira
from tests.distributed.goes_on import goes_on

WORDS, WIDTH, INNER = 13, 8, 20
MICRO, ACCUMULATION = 2, 2
STEPS = 7


class Block(nn.Module):
    """Two matrices with biases, and a norm, with a residual; it may count the rows that it sees in a buffer."""

    def __init__(self, inner: int, counts: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.register_buffer("seen", torch.tensor(0) if counts else None)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, width) to the same."""
        if self.seen is not None:
            self.seen += len(x)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def logits_of(embedding: nn.Embedding, x: Tensor) -> Tensor:
    """The embedding as the output head."""
    return x @ embedding.weight.t()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def layers(tied: bool, blocks: int = 4, counts: bool = False) -> list[Any]:
    """Embedding, blocks, a norm and the head, which is the embedding where it is tied."""
    first = TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH) if tied else LayerSpec(nn.Embedding, WORDS, WIDTH)
    last = TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH, forward_fn=logits_of)
    if not tied:
        last = LayerSpec(nn.Linear, WIDTH, WORDS, bias=False)
    return [
        first,
        *(LayerSpec(Block, INNER + index % 2, counts) for index in range(blocks)),
        LayerSpec(nn.LayerNorm, WIDTH),
        last,
    ]


def build(ds_config: dict[str, Any], stages: int, tied: bool, way: str = "json", **kwargs: Any) -> Any:
    """An engine; `way` says how it gets the optimizer: "json", or "object" for one that is made of the module.

    Where `frozen` is given, norms of blocks are frozen with that value, and blocks count rows.
    """
    frozen = kwargs.pop("frozen", None)
    model = PipelineModule(
        layers=kwargs.pop("given", None) or layers(tied, counts=frozen is not None),
        num_stages=stages,
        loss_fn=loss_of,
        partition_method="uniform",
        seed_layers=True,
        base_seed=7,
    )
    if ds_config.get("bf16", {}).get("enabled"):
        model = model.bfloat16()
    for name, param in model.named_parameters():
        if frozen is not None and "norm" in name:
            param.requires_grad_(False).fill_(frozen)
    config = {**ds_config, "train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION}
    given = {"model_parameters": list(model.parameters())}
    if way == "object":
        given = {"optimizer": ds_fira.FiraAdam(model, **config.pop("optimizer")["params"])}
    try:
        return deepspeed.initialize(model=model, config=config, **given)[0]
    except BaseException:
        groups.mpu = None  # or the engines that this process builds later would take its grid
        raise


def batches_of(step: int, pipeline: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of a step of one of several pipelines: other ones in every step and pipeline."""
    chance = torch.Generator().manual_seed(1000 * step + pipeline)
    for _ in range(ACCUMULATION):
        tokens = torch.randint(0, WORDS, (MICRO, 6), generator=chance)
        yield tokens, tokens.roll(1, dims=1)


def steps_of(engine: Any, first: int, last: int) -> list[float]:
    """Train; the losses."""
    pipeline = engine.module._grid.data_parallel_id
    return [float(engine.train_batch(batches_of(step, pipeline))) for step in range(first, last)]


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The weights on this rank."""
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def held_by(engine: Any) -> dict[str, Tensor]:
    """The weights on this rank, and the buffers."""
    return weights_of(engine) | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


def train(ds_config: dict[str, Any], stages: int, tied: bool, **kwargs: Any) -> dict[str, Any]:
    """What a rank trained with: weights before and after, the gradients its optimizer was given, what it tells."""
    engine = build(ds_config, stages, tied, **kwargs)
    before, optimizer = weights_of(engine), engine.basic_optimizer
    given: list[list[tuple[str, int, Tensor]]] = []

    def see(stepped: Any, *_: Any) -> None:  # of ZeRO a call for every group
        for param in (param for group in stepped.param_groups for param in group["params"]):
            for held in optimizer.attachment.slices[param]:
                part = param.grad.reshape(-1)[held.offset : held.offset + held.stop - held.start]
                given[-1].append((held.name, held.start, part.float().clone()))

    optimizer.register_step_pre_hook(see)
    losses = []
    for step in range(STEPS):
        given.append([])
        losses += steps_of(engine, step, step + 1)
    result = {
        "before": before,
        "after": weights_of(engine),
        "given": given,
        "losses": losses,
        "stage": engine.stage_id,
        "ranked": sorted(
            name
            for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
            for name, _ in members
            if "rank" in group
        ),
        "listed": [record.name for record in optimizer.inventory],
        "ways": sorted({matrix.way for layout in optimizer.layouts for matrix in layout.split}),
        "alphas": sorted({group["alpha"] for group in optimizer.param_groups}),
        "metrics": ds_fira.metrics(engine),
        "report": ds_fira.memory_report(engine),
    }
    close(engine)
    return result


def run(
    ds_config: dict[str, Any],
    stages: int,
    tied: bool,
    steps: tuple[int, int],
    load: str | None = None,
    save: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """A run as `goes_on` makes it, of an engine that `build` makes of the other arguments."""
    engine = build(ds_config, stages, tied, **kwargs)
    try:
        return goes_on(engine, steps_of, held_by, (*steps, STEPS), load, save)
    finally:
        close(engine)


def close(engine: Any) -> None:
    """End an engine; what is built after it in this process is no pipeline."""
    engine.destroy()
    groups.mpu = None


class Unmeasurable(nn.Embedding):
    """An embedding that needs a number of its weights as it is built."""

    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH)
        self.scale = self.weight.std().item()


def tied_matrices() -> list[Any]:
    """Layers of which one on each stage shares the weight of a linear layer, not its bias; the last is the head."""
    tie, block = TiedLayerSpec("tie", nn.Linear, WIDTH, WIDTH), LayerSpec(Block, INNER)
    head = LayerSpec(nn.Linear, WIDTH, WORDS, bias=False)
    return [LayerSpec(nn.Embedding, WORDS, WIDTH), tie, block, block, tie, head]


def tell_of_ties(ds_config: dict[str, Any], folder: str) -> dict[str, Any]:
    """What two stages make of a linear layer that they share, after training and a resume."""
    engine = build(ds_config, 2, True, given=tied_matrices())
    steps_of(engine, 0, 3)
    engine.save_checkpoint(folder)
    optimizer = engine.basic_optimizer
    result = {
        "listed": [record.name for record in optimizer.inventory],
        "projected": [record.name for record in optimizer.inventory if record.matrices],
        "own": sorted(name for listed in optimizer.members for name, _ in listed if "tie" in name),
        "weights": weights_of(engine),
    }
    close(engine)
    resumed = build(ds_config, 2, True, given=tied_matrices())
    resumed.load_checkpoint(folder)
    result["resumed"] = weights_of(resumed)
    close(resumed)
    return result


def refusals(ds_config: dict[str, Any]) -> dict[str, str]:
    """What is said of pipelines that are not supported, and of ranks of two stages that have other settings."""
    params, rank = ds_config["optimizer"]["params"], torch.distributed.get_rank()

    def having(**changes: Any) -> dict[str, Any]:
        return {**ds_config, "optimizer": {"type": "FiraAdam", "params": {**params, **changes}}}

    cases: dict[str, tuple[dict[str, Any], list[Any] | None]] = {
        "tied": (having(target_modules=["tie"]), tied_matrices()),
        "stage 0": ({**ds_config, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, None),
        "stage 2": ({**ds_config, "zero_optimization": {"stage": 2}}, None),
        "experts": (ds_config, [*layers(False)[:4], MoE(WIDTH, Block(INNER), num_experts=2), nn.LayerNorm(WIDTH)]),
        "ranks": (having(alpha=0.25 * (1 + rank)), None),
        "meta": (ds_config, [LayerSpec(Unmeasurable), *layers(False)[1:]]),
    }
    found = {}
    for name, (config, given) in cases.items():
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                # Of experts on one stage alone DeepSpeed would make groups on that stage alone, and wait for ever.
                close(build(config, 1 if name == "experts" else 2, False, given=given))
            found[name] = next((str(each.message) for each in told if "PipelineModule" in str(each.message)), "")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
