"""Which weights of a model, or of named parameters, are projected, and which take no weight decay; and their shapes.

Written against DeepSpeed 0.19.8, where a parameter that ZeRO-3 manages (by `deepspeed.zero.Init`, or once the engine is
built) has an empty tensor between uses, and says what it stands for in `ds_shape` and `ds_numel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.whole_model import TIED, is_pipeline, whole_model

# Names that model code gives to the layer that makes logits, where nothing else tells it apart.
HEAD_NAMES = frozenset({"lm_head", "embed_out", "output_projection", "score", "classifier"})
# Ends of the names that it gives to norms, and names of embeddings, beside all that have "embed" in them.
_NORM_SUFFIXES = ("norm", "norm1", "norm2", "ln_f", "ln_1", "ln_2")
_EMBEDDINGS = frozenset({"wte", "wpe", "shared"})
# The routers of DeepSpeed's MoE layers, by class, and the linear layer in each; known by name, to need no import.
_ROUTERS = {"TopKGate": "wg", "TokenChoiceTopKRouter": "gate"}
_ROUTER_NAMES = ("gate.wg", "router.gate")
# The class of a layer of which AutoTP leaves this rank a slice.
_SLICED_LAYER = "TensorParallel_Layer"


# What an engine sets on a parameter of which this rank has a slice: the shape of the whole. And on one in which it has
# some of a layer's experts: the number of the first, and how many the layer has.
WHOLE_SHAPE, EXPERTS = "_fira_whole_shape", "_fira_experts"


def is_sliced(param: Tensor) -> bool:
    """Whether tensor parallelism leaves this rank a slice of a parameter."""
    return hasattr(param, WHOLE_SHAPE)


def held_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of what this rank has of a parameter, whether or not ZeRO-3 has taken its data away."""
    return tuple(getattr(param, "ds_shape", param.shape))


