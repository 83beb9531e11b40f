"""What the ranks of a test pool run without DeepSpeed: small trainings under FSDP2 and DDP, and their checkpoints."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ds_fira
from ds_fira.core.state import BASIS
from ds_fira.optim.registry import TYPES, fira_of
from tests.distributed.zero_jobs import ExpertNet, Net, batches, build, config

MODELS = {"net": Net, "experts": lambda shapes: ExpertNet()}


def model_of(kind: str, shapes: list[tuple[int, int]]) -> nn.Module:
    """A model, the same on every rank."""
    torch.manual_seed(0)
    return MODELS[kind](shapes)


def shard(
    model: nn.Module,
    mesh: tuple[int, ...] | None = None,
    shard_dim: int = 0,
    bf16: bool = False,
    offload: bool = False,
    tensor_parallel: tuple[int, int] | None = None,
) -> nn.Module:
    """Shard a model, every layer by itself.

    Args:
        model: changed.
        mesh: (shards,), or (replicas, shards); None for all ranks.
        shard_dim: of the parameters that divide evenly there; of the others 0.
        bf16: whether forward and backward compute in bfloat16.
        offload: whether shards and gradients are on the CPU.
        tensor_parallel: (shards, tensor-parallel ranks): the layers are cut by columns and by rows in turn.
    """
    options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if mesh is not None:
        names = ("replicas", "shards")[-len(mesh) :]
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    if tensor_parallel is not None:
        both = init_device_mesh("cpu", tensor_parallel, mesh_dim_names=("shards", "tensors"))
        options["mesh"], kinds = both["shards"], (ColwiseParallel, RowwiseParallel)
        for number, layer in enumerate(model.layers):
            layouts = {"input_layouts": Replicate(), "output_layouts": Replicate(), "use_local_output": True}
            parallelize_module(layer, both["tensors"], kinds[number % 2](**layouts))
    shards = torch.distributed.get_world_size() if mesh is None else mesh[-1]
    if shard_dim:
        options["shard_placement_fn"] = lambda param: (
            Shard(shard_dim) if param.ndim > shard_dim and param.shape[shard_dim] % shards == 0 else None
        )
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def optimizer_of(model: nn.Module, given: str, settings: dict[str, Any], kind: str = "FiraAdam") -> Any:
    """An optimizer of a model, of its param groups or of its parameters."""
    if given == "model":
        return TYPES[kind](model, **settings)
    if given == "params":
        return TYPES[kind](model.parameters(), **settings)
    return TYPES[kind](ds_fira.param_groups(model, optimizer=kind, **settings))


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor; a collective call for a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    shapes: list[tuple[int, int]],
    settings: dict[str, Any],
    steps: int = 6,
    kind: str = "net",
    given: str = "model",
    optimizer: str = "FiraAdam",
    ddp: bool = False,
    accumulation: int = 1,
    clip: float | None = None,
    compiled: bool = False,
    frozen: tuple[str, ...] = (),
    unused: dict[int, tuple[str, ...]] | None = None,
    save: tuple[int, str] | None = None,
    load: tuple[int, str] | None = None,
    behind: bool = False,
    flat: bool = False,
    **sharding: Any,
) -> dict[str, Any]:
    """Train, recording the gradients that FiraAdam sees.

    Args:
        shapes: of the linear layers.
        settings: of the optimizer.
        steps: that the run has in all.
        kind: key of `MODELS`.
        given: see `optimizer_of`.
        optimizer: key of `TYPES`.
        ddp: DDP in place of FSDP2.
        accumulation: micro batches a step; all but the last without communication.
        clip: the norm to clip at.
        compiled: whether the model is compiled.
        frozen: names of parameters that are not trained.
        unused: by step, names of parameters whose gradient is taken away.
        save: before which step a checkpoint is written, and where.
        load: at which step it was written, and where it is.
        behind: whether it is written by `async_save`.
        flat: whether its optimizer state is flattened, as torchtitan has it.
        **sharding: of `shard`.

    Returns:
        `gradients`: by step and name; `start`, `end`: weights by name; `states`: by name, as one process would have
        them; `loaded`: likewise, behind `load`; `groups`: settings
        and names; `ways`: by name of a parameter with split matrices; `metrics`; `memory`; `printed`: the optimizer's
        `state` and its keys; `names`: of states, by a parameter's name;
        `held`: elements of bases and moments on this rank; `low_rank`: by name, of projected parameters.
    """
    model = model_of(kind, shapes)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    outer = DistributedDataParallel(model) if ddp else shard(model, **sharding)
    fira = optimizer_of(outer, given, settings, optimizer)
    named = {name: param for name, param in model.named_parameters() if name in names}
    called = torch.compile(outer, backend="aot_eager") if compiled else outer
    owners = {id(param): name for name, param in named.items()}
    first, loaded = 0, {}
    if load is not None:
        first, folder = load
        _load(outer, fira, folder, flat)
        loaded = states_of(fira, owners)
    start = {name: whole(param) for name, param in named.items()}
    record, saving = [], None
    alike = (sharding.get("tensor_parallel") or (1, 1))[1]  # ranks with the same data
    data = batches(steps * accumulation, torch.distributed.get_rank() // alike)
    for step in range(first, steps):
        if save is not None and save[0] == step:
            saving = _save(outer, fira, save[1], behind, flat)
        for part in range(accumulation):
            last = part == accumulation - 1
            if not ddp:
                outer.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or not ddp else outer.no_sync():
                (called(data[step * accumulation + part]) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name in (unused or {}).get(step, ()):
            named[name].grad = None
        record.append({name: whole(param.grad) for name, param in named.items() if param.grad is not None})
        fira.step()
        fira.zero_grad()
    if saving is not None:
        saving.result()
    layouts, printed = fira.attachment.layouts, repr(fira.state)
    held = [state for param, state in fira.state.items() if not isinstance(param, DTensor)]
    known = {own: owners[key] for key, own in fira.attachment.names.items()}
    states = states_of(fira, owners)
    return {
        "gradients": record,
        "start": start,
        "end": {name: whole(param) for name, param in named.items()},
        "states": states,
        "loaded": loaded,
        "groups": groups_of(fira, owners),
        "ways": {known[matrix.name.partition("[")[0]]: matrix.way for layout in layouts for matrix in layout.split},
        "metrics": ds_fira.metrics(fira),
        "printed": [printed, *map(repr, fira.state)],
        "names": {name: set(fira.state[param]) for name, param in named.items() if param in fira.state},
        "memory": ds_fira.memory_report(fira),
        "held": sum(v.numel() for state in held for k, v in state.items() if k.startswith((BASIS, "exp_avg"))),
        "low_rank": {name: ds_fira.low_rank_state(fira, named[name]) for name, own in states.items() if BASIS in own},
    }


def groups_of(fira: Any, names: dict[int, str]) -> list[tuple[dict[str, Any], list[str]]]:
    """Settings and names of the param groups."""
    return [
        (
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
            [names[id(param)] for param in group["params"]],
        )
        for group in fira.param_groups
    ]


def states_of(fira: Any, names: dict[int, str]) -> dict[str, dict[str, Tensor]]:
    """The states of a state dict by name of the parameter, whole."""
    listed = [names[id(param)] for group in fira.param_groups for param in group["params"]]
    found = fira.state_dict()["state"]
    return {listed[number]: {key: whole(value) for key, value in state.items()} for number, state in found.items()}


def _states(model: nn.Module, fira: Any, flat: bool) -> tuple[dict[str, Any], StateDictOptions]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return dict(zip(("model", "optim"), get_state_dict(model, fira, options=options), strict=True)), options


def _save(model: nn.Module, fira: Any, folder: str, behind: bool, flat: bool) -> Any:
    states, _ = _states(model, fira, flat)
    if behind:
        # In a group of its own: a thread communicates in it while the next steps do so in theirs.
        group = torch.distributed.new_group(backend="gloo")
        return dcp.async_save(states, checkpoint_id=folder, process_group=group)
    dcp.save(states, checkpoint_id=folder)
    return None


def _load(model: nn.Module, fira: Any, folder: str, flat: bool) -> None:
    states, options = _states(model, fira, flat)
    dcp.load(states, checkpoint_id=folder)
    parts = {"model_state_dict": states["model"], "optim_state_dict": states["optim"]}
    set_state_dict(model, fira, **parts, options=options)


def refused(what: str) -> str:
    """The sentence with which a rank refuses something, at the first step or, of a state dict, where it is loaded."""
    rank, shapes = torch.distributed.get_rank(), [(12, 8), (9, 14)]
    settings: dict[str, Any] = {"rank": 3, "lr": 0.01}
    if what == "other settings":
        settings["rank"] = 3 + rank
    elif what == "record":
        settings["record_scaling_factors"] = 2
    elif what == "capturable":
        settings["capturable"] = True
    model = model_of("net", shapes)
    if what == "two cuts":
        mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()), mesh_dim_names=("rows", "columns"))
        model = model_of("experts", [])
        model.experts.weight = nn.Parameter(distribute_tensor(model.experts.weight, mesh, [Shard(0), Shard(1)]))
    elif what == "two meshes":
        mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()), mesh_dim_names=("ones", "ranks"))
        for layer, own in zip(model.layers, ("ones", "ranks"), strict=True):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh[own], [Shard(0)]))
    elif what == "first version":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        shard(model)
    try:
        fira = ds_fira.FiraAdam(model, **settings)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        fira.step()
        if what == "late group":
            fira.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        elif what == "other parameters":
            fira.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(12, 8))
            fira.step()
        elif what == "other rank":
            other = ds_fira.FiraAdam(model, rank=2)
            other.load_state_dict(fira.state_dict())
        elif what == "share":
            engine = build(config(1, "fp32", settings), shapes, model=model_of("net", shapes))
            fira.load_state_dict(fira_of(engine).state_dict())
        elif what == "other shapes":
            state = fira.state_dict()
            del state["fira"]
            state["state"][0]["basis"] = state["state"][0]["basis"].full_tensor()[:-1]
            fira.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def replicated_gradients() -> bool:
    """Whether two steps with gradients that every rank has whole are those with the same ones in shards."""
    ends = []
    for replicated in (False, True):
        model = shard(model_of("net", [(12, 8), (9, 14)]))
        fira = ds_fira.FiraAdam(model, rank=3, lr=0.01)
        for tokens in batches(2, torch.distributed.get_rank()):
            model(tokens).backward()
            for param in model.parameters() if replicated else ():
                param.grad = param.grad.redistribute(placements=[Replicate()])
            fira.step()
            fira.zero_grad()
        ends.append([whole(param) for param in model.parameters()])
    return all(map(torch.equal, *ends))
