"""Engines that AutoTP slices, on real ranks: what they trained with and to, by slices that the model itself shows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.module_inject import layers
from deepspeed.utils import groups, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

import ds_fira
from ds_fira.core.selection import numel_of
from ds_fira.engine.deepspeed.weight_sync import check_sync
from ds_fira.optim.base import LowRankOptimizer
from tests import small_models
from tests.distributed.goes_on import goes_on
from tests.distributed.sent_bytes import counted

STEPS = 6
SEQUENCE, VOCABULARY = 8, 24


def llama(**settings: Any) -> nn.Module:
    """A LLaMA with matrices of every kind of slice; `settings` of its config."""
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQUENCE,
        **settings,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))


MODELS = {
    "llama": llama,
    # Queries of three heads and one: slices of unequal width, also of keys and values, of which there are two.
    "uneven": lambda: llama(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=3),
    # One head of keys and values, of which the second rank has nothing.
    "multi_query": lambda: llama(num_key_value_heads=1),
    "fused": llama,
    "frozen": llama,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": small_models.gpt2,
    "gpt_neox": small_models.gpt_neox,
}


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Give the process back what AutoTP sets for all engines that come after."""
    try:
        yield
    finally:
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
        groups.mpu = None
        layers.set_autotp_mode(training=False)


def build(ds_config: dict[str, Any], model: str, way: str = "json") -> tuple[Any, dict[str, Tensor]]:
    """An engine, and the weights of the whole model before."""
    torch.manual_seed(0)
    module = MODELS[model]()
    whole = {name: param.detach().clone() for name, param in module.named_parameters()}
    if model == "frozen":
        module.requires_grad_(False)
        for name, param in module.named_parameters():
            param.requires_grad_("layers.1" in name or "norm" in name)
    if ds_config.get("bf16", {}).get("enabled"):
        module = module.bfloat16()
    if way == "json":
        params = list(module.parameters())
        return deepspeed.initialize(model=module, config=ds_config, model_parameters=params)[0], whole
    rest = {key: value for key, value in ds_config.items() if key != "optimizer"}
    optimizer = ds_fira.FiraAdam(module, **ds_config["optimizer"]["params"])
    return deepspeed.initialize(model=module, config=rest, optimizer=optimizer)[0], whole


def tokens(engine: Any, step: int) -> Tensor:
    """Token ids (2, SEQUENCE), the same on the ranks that have the slices of one copy."""
    copy = torch.distributed.get_rank(engine.seq_data_parallel_group)
    generator = torch.Generator().manual_seed(1000 * step + copy)
    return torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=generator)


