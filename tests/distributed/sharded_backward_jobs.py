"""Jobs of ranks that step in the backward pass under FSDP2, and of the same trainings by `optimizer.step()`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import ds_fira
from tests.distributed.fsdp_jobs import whole

WIDTH = 12
SETTINGS: dict[str, Any] = {"rank": 3, "lr": 0.02, "update_proj_gap": 3, "weight_decay": 0.1, "alpha": 0.5}
DECAYED = {"weight": 0.1, "bias": 0.0}


class Block(nn.Module):
    """Two matrices of other shapes, of which two ranks share rows unevenly, and what is not projected."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 21), nn.Linear(21, WIDTH, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.down(torch.tanh(self.up(self.norm(rows))))


class Blocks(nn.Module):
    """Blocks, of which the first may run twice; of `rare` one runs in some steps alone, and `never` in none.

    Args:
        twice: whether it does.
    """

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.rare = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.never = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)

    def forward(self, tokens: Tensor, rare: bool) -> Tensor:
        rows = self.embedding(tokens)
        for block in (*self.blocks, *self.blocks[: int(self.twice)]):
            rows = block(rows)
        rows = self.rare[0](rows)
        rows = rows + self.rare[1](rows) if rare else rows
        return nn.functional.cross_entropy(self.lm_head(rows).flatten(0, 1), tokens.flatten())


def sharded(
    mesh: tuple[int, ...] | None = None,
    bf16: bool = False,
    offload: bool = False,
    kept: bool = False,
    separate: bool = True,
    pair: bool = False,
    twice: bool = True,
    frozen: str = "",
) -> nn.Module:
    """The model, the same on every rank, sharded.

    Args:
        mesh: (replicas, shards); None for all ranks.
        bf16: whether forward and backward compute in bfloat16.
        offload: whether shards and gradients are on the CPU.
        kept: whether whole weights stay until the backward pass.
        separate: whether blocks are sharded apart.
        pair: whether the last two blocks are sharded together.
        twice: whether the first block runs twice.
        frozen: how the names begin of parameters that are not trained.
    """
    torch.manual_seed(0)
    model, options = Blocks(twice), dict[str, Any]()
    for name, param in model.named_parameters():
        param.requires_grad_(not (frozen and name.startswith(frozen)))
    if mesh is not None:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards"))
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kept:
        options["reshard_after_forward"] = False
    blocks = list(model.blocks) if separate else []
    for part in [blocks[0], blocks[1:]] if pair else blocks:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def train(
    releases: bool,
    steps: int = 6,
    settings: dict[str, Any] | None = None,
    decays: bool = False,
    clip: str | None = None,
    parts: int = 1,
    compiled: bool = False,
    saved: int | None = None,
    folder: str | None = None,
    late: int | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Train on this rank's tokens.

    Args:
        releases: by `step_in_backward`, or by `step()` with gradients that are scaled by hand.
        steps: to make.
        settings: of the optimizer, beside `SETTINGS`.
        decays: whether biases are a param group without weight decay.
        clip: to a norm of 0.05.
        parts: of a batch, whose gradients are added up without communication.
        compiled: whether the model is compiled.
        saved: the step before which all goes into a new model and optimizer.
        folder: by a checkpoint there; None for state dicts.
        late: the step before which steps in the backward pass begin; None for the first.
        how: of `sharded`.

    Returns:
        `weights` and `states` by name, whole; `norms`: by step; `metrics`; `collectives`.
    """
    size = dist.get_world_size() if how.get("mesh") is None else how["mesh"][1]
    starts = late is None and releases
    model, optimizer, steps_in = _start(starts, settings, decays, clip, how)
    norms, generator = list[float](), torch.Generator().manual_seed(dist.get_rank() % size + 7)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(steps):
        if releases and step == late:
            steps_in = _stepping(model, optimizer, clip)
        if step == saved:
            model, optimizer, steps_in = _carried(model, optimizer, steps_in, folder, (settings, decays, clip, how))
            called = model
        for part in range(parts):
            model.set_requires_gradient_sync(part == parts - 1)
            tokens = torch.randint(0, 11, (2, 5), generator=generator)
            (called(tokens, step % 2 == 1) / parts).backward()
        if steps_in is not None and how.get("separate", True):
            assert all(param.grad is None for param in model.blocks.parameters())
        elif clip is not None:
            norms.append(_scale(model, clip, norms))
        optimizer.step()
        assert steps_in is None or all(param.grad is None for param in model.parameters())
        optimizer.zero_grad()
        norms += [steps_in.grad_norm] if steps_in is not None and clip else []
    names = {id(param): name for name, param in model.named_parameters()}
    listed = [names[id(param)] for group in optimizer.param_groups for param in group["params"]]
    states = optimizer.state_dict()["state"]
    return {
        "weights": {name: whole(param) for name, param in model.named_parameters()},
        "states": {listed[n]: {key: whole(each) for key, each in state.items()} for n, state in states.items()},
        "norms": norms,
        "metrics": ds_fira.metrics(optimizer),
    }


def _start(releases: bool, settings: dict[str, Any] | None, decays: bool, clip: str | None, how: dict[str, Any]) -> Any:
    model = sharded(**how)
    named = [each for each in model.named_parameters() if each[1].requires_grad]
    groups: Any = model
    if decays:
        groups = [
            {"params": [each for each in named if each[0].endswith(kind)], "weight_decay": decay}
            for kind, decay in DECAYED.items()
        ]
    optimizer = ds_fira.FiraAdam(groups, **{**SETTINGS, **(settings or {})})
    return model, optimizer, _stepping(model, optimizer, clip) if releases else None


def _stepping(model: nn.Module, optimizer: ds_fira.FiraAdam, clip: str | None) -> Any:
    how = {} if clip is None else {"max_norm": 0.05, "clip": clip}
    return ds_fira.step_in_backward(model, optimizer, **how)


def _scale(model: nn.Module, clip: str, before: list[float]) -> float:
    """Scale whole gradients as the clipping says; their norm."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norms = [float(grad.full_tensor().norm()) for grad in grads]
    last = before[-1] if before and clip == "previous" else None
    for grad, norm in zip(grads, norms, strict=True):
        grad.mul_(min(1.0, 0.05 / (norm if last is None else last)))
    return math.sqrt(sum(norm**2 for norm in norms))


def _carried(model: nn.Module, optimizer: Any, steps_in: Any, folder: str | None, start: tuple[Any, ...]) -> Any:
    """Another model and optimizer that go on; by `torch.distributed.checkpoint`, or by their state dicts."""
    other, another, others = _start(True, *start)
    if folder is None:
        other.load_state_dict(model.state_dict())
        another.load_state_dict(optimizer.state_dict())
        return other, another, others
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states, "steps": steps_in}, checkpoint_id=folder)
    weights, states = get_state_dict(other, another)
    dcp.load({"model": weights, "optim": states, "steps": others}, checkpoint_id=folder)
    set_state_dict(other, another, model_state_dict=weights, optim_state_dict=states)
    return other, another, others


