"""The Hugging Face Trainer by name: `TrainingArguments(optim="fira_adamw", optim_args="rank=128,alpha=0.25")`.

    import ds_fira.hf
    ds_fira.hf.register()  # before TrainingArguments are made

With DeepSpeed the Trainer's config gets FiraAdam under "optimizer", as if its file had it; without, the Trainer makes
a FiraAdam of its model. `NAMES` lists the names, one for each optimizer. `ds_fira.run` registers by itself, for scripts
that cannot be edited. On one process without DeepSpeed "step_in_backward=true" among the `optim_args` has every
parameter stepped as its gradient comes.

What it relies on, of transformers 5: `OptimizerNames` lists the names, `trainer_optimizer._OPTIMIZER_HANDLERS` makes
optimizers by them, and `integrations.deepspeed.deepspeed_optim_sched` chooses the optimizer under DeepSpeed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ds_fira.engine.backward_steps import step_in_backward
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.fira_adam import ApolloAdam, FiraAdam, GaLoreAdam
from ds_fira.optim.param_groups import param_groups
from ds_fira.optim.settings import check_params

# What `optim` may say; transformers' own "galore_adamw" and "apollo_adamw" are the packages of these names.
NAMES: dict[str, type[LowRankOptimizer]] = {
    "fira_adamw": FiraAdam,
    "fira_galore_adamw": GaLoreAdam,
    "fira_apollo_adamw": ApolloAdam,
}
# What the Trainer has unless its user says otherwise, where FiraAdam has a better value of its own.
TRAINERS_EPS, TRAINERS_LR = 1e-8, 5e-5
# Among `optim_args`, what is no setting of an optimizer: `ds_fira.step_in_backward`.
RELEASE = "step_in_backward"
_PACKAGE = "transformers"


def register() -> None:
    """Make `NAMES` names that the Trainer knows, as in `optim="fira_adamw"`; again without effect.

    Raises:
        ImportError: transformers is not installed, or its Trainer has no table of optimizers.
    """
    for name, prepare in _PREPARED.items():
        prepare(importlib.import_module(name))


def register_when_imported() -> None:
    """The same once a script imports the Trainer, so that one without it does not wait for its imports."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name in [name for name in _PREPARED if name in sys.modules]:
        _PREPARED[name](sys.modules[name])
    sys.meta_path.insert(0, _Finder())


def settings_of(args: Any) -> dict[str, Any]:
    """The optimizer's settings in `TrainingArguments`: those of `optim_args`, and what the Trainer has for all.

    Raises:
        ValueError: one is unknown, out of range or written otherwise than name=value; or there is no rank.
    """
    given = {name: value for name, value in _parsed(args).items() if name != RELEASE}
    where = f'optim_args of optim = "{_name(args)}"'
    check_params(given, where, NAMES[_name(args)].algorithm)
    if given.get("rank") is None:
        raise ValueError(f'{where} has no rank, so nothing would be projected; add one, such as optim_args="rank=128".')
    settings = {"betas": [args.adam_beta1, args.adam_beta2], "weight_decay": args.weight_decay}
    if args.adam_epsilon != TRAINERS_EPS:
        settings["eps"] = args.adam_epsilon
    if not ("preset" in given and args.learning_rate == TRAINERS_LR):
        settings["lr"] = args.learning_rate
    return {**settings, **given}


def _name(args: Any) -> str:
    """The key of `NAMES` that `TrainingArguments` have."""
    return str(getattr(args.optim, "value", args.optim))


def _parsed(args: Any) -> dict[str, Any]:
    """`name=value` pairs between commas, as the Trainer writes them in `optim_args`; a list is written a;b."""
    found: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in (args.optim_args or "").split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise ValueError(
                f'optim_args of optim = "{_name(args)}" has {pair!r}; write name=value pairs between commas.'
            )
        found[name] = [_value(item) for item in value.split(";")] if ";" in value else _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _add_names(training_args: ModuleType) -> None:
    """Add the names to the Trainer's enumeration, which has no way to do so."""
    names = training_args.OptimizerNames
    for name in NAMES:
        if name in names._value2member_map_:
            continue
        member = str.__new__(names, name)
        member._name_, member._value_ = name.upper(), name
        names._member_map_[member._name_] = names._value2member_map_[name] = member
        names._member_names_.append(member._name_)