def shape_of(param: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, where this rank has all of it, a slice, or some of its experts."""
    held = held_shape(param)
    if hasattr(param, EXPERTS):
        held = (getattr(param, EXPERTS)[1], *held[1:])
    return tuple(getattr(param, WHOLE_SHAPE, held))


def experts_of(param: Tensor) -> range | None:
    """The numbers of the experts that this rank has in a parameter, where others have others; else None."""
    if not hasattr(param, EXPERTS):
        return None
    first, _ = getattr(param, EXPERTS)
    return range(first, first + held_shape(param)[0])


def first_element(param: Tensor) -> int:
    """The number of the first element that this rank has, among those of a parameter whose experts are shared out."""
    experts = experts_of(param)
    return 0 if experts is None else experts.start * math.prod(held_shape(param)[1:])


def numel_of(param: Tensor) -> int:
    """The elements of a parameter that ZeRO partitions: of the whole one, or of the slice that this rank has."""
    return math.prod(held_shape(param))


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) is a linear layer with its weight transposed; known by name, to need no import.
    conv = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return isinstance(module, nn.Linear) or conv or (_is_sliced_layer(module) and not _is_embedding(module))


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or (_is_sliced_layer(module) and "Embedding" in type(module).__name__)


def _is_sliced_layer(module: nn.Module) -> bool:
    # Of AutoTP's layers, which are none of torch's; known by the name of what all of them are.
    return any(kind.__name__ == _SLICED_LAYER for kind in type(module).__mro__) and hasattr(module, "weight")


def _expert_tensors(name: str, module: nn.Module) -> list[str]:
    """Names of the 3-D expert weights that a module holds directly."""
    if isinstance(module, nn.modules.conv._ConvNd) or "expert" not in f"{name} {type(module).__name__}".lower():
        return []
    return [key for key, param in module.named_parameters(recurse=False) if len(shape_of(param)) == 3]


def _unprojected_weights(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings, of the output head, tied or not, of routers, and what stages share."""
    embeddings = [module.weight for module in model.modules() if _is_embedding(module)]
    excluded = {id(weight) for weight in embeddings}
    shared = getattr(model, TIED, None)
    excluded |= {id(param) for param in shared.parameters()} if isinstance(shared, nn.ModuleDict) else set()
    routers = [(module, _ROUTERS.get(type(module).__name__)) for module in model.modules()]
    excluded |= {id(getattr(module, key).weight) for module, key in routers if key is not None}
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", None)
        head = head() if callable(head) else None
        if head is not None and getattr(head, "weight", None) is not None:
            excluded.add(id(head.weight))
    linears = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    excluded |= {id(module.weight) for name, module in linears if name.rpartition(".")[2] in HEAD_NAMES}
    # A model of one's own: its last linear layer, shaped as an embedding, maps back to the vocabulary.
    if linears and any(shape_of(linears[-1][1].weight) == shape_of(weight) for weight in embeddings):
        excluded.add(id(linears[-1][1].weight))
    return excluded


def find_projected_weights(model: nn.Module, target_modules: Sequence[str] | None = None) -> dict[int, str]:
    """The weights of a model that a rank applies to, none if there are none.

    Without `target_modules`: the weights of `nn.Linear`, of transformers' `Conv1D`, and 3-D expert tensors; not the
    output head, a head tied to the embedding, embeddings, the routers of DeepSpeed's MoE layers, what the stages of a
    pipeline share, norms or biases. With it: the weights of those kinds (head and routers too) whose module's name
    contains one of the substrings.

    Returns:
        Parameter names by `id` of the parameter; of a pipeline those of all stages, other stages' on the meta device.
    """
    model = whole_model(model)
    excluded = set() if target_modules is not None else _unprojected_weights(model)
    found = {}
    for name, module in model.named_modules():
        if target_modules is not None and not any(target in name for target in target_modules):
            continue
        keys = ["weight"] if _is_linear(module) else _expert_tensors(name, module)
        for key in keys:
            weight = getattr(module, key)
            if id(weight) not in excluded:
                found[id(weight)] = f"{name}.{key}" if name else key
    return found


def find_named_weights(
    named: Iterable[tuple[str, Tensor]], target_modules: Sequence[str] | None = None
) -> dict[int, str]:
    """The parameters that a rank applies to as far as their names tell, for want of the model.

    Every 2-D parameter and every 3-D one with "expert" in its name, but not biases and norms; embeddings, known by
    "embed", `wte`, `wpe` or `shared` in their names; nor, without `target_modules`, the routers of DeepSpeed's MoE
    layers and the output head, known by `HEAD_NAMES`, or last and of an embedding's shape. A name of "" tells nothing:
    then every 2-D parameter.

    Args:
        named: names, as `nn.Module.named_parameters` gives them, and parameters, in the model's order.
        target_modules: substrings of the names of the modules to project.

    Returns:
        Parameter names by `id` of the parameter.
    """
    found, embeddings, last = {}, set(), (0, ())
    for name, param in named:
        module, _, key = name.rpartition(".")
        parts, shape = module.lower().split("."), shape_of(param)
        if not (len(shape) == 2 or (len(shape) == 3 and "expert" in name.lower())) or key.endswith("bias"):
            continue
        head = parts[-1] in HEAD_NAMES
        if not head and (parts[0] == TIED or any("embed" in part or part in _EMBEDDINGS for part in parts)):
            embeddings.add(shape)
            continue
        last = (id(param), shape)
        plain = not head and not module.endswith(_ROUTER_NAMES)
        wanted = plain if target_modules is None else any(target in module for target in target_modules)
        if wanted and not module.endswith(_NORM_SUFFIXES):
            found[id(param)] = name
    if target_modules is None and last[1] in embeddings:
        found.pop(last[0], None)
    return found


def projected_weights(
    model: nn.Module, target_modules: Sequence[str] | None = None, optimizer: str = FIRA_ADAM.name
) -> dict[int, str]:
    """As `find_projected_weights`, where `target_modules` must match some; messages begin with the optimizer's name.

    Raises:
        ValueError: `target_modules` match nothing.
    """
    found = find_projected_weights(model, target_modules)
    if not found and target_modules is not None:
        names = [name for name, module in whole_model(model).named_modules() if _is_linear(module)]
        raise ValueError(
            f"{optimizer}: target_modules = {list(target_modules)!r} match no linear module of "
            f"{type(model).__name__}; use parts of names such as {some_names(names)}."
        )
    return found


def projected_elsewhere(
    model: nn.Module | None, rank: int | None, target_modules: Sequence[str] | None = None
) -> list[tuple[str, tuple[int, ...], int]]:
    """Names, shapes and rank of the weights that a rank applies to and other stages of a pipeline hold.

    Args:
        model: of which nothing is elsewhere, or a stage of a pipeline; None where it is not known.
        rank: of the constructor or the JSON config.
        target_modules: substrings of the names of the modules to project.
    """
    if model is None or rank is None or not is_pipeline(model):
        return []
    names = set(find_projected_weights(model, target_modules).values())
    names -= {name for name, _ in model.named_parameters()}
    return [(name, shape_of(param), rank) for name, param in whole_model(model).named_parameters() if name in names]


def some_names(names: Sequence[str]) -> str:
    """A few module names for a message, by their last parts."""
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(repr(leaf) for leaf in leaves[:6]) or "those that named_modules() gives"


def undecayed_weights(model: nn.Module) -> set[int]:
    """Identities of biases and of norm weights, which usual recipes keep from weight decay."""
    undecayed = set()
    for name, module in model.named_modules():
        is_norm = type(module).__name__.lower().endswith("norm") or name.rpartition(".")[2].endswith(_NORM_SUFFIXES)
        for key, param in module.named_parameters(recurse=False):
            if is_norm or key.endswith("bias") or len(shape_of(param)) < 2:
                undecayed.add(id(param))
    return undecayed