def spoiled(clip: str | None) -> tuple[list[str], float | None]:
    """What a step leaves as it was in which a block's gradients are not finite on the first rank; the norm it found."""
    model, optimizer, steps_in = _start(True, {"weight_decay": 0.0}, False, clip, {"twice": False, "frozen": "never"})
    spoils = False

    def spoil(shards: Tensor) -> None:
        if spoils and dist.get_rank() == 0:
            shards.fill_(math.inf)

    model.blocks[1].set_all_reduce_hook(spoil)
    for step in range(3):
        spoils = step == 2
        before = {name: whole(param) for name, param in model.named_parameters()}
        model(torch.arange(10).view(2, 5), True).backward()
        optimizer.step()
    after = {name: whole(param) for name, param in model.named_parameters()}
    return [name for name, value in before.items() if torch.equal(value, after[name])], steps_in.grad_norm


def both(**how: Any) -> list[dict[str, Any]]:
    """A training by `step()`, and one in the backward pass."""
    return [train(releases, **how) for releases in (False, True)]


def peaks(size: int = 128, depth: int = 12) -> list[tuple[int, int]]:
    """The largest number of bytes alive in a step, by `step()` and in the backward pass; each with those of states."""
    found = []
    for releases in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(depth)))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = ds_fira.FiraAdam(model, rank=8, lr=0.01, update_proj_gap=1000)
        if releases:
            ds_fira.step_in_backward(model, optimizer)
        seen = []
        for _ in range(5):
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                model(torch.ones(1, size)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        # The first has a refresh, whose solver has memory of its own. Of the others the least: how long FSDP2 keeps
        # what it reduces goes by which rank waits, and what is held for good is in every step.
        found.append((min(seen[1:]), ds_fira.state_bytes(optimizer)))
    return found


def refused(what: str) -> str:
    """The sentence with which every rank refuses something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    given: dict[str, Any] = {}
    fully_shard(model[0])
    if what != "in part":
        fully_shard(model)
    if what == "process group":
        given["process_group"] = dist.group.WORLD
    elif what == "buckets":
        given["bucket_bytes"] = 1000
    optimizer = ds_fira.FiraAdam(model, rank=2)
    try:
        ds_fira.step_in_backward(model, optimizer, **given)
        for _ in range(2):
            model(torch.ones(2, 8)).sum().backward()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