def _add_handlers(trainer_optimizer: ModuleType) -> None:
    """Let the Trainer make the optimizers, under DeepSpeed by the config."""
    handlers = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None)
    if handlers is None:
        version = importlib.import_module(_PACKAGE).__version__
        raise ImportError(
            f"ds_fira: the Trainer of transformers {version} has no table of optimizers to add {', '.join(NAMES)} to; "
            "update it to 5, or name FiraAdam in the DeepSpeed config."
        )
    if not handlers.keys().isdisjoint(NAMES):
        return
    handlers.update(dict.fromkeys(NAMES, _make))
    module = importlib.import_module("transformers.integrations.deepspeed")
    choose = module.deepspeed_optim_sched

    def choose_fira(trainer: Any, hf_config: Any, args: Any, steps: int, parameters: list[nn.Parameter]) -> Any:
        if getattr(args, "optim", None) in NAMES:
            if _releases(args):
                reason = "DeepSpeed, which reduces gradients after the backward pass; remove one of them"
                raise ValueError(_refused(args, reason))
            _put_into(hf_config.config, args)
            parameters = _decayed_apart(trainer, parameters, args.weight_decay)
        return choose(trainer, hf_config, args, steps, parameters)

    module.deepspeed_optim_sched = choose_fira


def _make(context: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What the Trainer makes without DeepSpeed: the optimizer and its arguments, the param groups under "params"."""
    settings, args = settings_of(context.args), context.args
    name = _name(args)
    version = (getattr(args, "fsdp_config", None) or {}).get("version", 2)
    if getattr(args, "fsdp", None) and int(version) != 2:
        raise ValueError(
            f'optim = "{name}" does not train under FSDP with fsdp_config version = {version}, which flattens '
            "parameters so that no rank knows a matrix; set version to 2, or use DeepSpeed's ZeRO."
        )
    if context.model is None:
        raise ValueError(f'optim = "{name}" needs the model; give it to get_optimizer_cls_and_kwargs.')
    settings["betas"] = tuple(settings["betas"])
    rank, modules = settings.pop("rank"), settings.pop("target_modules", None)
    kind = NAMES[name]
    arguments = {"params": param_groups(context.model, rank, modules, optimizer=kind.__name__, **settings)}
    return _making_steps(args) if _releases(args) else kind, arguments


def _releases(args: Any) -> bool:
    """Whether `optim_args` ask for steps in the backward pass."""
    value = _parsed(args).get(RELEASE, False)
    if not isinstance(value, bool):
        raise ValueError(
            f'optim_args of optim = "{_name(args)}": {RELEASE} = {value!r} is not legal; give true or false.'
        )
    return value


def _refused(args: Any, reason: str) -> str:
    return f'optim_args of optim = "{_name(args)}": {RELEASE} = true does not go with {reason}.'


def _making_steps(args: Any) -> Callable[[], Callable[..., LowRankOptimizer]]:
    """The Trainer's factory of what steps in the backward pass, and clips by the norm of the step before."""
    faults = {
        f"gradient_accumulation_steps = {args.gradient_accumulation_steps}, whose sum it cannot wait for; give 1 and a "
        "larger batch": args.gradient_accumulation_steps > 1,
        "FSDP under the Trainer, which shards the model when the optimizer has been made; call "
        "ds_fira.step_in_backward behind fully_shard, in a loop of your own": bool(getattr(args, "fsdp", None)),
        f"{args.world_size} processes under the Trainer, whose DistributedDataParallel keeps all gradients; start one, "
        "or call ds_fira.step_in_backward with a process_group": args.world_size > 1,
        "fp16 = true, whose loss scale needs all gradients at once; train in bfloat16": args.fp16,
    }
    for reason, is_set in faults.items():
        if is_set:
            raise ValueError(_refused(args, reason))

    def made(model: nn.Module, **arguments: Any) -> LowRankOptimizer:
        optimizer = NAMES[_name(args)](**arguments)
        step_in_backward(model, optimizer, max_norm=args.max_grad_norm or None)
        return optimizer

    return lambda: made


def _put_into(config: dict[str, Any], args: Any) -> None:
    """Name the optimizer in a DeepSpeed config that names none; a second training finds it there."""
    name = _name(args)
    block = {"type": NAMES[name].__name__, "params": settings_of(args)}
    if config.get("optimizer", block) != block:
        raise ValueError(
            f'optim = "{name}" contradicts the DeepSpeed config, which names {config["optimizer"].get("type")}; take '
            '"optimizer" out of the config, or leave optim and optim_args.'
        )
    config["optimizer"] = block


def _decayed_apart(trainer: Any, parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The Trainer's two groups: with weight decay, and norms and biases without."""
    names = set(trainer.get_decay_parameter_names(trainer.model))
    decayed = {id(param) for name, param in trainer.model.named_parameters() if name in names}
    parts = ([p for p in parameters if id(p) in decayed], [p for p in parameters if id(p) not in decayed])
    decays = zip(parts, (weight_decay, 0.0), strict=True)
    return [{"params": part, "weight_decay": decay} for part, decay in decays if part]


_PREPARED: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_names,
    "transformers.trainer_optimizer": _add_handlers,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Prepares a module of `_PREPARED` behind its import."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, whose loader prepares it; None for all others."""
        if fullname not in _PREPARED:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def prepared(module: ModuleType) -> None:
            execute(module)
            _PREPARED[fullname](module)

        spec.loader.exec_module = prepared  # type: ignore[method-assign]
        return spec
