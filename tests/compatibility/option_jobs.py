"""What the ranks run for the compatibility matrix: a training under one DeepSpeed config, held against one process.

Two things are compared, so that neither a fault of FiraAdam's nor one of DeepSpeed's hides behind the other: the
gradients that FiraAdam was given, with those of one process that has the batches of all ranks and the same weights; and
the weights it made of them, with those of a FiraAdam that has whole matrices and no engine.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import torch_autocast
from deepspeed.utils import groups
from torch import Tensor, distributed, nn

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.compatibility.engine_tensors import by_name, stepped_tensors
from tests.distributed.zero_jobs import Net, batches, build

# On two ranks: (8, 6) twice is one whole matrix for each; the other is alone in its shape, so it is cut.
SHAPES = [(8, 6), (8, 6), (11, 14)]
STEPS = 5
# Whether torch's AdamW is tried with what FiraAdam refuses, which every run of the tests leaves out.
TRIES_ADAMW = True
COMPILED = "_orig_mod."  # what torch.compile(model) puts before every name
PARAMS = {"lr": 0.01, "rank": 2, "update_proj_gap": 2, "alpha": 0.5, "weight_decay": 0.1}
# Largest relative difference that counts as equal: sums over the parts of a cut matrix are in another order, and a
# rounding to 16 bits now and then falls to the other side.
STEP_LIMIT = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
# Gradients of a backward pass in that dtype, of the whole model, against one in float32.
GRADIENT_LIMIT = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


class WatchedNet(Net):
    """`Net` with gradients whose norm is above 1, so that clipping at 1 does something; keeps what it was given."""

    def __init__(self, shapes: list[tuple[int, int]], vocabulary: int = 11) -> None:
        super().__init__(shapes, vocabulary)
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.watched = True

    def forward(self, tokens: Tensor) -> Tensor:
        if self.watched and not hasattr(self.norm.weight, "ds_id"):
            self.watch(tokens)
        return 3 * super().forward(tokens)

    def watch(self, tokens: Tensor) -> None:
        """Keep the weights that a batch meets; at stage 3 to be called before the forward pass, which fetches them."""
        with deepspeed.zero.GatheredParameters(list(self.parameters())):
            self.seen.append((tokens, {name: p.detach().float().clone() for name, p in self.named_parameters()}))


def follow(engine: Any, tokens: list[Tensor], accumulation: int) -> dict[str, Any]:
    """Train, and keep what FiraAdam was given and made of it.

    Returns:
        `start` and `end`: master weights by name; `gradients`: by step the gradients by name, empty where the engine
        skipped the step; `settings`: by name those of its param group.
    """
    optimizer = fira_of(engine)
    params = stepped_tensors(engine)
    taken: dict[int, list[Tensor]] = {}

    def see(stepped: Any, args: Any, kwargs: Any) -> None:
        for group in (group for group in stepped.param_groups if group["params"]):
            i = next(i for i, members in enumerate(params) if members[0] is group["params"][0])
            taken[i] = [p.grad.clone() for p in group["params"]]

    hook = optimizer.register_step_pre_hook(see)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    result: dict[str, Any] = {
        "start": by_name(engine, params),
        "settings": {
            name: group for group, members in zip(settings, optimizer.members, strict=True) for name, _ in members
        },
        "gradients": [],
    }
    for index, batch in enumerate(tokens):
        if engine.zero_optimization_stage() == 3:
            engine.module.watch(batch)
        engine.backward(engine(batch))
        engine.step()
        if (index + 1) % accumulation == 0:
            ready = len(taken) == len(params)
            result["gradients"].append(by_name(engine, [taken[i] for i in range(len(params))]) if ready else {})
            taken.clear()
    hook.remove()
    result["end"] = by_name(engine, params)
    return result


def replayed(followed: dict[str, Any]) -> dict[str, Tensor]:
    """The weights by name that one process makes of the same gradients, with a FiraAdam that has whole matrices."""
    params = {name: nn.Parameter(weight.clone()) for name, weight in followed["start"].items()}
    optimizer = ds_fira.FiraAdam([{**followed["settings"][name], "params": [param]} for name, param in params.items()])
    for gradients in followed["gradients"]:
        for name, gradient in gradients.items():
            params[name].grad = gradient
        if gradients:
            optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def true_gradients(
    model: WatchedNet, accumulation: int, clipping: float, make: Callable[[], nn.Module] | None = None
) -> list[dict[str, Tensor]]:
    """By step, the mean gradient over the batches of all ranks, in float32 at the weights that the engine's module had.

    Args:
        model: has trained in an engine; every rank's saw the batches of that rank.
        accumulation: micro batches a step.
        clipping: largest norm, or 0.
        make: builds the plain model; `WatchedNet` by default.
    """
    plain = make() if make else WatchedNet(SHAPES)
    plain.watched = False
    result = []
    for first in range(0, len(model.seen), accumulation):
        plain.zero_grad()
        for tokens, weights in model.seen[first : first + accumulation]:
            plain.load_state_dict(weights)
            (plain(tokens) / (accumulation * distributed.get_world_size())).backward()
        gradients = {name: param.grad for name, param in plain.named_parameters()}
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
        distributed.all_reduce(flat)
        if clipping and float(flat.norm()) > clipping:
            flat *= clipping / flat.norm()
        pieces = flat.split([gradient.numel() for gradient in gradients.values()])
        result.append({n: p.view_as(g).clone() for (n, g), p in zip(gradients.items(), pieces, strict=True)})
    return result


def relative(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> float:
    """|found - expected| / |expected - start|, of the whole model."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())

    def norm(of: Callable[[str], Tensor]) -> float:
        return float(torch.stack([of(name).double().square().sum() for name in expected]).sum().sqrt())

    off = norm(lambda name: found[name].double() - expected[name].double())
    return off / norm(lambda name: expected[name].double() - (start[name].double() if start else 0.0))


