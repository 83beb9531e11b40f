"""The whole model of which a process holds a stage: what a rank applies to is decided of all layers, not of a stage's.

Written against `PipelineModule` of DeepSpeed 0.17 to 0.19, known by what it has, to need no import. What it relies on:
`_layer_specs` lists all layers on every rank, each a module, a function, or a specification whose `build` makes the
module, with the `key` of layers that share one; `tied_modules` holds the shared modules of this rank's stage, and
layer i of the stage is its submodule "i".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

TIED = "tied_modules"


def is_pipeline(model: nn.Module) -> bool:
    """Whether a model is a pipeline, of which this process may hold a stage alone."""
    return isinstance(getattr(model, TIED, None), nn.ModuleDict) and hasattr(model, "_layer_specs")


def whole_model(model: nn.Module) -> nn.Module:
    """A module of all layers of a pipeline under the names they have in it; any other model as it is.

    Layers of this process are themselves. Those of other stages are on the meta device, where they have no memory; a
    layer that cannot be built there is left out, with a warning.
    """
    if not is_pipeline(model):
        return model
    found = nn.Module()
    tied = nn.ModuleDict()
    found.add_module(TIED, tied)
    own = dict(model.named_children())
    failed: dict[int, Exception] = {}
    for index, spec in enumerate(model._layer_specs):
        key = getattr(spec, "key", None)
        if key is not None and key in tied:
            continue
        try:
            layer = model.tied_modules[key] if key in model.tied_modules else own.get(str(index)) or _built(spec)
        except Exception as error:  # whatever a user's constructor raises
            failed[index] = error
            continue
        if layer is not None:
            tied.add_module(key, layer) if key is not None else found.add_module(str(index), layer)
    if failed:
        _warn(failed, model._layer_specs)
    return found


def _built(spec: object) -> nn.Module | None:
    """The module of a layer of another stage, None of a function."""
    if isinstance(spec, nn.Module):
        return spec
    if not hasattr(spec, "build"):
        return None
    with torch.device("meta"):
        return spec.build()


def _warn(failed: dict[int, Exception], specs: Sequence[object]) -> None:
    index, error = next(iter(failed.items()))
    kind = getattr(getattr(specs[index], "typename", None), "__name__", "a layer")
    warnings.warn(
        f"layer {index} of the PipelineModule ({kind}) cannot be built on the meta device ({type(error).__name__}: "
        f"{str(error)[:80]}), so other stages do not see whether it is an embedding, whose size tells the output head: "
        "name the layers to project by target_modules.",
        stacklevel=2,
    )