def steps_of(engine: Any, first: int, last: int) -> list[float]:
    """Train; the losses."""
    losses = []
    for step in range(first, last):
        batch = tokens(engine, step)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights_of(engine: Any) -> dict[str, Tensor]:
    """What this rank has of the weights."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def train(ds_config: dict[str, Any], model: str, **kwargs: Any) -> dict[str, Any]:
    """What a rank trained with: the whole weights before, its slices after, its gradients, norms, the plan, sizes."""
    with forgotten():
        engine, whole = build(ds_config, model, **kwargs)
        grads: list[dict[str, Tensor]] = []
        for name, param in engine.module.named_parameters():
            param.register_hook(lambda grad, name=name: grads[-1].__setitem__(name, grad.detach().clone()))
        optimizer, losses, norms = engine.basic_optimizer, [], []
        given: list[dict[str, Tensor]] = []
        sizes = {name: numel_of(param) for name, param in engine.module.named_parameters()}

        def see(stepped: Any, *_: Any) -> None:  # of ZeRO a call for every group
            for param in (param for group in stepped.param_groups for param in group["params"]):
                for held in optimizer.attachment.slices[param]:
                    own = given[-1].setdefault(held.param, torch.full((sizes[held.param],), torch.nan))
                    own[held.start : held.stop] = param.grad.reshape(-1)[held.offset :][: held.stop - held.start]

        if isinstance(optimizer, LowRankOptimizer):
            optimizer.register_step_pre_hook(see)
        with counted(optimizer) as sent:
            for step in range(STEPS):
                grads.append({})
                given.append({})
                sent.append(0)
                losses += steps_of(engine, step, step + 1)
                norm = engine.get_global_grad_norm()
                norms.append(None if norm is None else float(norm))
        found = {
            "whole": whole,
            "after": weights_of(engine),
            "grads": grads,
            "losses": losses,
            "norms": norms,
            "sent": sent,
            "given": given,
            "place": (groups.get_tensor_model_parallel_rank(), groups.get_data_parallel_rank()),
        }
        if isinstance(optimizer, LowRankOptimizer):
            found |= {
                "ranked": sorted(
                    name
                    for group, members in zip(optimizer.param_groups, optimizer.members, strict=True)
                    for name, _ in members
                    if "rank" in group
                ),
                "projected": sorted(record.name for record in optimizer.inventory if record.matrices),
                "shapes": {record.name: record.shape for record in optimizer.inventory},
                "ways": {m.name: m.way for layout in optimizer.layouts for m in layout.split},
                "metrics": ds_fira.metrics(engine),
                "memory": ds_fira.memory_report(engine),
            }
        engine.destroy()
        return found


def run(
    ds_config: dict[str, Any],
    model: str,
    steps: tuple[int, int],
    load: str | None = None,
    save: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """A run as `goes_on` makes it, of an engine that `build` makes of the other arguments."""
    with forgotten():
        engine, _ = build(ds_config, model, **kwargs)
        try:
            return goes_on(engine, steps_of, weights_of, (*steps, STEPS), load, save)
        finally:
            engine.destroy()


def weights_alone(ds_config: dict[str, Any], model: str, load: str) -> dict[str, Any]:
    """The weights that a load gives that asks for nothing else, or what it is refused with."""
    with forgotten():
        engine, _ = build(ds_config, model)
        try:
            engine.load_checkpoint(load, load_optimizer_states=False, load_lr_scheduler_states=False)
            return {"loaded": weights_of(engine)}
        except ValueError as error:
            return {"message": str(error)}
        finally:
            engine.destroy()


def told(ds_config: dict[str, Any], model: str, loads: list[str]) -> list[str]:
    """Load from some folders, and return the sentences that refuse it."""
    with forgotten():
        engine, _ = build(ds_config, model)
        return [goes_on(engine, steps_of, weights_of, (0, 0, 0), load, None).get("message", "") for load in loads]


def states(ds_config: dict[str, Any], model: str) -> dict[str, Any]:
    """What a script reads and sets: low-rank states, moments of what is not projected; and a flipped bit that is found.

    Returns:
        By name the low-rank states as gathered, those of another rank's slice doubled, moments, and messages.
    """
    with forgotten():
        engine, _ = build(ds_config, model)
        steps_of(engine, 0, 4)
        named = dict(engine.module.named_parameters())
        found: dict[str, Any] = {"states": {}, "set": {}, "moments": {}}
        for name in [name for name, param in named.items() if name.endswith("proj.weight")]:
            found["states"][name] = dataclasses.asdict(ds_fira.low_rank_state(engine, named[name]))
            state = ds_fira.low_rank_state(engine, name)
            ds_fira.set_low_rank_state(engine, name, dataclasses.replace(state, residual_norm=2 * state.residual_norm))
            found["set"][name] = ds_fira.low_rank_state(engine, name).residual_norm
        for name in ("model.norm.weight", "lm_head.weight"):
            if engine.zero_optimization_stage() > 0:
                found["moments"][name] = safe_get_full_optimizer_state(named[name], "exp_avg")
                safe_set_full_optimizer_state(named[name], 2 * found["moments"][name], "exp_avg")
                found["moments"][f"set {name}"] = safe_get_full_optimizer_state(named[name], "exp_avg")
        check_sync(engine)
        if torch.distributed.get_rank() == 1:
            with torch.no_grad():
                named["model.norm.weight"][0] += 1
        try:
            check_sync(engine)
            found["message"] = ""
        except RuntimeError as error:
            found["message"] = str(error)
        engine.destroy()
        return found


class Mpu:
    """What Megatron gives: groups, and no word of slices."""

    def get_model_parallel_rank(self) -> int:
        """Of this rank."""
        return torch.distributed.get_rank()

    def get_model_parallel_world_size(self) -> int:
        """All ranks have slices."""
        return torch.distributed.get_world_size()

    def get_model_parallel_group(self) -> object:
        """All ranks."""
        return torch.distributed.group.WORLD

    def get_data_parallel_rank(self) -> int:
        """There is one copy."""
        return 0

    def get_data_parallel_world_size(self) -> int:
        """Likewise."""
        return 1

    def get_data_parallel_group(self) -> object:
        """This rank alone."""
        return None


def refusals(cases: list[tuple[dict[str, Any], str, bool]]) -> list[str]:
    """What each (config, model, whether with an mpu) is refused with; "" where it is not."""
    found = []
    for ds_config, model, has_mpu in cases:
        with forgotten():
            module = MODELS[model]()
            given = {"mpu": Mpu()} if has_mpu else {}
            try:
                params = list(module.parameters())
                deepspeed.initialize(model=module, config=ds_config, model_parameters=params, **given)[0].destroy()
                found.append("")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    return found
