"""What a training would do, or be refused for: the checks of a start and the plans of an engine, gone through alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from ds_fira.core.settings import GroupSettings
from ds_fira.core.subspace import effective_rank
from ds_fira.engine.deepspeed.rehearsal import Rehearsal, read_file
from ds_fira.optim.settings import refuse_auto
from ds_fira.optim.state_size import adamw_bytes, formula_bytes
from ds_fira.tools.config_files import config_path
from ds_fira.tools.doctor.surroundings import KernelUse, Surroundings, kernel_use, surroundings
from ds_fira.tools.doctor.trainer import DROPPED, filled, places_of_auto
from ds_fira.tools.dry_run import PlannedGroup, PlannedRun, plan_run
from ds_fira.tools.estimate import Available, MethodEstimate, estimate, load_model, require_fit
from ds_fira.tools.estimate.from_config import setup_of

# Settings of a projected group that are shown beside its rank.
SHOWN = ("update_proj_gap", "alpha", "subspace", "residual", "residual_scale", "limiter", "state_dtype")
SHOWN_OF_ALL = ("lr", "weight_decay")
# And of a group with norms or biases.
SHOWN_OF_VECTORS = ("vector_lr_scale",)


@dataclass(frozen=True)
class Group:
    """One param group of the optimizer.

    Attributes:
        projected: whether its matrices have low-rank states; else they are stepped without a projection.
        names: of its parameters in the model.
        shapes: of its parameters, with how many there are.
        matrices: for each shape (m, n) of its matrices, how many, the projected side, and r = min(rank, m, n).
        settings: those that decide what a step does.
        partition_size: elements that a rank holds of its flat buffer.
    """

    projected: bool
    names: tuple[str, ...]
    shapes: dict[tuple[int, ...], int]
    matrices: dict[tuple[int, int], tuple[int, str, int]]
    settings: dict[str, object]
    partition_size: int


@dataclass(frozen=True)
class Split:
    """A matrix that a partition boundary splits.

    Attributes:
        name: in the model; an expert of a 3-D tensor has its index in brackets.
        shape: (m, n).
        way: "gathered", where `owner` steps it whole, or "low_rank", where each of `ranks` steps its rows.
        owner: the rank that holds its state; low-rank, that computes its basis.
        ranks: that hold a part of it.
        draws_basis: whether each of them draws its basis, low-rank, and nobody computes one.
    """

    name: str
    shape: tuple[int, int]
    way: str
    owner: int
    ranks: tuple[int, ...]
    draws_basis: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a training before it starts.

    Attributes:
        config: the file.
        model: as it was named.
        gpus: ranks.
        around: this machine and its packages.
        refusals: sentences with which the start would end, each with its remedy; none where it would train.
        warnings: what the start would warn of.
        ignored: keys that DeepSpeed does not read, each with the nearest that it does.
        notes: what this page leaves out or supposes.
        kernels: whether they would run; None where the settings are refused.
        training: optimizer, ZeRO stage, batch.
        parameters: elements of the model's weights.
        groups: of the optimizer, in its order.
        split: matrices that partition boundaries split.
        state_bytes: bytes of optimizer state on every rank.
        adamw_bytes: bytes that AdamW would hold in float32 over all ranks.
        formula_bytes: bytes of the paper's formula in float32 over all ranks.
        memory: of all categories by rank; None at stage 3, which is not estimated.
    """

    config: str
    model: str
    gpus: int
    around: Surroundings
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ignored: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kernels: KernelUse | None = None
    training: Mapping[str, object] = field(default_factory=dict)
    parameters: int = 0
    groups: tuple[Group, ...] = ()
    split: tuple[Split, ...] = ()
    state_bytes: tuple[int, ...] = ()
    adamw_bytes: int = 0
    formula_bytes: int = 0
    memory: MethodEstimate | None = None


def examine(
    config: str | Path,
    model: str | Path | nn.Module,
    gpus: int,
    trainer: Sequence[str] | None = None,
    seq_length: int = 1024,
    available: Available | None = None,
) -> Diagnosis:
    """Go through the start of a training without starting it.

    Args:
        config: a DeepSpeed config file, or the name of one of the package's.
        model: as `ds_fira.tools.estimate.load_model` takes it, or a module, of which only shapes are read.
        gpus: data-parallel ranks.
        trainer: arguments of the Hugging Face Trainer, `NAME=VALUE`, which fill in "auto"; None without a Trainer.
        seq_length: tokens in a sequence, for the activations.
        available: memory that a rank may use; None not to ask whether it fits.

    Returns:
        What would happen; `refusals` is empty where it would train.

    Raises:
        ValueError: there is no such file or model, or `gpus` is not legal; one sentence.
    """
    if gpus < 1:
        raise ValueError(f"--gpus = {gpus} is not legal; give a whole number of at least 1.")
    path, content = _read(config)
    module = model if isinstance(model, nn.Module) else load_model(model)
    name = type(module).__name__ if isinstance(model, nn.Module) else str(model)
    found = Diagnosis(str(path), name, gpus, surroundings(), parameters=sum(p.numel() for p in module.parameters()))
    try:
        if trainer is not None:
            content = filled(content, module, gpus, trainer)
        else:
            _refuse_auto(content)
        engine = Rehearsal(content, module, gpus)
    except ValueError as error:
        return replace(found, refusals=(str(error),))
    found = replace(
        found,
        refusals=tuple(engine.refusals),
        warnings=tuple(engine.said),
        ignored=engine.content.unread(),
        training=_training(engine),
    )
    if engine.made is None:
        return found
    stage, params = engine.zero_optimization_stage(), engine.optimizer_params() or {}
    run = plan_run(module, gpus, stage, engine.algorithm, **params)
    found = replace(
        found,
        kernels=kernel_use(params.get("kernels", "auto")),
        groups=tuple(_group(group) for group in run.groups),
        split=tuple(_splits(run)),
        state_bytes=tuple(run.state_bytes(rank if stage else 0, engine.master_dtype) for rank in range(gpus)),
        adamw_bytes=adamw_bytes(run.records),
        formula_bytes=formula_bytes(run.records),
        notes=tuple(_notes(engine)),
    )
    return _with_memory(found, engine, content, seq_length, available)