def without_prefix(followed: dict[str, Any]) -> dict[str, Any]:
    """What `follow` gave, by the names of a module that is not compiled."""
    plain = {
        key: {name.removeprefix(COMPILED): value for name, value in followed[key].items()}
        for key in ("start", "end", "settings")
    }
    gradients = [{n.removeprefix(COMPILED): g for n, g in step.items()} for step in followed["gradients"]]
    return {**plain, "gradients": gradients}


def measure(
    engine: Any,
    model: Any,
    tokens: list[Tensor],
    accumulation: int,
    clipping: float,
    make: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Train and compare.

    Args:
        engine: the engine.
        model: what keeps what it was given, see `WatchedNet`.
        tokens: micro batches.
        accumulation: micro batches a step.
        clipping: largest norm, or 0.
        make: see `true_gradients`.

    Returns:
        `steps`: optimizer steps made; `step_difference`: of the weights to those of one process fed the same gradients,
        relative to their change; `gradient_difference`: the largest over the steps, of the gradients to those of one
        process; `wrong`: what is not as it must be, or "".
    """
    followed = without_prefix(follow(engine, tokens, accumulation))
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in followed["start"].values()}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        module = {name.removeprefix(COMPILED): p.detach().clone() for name, p in engine.module.named_parameters()}
    step_difference = relative(followed["end"], replayed(followed), followed["start"])
    pairs = zip(followed["gradients"], true_gradients(model, accumulation, clipping, make), strict=True)
    gradient_difference = max(relative(found, expected) for found, expected in pairs if found)
    computed = {str(param.dtype).removeprefix("torch.") for param in module.values()}
    if engine.torch_autocast_enabled():
        computed.add(str(engine.torch_autocast_dtype()).removeprefix("torch."))
    wrong = []
    if len(followed["gradients"]) != STEPS or not all(followed["gradients"]):
        wrong.append("steps were skipped")
    if step_difference > max(STEP_LIMIT[dtype] for dtype in dtypes):
        wrong.append("the weights differ from one process's")
    if gradient_difference > max(GRADIENT_LIMIT[dtype] for dtype in dtypes | computed):
        wrong.append("the gradients differ from one process's")
    if any(not torch.equal(module[name], weight.to(module[name].dtype)) for name, weight in followed["end"].items()):
        wrong.append("the module's weights are not the master weights")
    return {
        "steps": sum(bool(gradients) for gradients in followed["gradients"]),
        "step_difference": step_difference,
        "gradient_difference": gradient_difference,
        "wrong": "; ".join(wrong),
    }


def forget_engines() -> None:
    """Undo what an engine leaves in DeepSpeed for the next ones of its process, whatever their config.

    After torch_autocast they would scale their losses, after `zero_hpz_partition_size` keep a second copy of weights.
    """
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def refuser(error: Exception) -> str:
    """Who refused a config with an error."""
    return "FiraAdam" if str(error).startswith("FiraAdam: ") else "DeepSpeed"


def try_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`measure` under one config; of a config that is refused `refused_by` ("FiraAdam", "DeepSpeed") and `message`.

    DeepSpeed refuses a config if it does not train with torch's AdamW either. Where FiraAdam refuses it, `adamw` says
    what torch's AdamW fails with, "" if it trains.
    """
    forget_engines()
    accumulation = ds_config.get("gradient_accumulation_steps", 1)
    tokens = batches(STEPS * accumulation, distributed.get_rank())
    torch.manual_seed(0)
    model, engine = WatchedNet(SHAPES), None
    try:
        engine = build(ds_config, SHAPES, model=model)
        return measure(engine, model, tokens, accumulation, ds_config["gradient_clipping"])
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        if engine is not None:
            engine.destroy()
    if ": FiraAdam: " in message:
        return refusal(message, ds_config)
    return {"message": message, "refused_by": "DeepSpeed" if adamw_error(ds_config, tokens) else ""}


def refusal(
    message: str,
    ds_config: dict[str, Any],
    wrap: Callable[[WatchedNet], nn.Module] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """The answer where FiraAdam refuses, with what torch's AdamW does unless it is no Adam that would step."""
    answer = {"message": message, "refused_by": "FiraAdam"}
    if TRIES_ADAMW and "steps its own Adam" not in message:
        answer["adamw"] = adamw_error(ds_config, batches(STEPS, distributed.get_rank()), wrap, prepare)
    return answer


def adamw_error(
    ds_config: dict[str, Any],
    tokens: list[Tensor],
    wrap: Callable[[WatchedNet], nn.Module] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> str:
    """What training with torch's AdamW in FiraAdam's place, and saving, fails with; "" where it does not."""
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    try:
        plain = WatchedNet(SHAPES)
        plain.watched = False
        engine = build({**ds_config, "optimizer": adamw}, SHAPES, model=wrap(plain) if wrap else plain)
        if prepare:
            prepare(engine)
        for batch in tokens:
            engine.backward(engine(batch))
            engine.step()
        engine.save_checkpoint(folder[0])
        engine.destroy()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder[0], ignore_errors=True)
    return ""


def try_configs(ds_configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`try_config` for every config."""
    return [try_config(ds_config) for ds_config in ds_configs]
