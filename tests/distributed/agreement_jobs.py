"""What the ranks of a test pool run where one of them is given something else than the others."""

from __future__ import annotations

import copy
import os
import time
import warnings
from typing import Any

import torch
from torch import nn

import ds_fira
from ds_fira.core import kernels
from tests.distributed.zero_jobs import Net, batches, build, config

SHAPES = [(8, 6), (6, 9), (5, 7)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5}


def attempt(ds_config: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> tuple[str, str, float]:
    """Try to build an engine; the kind and the text of the error, empty where there is none, and seconds."""
    began = time.monotonic()
    try:
        engine = build(ds_config, SHAPES, model=model, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    for tokens in batches(1, torch.distributed.get_rank()):
        engine.backward(engine(tokens))
        engine.step()
    engine.destroy()
    return "", "", time.monotonic() - began


def deviate(stages: list[int], odd: int, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str, float]]:
    """At each stage and in each case, one rank gets something else.

    Args:
        stages: of ZeRO.
        odd: the rank.
        cases: by name, blocks of the config that the odd rank has otherwise; `model` is one of `_models`.

    Returns:
        By "stage: case", see `attempt`.
    """
    results = {}
    is_odd = torch.distributed.get_rank() == odd
    for stage in stages:
        for name, change in cases.items():
            ds_config = config(stage, "fp32", dict(PARAMS))
            change = copy.deepcopy(change) if is_odd else {}
            kind = change.pop("model", None)
            for key, value in change.items():
                if key == "params":
                    ds_config["optimizer"]["params"] |= value
                elif isinstance(value, dict) and key in ds_config:
                    ds_config[key] |= value
                else:
                    ds_config[key] = value
            torch.manual_seed(0)
            model = Net(SHAPES)
            kwargs = {} if kind is None else CHANGES[kind](model)
            results[f"{stage}: {name}"] = attempt(ds_config, **{"model": model, **kwargs})
    return results


def _order(model: Net) -> dict[str, Any]:
    return {"model_parameters": list(model.parameters())[::-1]}


def _missing(model: Net) -> dict[str, Any]:
    return {"model_parameters": [param for name, param in model.named_parameters() if name != "layers.1.weight"]}


def _shape(model: Net) -> dict[str, Any]:
    return {"model": Net([*SHAPES[:2], (7, 5)])}


def _more(model: Net) -> dict[str, Any]:
    return {"model": Net([*SHAPES, (7, 5)])}


def _renamed(model: Net) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net(SHAPES)
    model.layers = nn.ModuleList([model.layers[1], model.layers[0], model.layers[2]])
    return {"model": model}


def _frozen(model: Net) -> dict[str, Any]:
    model.embedding.weight.requires_grad_(False)
    return {"model_parameters": list(model.parameters())}


def _dtype(model: Net) -> dict[str, Any]:
    return {"model": model.double()}


def _group(model: Net) -> dict[str, Any]:
    first, *rest = model.parameters()
    return {"model_parameters": [{"params": [first], "lr": 0.5}, {"params": rest}]}


CHANGES = {
    "order": _order,
    "missing": _missing,
    "shape": _shape,
    "more": _more,
    "module order": _renamed,
    "frozen": _frozen,
    "dtype": _dtype,
    "group": _group,
}


def objects(stages: list[int], odd: int, how: str, changes: list[dict[str, Any]]) -> dict[str, tuple[str, str, float]]:
    """The same with an optimizer object, or a function that makes one, whose settings differ on one rank."""
    results = {}
    is_odd = torch.distributed.get_rank() == odd
    for stage in stages:
        for change in changes:
            torch.manual_seed(0)
            model = Net(SHAPES)
            settings = {"rank": 3, "lr": 0.01, **(change if is_odd else {})}
            dropped = settings.pop("drop", None)
            os.environ["DS_FIRA_KERNELS"] = settings.pop("DS_FIRA_KERNELS", "1")

            def make(params: Any, settings: Any = settings, dropped: Any = dropped, model: Any = model) -> Any:
                groups = ds_fira.param_groups(model, **settings)
                if dropped:
                    groups[-1]["params"] = groups[-1]["params"][1:]
                return ds_fira.FiraAdam(groups)

            def hidden(params: Any, make: Any = make) -> Any:
                return make(params)

            makers = {
                "object": lambda make=make: make(None),
                "function": lambda make=make: make,
                "hidden": lambda h=hidden: h,
            }
            ds_config = config(stage, "fp32", {})
            del ds_config["optimizer"]
            kwargs = {} if how == "object" else {"model_parameters": list(model.parameters())}
            results[f"{stage}: {change}"] = attempt(ds_config, model=model, optimizer=makers[how](), **kwargs)
    return results


def kernels_on_some(stages: list[int], odd: int) -> dict[int, tuple[bool, bool, str, list[str]]]:
    """Build engines where the kernels run on all ranks but one, in Triton's interpreter.

    Returns:
        By stage whether this rank could use them, and whether it does; what warnings said of them.
    """
    results = {}
    kernels.interpret_on_cpu(torch.distributed.get_rank() != odd)
    for stage in stages:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = build(config(stage, "fp32", dict(PARAMS)), SHAPES)
        optimizer = engine.basic_optimizer
        could = kernels.supports(optimizer.param_groups[0]["params"][0])
        with kernels.switched(optimizer.kernels):
            uses = kernels.supports(optimizer.param_groups[0]["params"][0])
        said = [str(warning.message) for warning in caught]
        results[stage] = (could, uses, [text for text in said if "kernels" in text])
        engine.destroy()
    kernels.interpret_on_cpu(False)
    return results


def build_with(folder: str, kinds: list[str]) -> None:
    """Build an engine with another optimizer on each rank."""
    kind = kinds[torch.distributed.get_rank()]
    ds_config = config(1, "fp32", {})
    ds_config["optimizer"] = {"type": kind, "params": {"lr": 0.01} | ({"torch_adam": True} if kind == "AdamW" else {})}
    began = time.monotonic()
    try:
        build(ds_config, SHAPES)
    finally:
        print(f"seconds: {time.monotonic() - began}", flush=True)


def foreign_in_between() -> dict[str, Any]:
    """Build an engine of ours, one of torch's AdamW with another lr on each rank, and one of ours."""
    from ds_fira.engine.deepspeed import agreement

    agreed, agree = [], agreement._Table.all_same
    errors, counts = [], []

    def counted(table: Any, digest: str) -> bool:
        agreed.append(table.phase)
        return agree(table, digest)

    agreement._Table.all_same = counted
    for kind in ("FiraAdam", "AdamW", "FiraAdam"):
        rank = torch.distributed.get_rank()
        params = dict(PARAMS) if kind == "FiraAdam" else {"lr": 0.01 * (1 + rank), "torch_adam": True}
        ds_config = config(1, "fp32", params)
        ds_config["optimizer"]["type"] = kind
        errors.append(attempt(ds_config)[1])
        counts.append(len(agreed))
    agreement._Table.all_same = agree
    return {"errors": errors, "agreements": counts}


def build_uncaught(folder: str, odd: int, params: dict[str, Any]) -> None:
    """Build an engine whose params differ on one rank; the error ends each process."""
    is_odd = torch.distributed.get_rank() == odd
    build(config(0, "fp32", PARAMS | (params if is_odd or odd < 0 else {})), SHAPES)