def _read(config: str | Path) -> tuple[Path, dict[str, object]]:
    path = Path(config)
    if not path.exists():
        path = config_path(str(config)) if path.suffix == "" and path.name == str(config) else path
    try:
        return path, read_file(path.read_text())
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a DeepSpeed config ({what}); give another file.") from None


def _refuse_auto(content: Mapping[str, object]) -> None:
    refuse_auto(content)
    places = [place for place in places_of_auto(content) if not place.startswith(DROPPED)]
    if places:
        raise ValueError(
            f"{', '.join(places)} = 'auto' in the DeepSpeed config is for the Hugging Face Trainer, which replaces it; "
            "give values, or the Trainer's arguments as --trainer NAME=VALUE."
        )


def _training(engine: Rehearsal) -> dict[str, object]:
    config, (dtype, _) = engine.read, engine.get_data_types()
    return {
        "optimizer": engine.algorithm.name,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(dtype).removeprefix("torch."),
        "master_weights": str(engine.master_dtype).removeprefix("torch."),
        "micro_batch": config.train_micro_batch_size_per_gpu,
        "accumulation": config.gradient_accumulation_steps,
        "batch": config.train_batch_size,
    }


def _group(group: PlannedGroup) -> Group:
    settings = GroupSettings.of(group.settings)
    projected, matrices = group.layout is not None, {}
    shapes = Counter(group.shapes)
    for shape, count in shapes.items() if projected else ():
        m, n = shape[-2:]
        experts = shape[0] if len(shape) == 3 else 1
        matrices[(m, n)] = (count * experts, settings.side_of((m, n)), effective_rank((m, n), settings.rank))
    shown = (*SHOWN_OF_ALL, *(SHOWN if projected else ()))
    shown += SHOWN_OF_VECTORS if min(map(len, shapes), default=2) < 2 and settings.vector_lr_scale != 1.0 else ()
    own = {name: group.settings[name] for name in shown if name in group.settings}
    return Group(projected, group.names, dict(shapes), matrices, own, group.partition_size)


def _splits(run: PlannedRun) -> list[Split]:
    return [
        Split(matrix.name, matrix.shape, matrix.way, matrix.owner, tuple(matrix.sharers), matrix.draws_basis)
        for group in run.groups
        if group.layout is not None
        for matrix in group.layout.split
    ]


def _notes(engine: Rehearsal) -> list[str]:
    notes = []
    if engine.read.zero_config.round_robin_gradients and engine.zero_optimization_stage() in (1, 2):
        notes.append(
            "zero_optimization.round_robin_gradients reorders the parameters of a group, which is not planned here: "
            "other matrices may be split."
        )
    if (size := engine.autotp_size()) > 1:
        notes.append(
            f"tensor_parallel.autotp_size = {size} makes {size} processes of every data-parallel rank: groups, "
            f"matrices and states are told as if these were one, and each of them holds about 1/{size} of the states."
        )
    if places := list(places_of_auto(engine.content)):
        notes.append(f"DeepSpeed takes its default for {', '.join(places)} = 'auto'.")
    return notes


def _with_memory(
    found: Diagnosis, engine: Rehearsal, content: Mapping[str, object], seq_length: int, available: Available | None
) -> Diagnosis:
    """With the bytes of all categories, where they can be estimated, and a refusal where they do not fit."""
    if engine.autotp_size() > 1:
        return replace(found, notes=(*found.notes, "Memory beside the states is not estimated for slices of a model."))
    settled = {**content, "train_micro_batch_size_per_gpu": engine.read.train_micro_batch_size_per_gpu}
    try:
        setup = setup_of(
            settled,
            gpus=found.gpus,
            seq_length=seq_length,
            activation_checkpointing="activation_checkpointing" in content,
        )
        params = engine.optimizer_params()
        of_method = estimate(engine.module, setup, ["Fira"], optimizer=engine.algorithm.name, **params)
    except ValueError as error:
        return replace(found, notes=(*found.notes, f"The memory beside the states is not estimated: {error}"))
    found = replace(found, memory=of_method.methods["Fira"], notes=(*found.notes, *of_method.notes))
    if available is not None:
        try:
            require_fit(found.memory, available)
        except ValueError as error:
            return replace(found, refusals=(*found.refusals, str(error)))
    return found
