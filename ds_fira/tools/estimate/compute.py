"""The estimate: bytes per GPU of AdamW, GaLore, LoRA and Fira on a model, and whether they fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from ds_fira.core.algorithms import FIRA_ADAM, KEY, algorithm_of
from ds_fira.core.selection import find_projected_weights, shape_of
from ds_fira.optim.expert_groups import keys_of
from ds_fira.optim.presets import PRESET, PRESETS, preset_mark, size_of, values_of
from ds_fira.optim.settings import check_params
from ds_fira.optim.state_size import adamw_bytes, formula_bytes
from ds_fira.sharding.projection import PROJECT_FULL_RANK, is_projected
from ds_fira.tools.dry_run import plan_run
from ds_fira.tools.estimate.activations import KNOWN, Activations, activations_of
from ds_fira.tools.estimate.cards import GIB, Available
from ds_fira.tools.estimate.memory import RankMemory, rank_memory
from ds_fira.tools.estimate.methods import COMPARED, RELATIVES, compare_methods
from ds_fira.tools.estimate.model import load_model
from ds_fira.tools.estimate.setup import Setup

# Share of a card left to the CUDA context, the allocator's gaps and an optimizer step's own temporaries.
MARGIN = 0.05


@dataclass(frozen=True)
class MethodEstimate:
    """One method's memory.

    Attributes:
        method: one of `METHODS`.
        by_rank: of every data-parallel rank.
        activations_per_sequence: of a micro-batch of one sequence, None where not known.
    """

    method: str
    by_rank: tuple[RankMemory, ...]
    activations_per_sequence: Activations | None

    @property
    def largest(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.by_rank, key=lambda memory: memory.total)

    def largest_batch(self, available: Available) -> int | None:
        """Sequences in the largest micro-batch that fits; 0 where none does, None where activations are not known."""
        if self.activations_per_sequence is None:
            return None
        # More would not fit without anything else.
        batches = range(1, 2 * int(available.device) // self.activations_per_sequence.most + 2)
        return bisect_left(batches, True, key=lambda batch: not fits(self.with_batch(batch), available))

    def with_batch(self, batch_size: int) -> MethodEstimate:
        """The same with another micro-batch; activations must be known."""
        activations = self.activations_per_sequence.times(batch_size)
        by_rank = (replace(memory, device=memory.device.with_activations(activations)) for memory in self.by_rank)
        return replace(self, by_rank=tuple(by_rank))


@dataclass(frozen=True)
class Estimate:
    """The memory of a model under a setup.

    Attributes:
        model: as it was named.
        parameters: elements of its weights.
        projected_matrices: matrices with low-rank state.
        cut_matrices: those that partition boundaries cut.
        saving: share of AdamW's state elements that the paper's formula saves.
        setup: of the run.
        params: settings of FiraAdam.
        presets: by name, what each gives for this model, or only that of `params`, which win over it; the width and the
            depth that it goes by.
        methods: estimates by name, in the order of `METHODS`.
        notes: what the figures leave out or suppose, one sentence each.
    """

    model: str
    parameters: int
    projected_matrices: int
    cut_matrices: int
    saving: float
    setup: Setup
    params: dict[str, object]
    presets: dict[str, dict[str, object]]
    methods: dict[str, MethodEstimate]
    notes: tuple[str, ...]


def estimate(
    model: str | Path | nn.Module,
    setup: Setup | None = None,
    methods: Sequence[str] = COMPARED,
    optimizer: str = FIRA_ADAM.name,
    **params: object,
) -> Estimate:
    """Estimate the memory that training a model takes on every rank.

    Args:
        model: one of `ds_fira.tools.models.NAMES`, a transformers config file, a folder, a hub id, or a module on any
            device, of which only shapes are read.
        setup: of the run; its defaults where None.
        methods: those of `METHODS` to estimate.
        optimizer: what "Fira" stands for, such as `FiraRMSProp`; the others are compared with FiraAdam alone.
        **params: its settings, as in a JSON config; `rank` is also GaLore's, APOLLO's and LoRA's.

    Returns:
        Bytes by method, rank and category.

    Raises:
        ValueError: there is no such model, a setting is not legal, or the rank is missing or
            larger than every projected weight; one sentence.
    """
    setup = setup or Setup()
    if params.get("rank") is None:
        raise ValueError("--rank is missing; give the subspace rank, such as 128.")
    module = model if isinstance(model, nn.Module) else load_model(model)
    if any(map(keys_of, module.parameters())):
        raise ValueError(
            f"{type(module).__name__} has MoE layers of DeepSpeed, whose experts lie on ranks of their own, which is "
            "not estimated; ask ds-fira doctor for FiraAdam's states, or give a dense model."
        )
    kind = algorithm_of({KEY: optimizer})
    for relative in RELATIVES:
        if kind is not FIRA_ADAM and relative in methods:
            raise ValueError(
                f"optimizer = {optimizer!r} does not go with {relative} among the methods; leave one of them out."
            )
    run = plan_run(module, setup.gpus, setup.zero_stage, kind, **params)
    ranked = [(shape, group.settings) for group in run.groups if "rank" in group.settings for shape in group.shapes]
    largest = max((min(shape[-2:]) for shape, _ in ranked), default=math.inf)
    if params["rank"] > largest:
        raise ValueError(
            f"--rank = {params['rank']} is larger than the smaller side of every projected weight, {largest} at most; "
            "give a smaller rank."
        )
    unprojected = sum(not is_projected(shape, settings) for shape, settings in ranked)
    config = getattr(module, "config", None)
    sequence = activations_of(config, setup.seq_length, setup.weight_bytes, setup.activation_checkpointing)
    found = {}
    checked = check_params(params, algorithm=kind)
    for method in compare_methods(module, run, setup, checked, methods):
        by_rank = tuple(
            rank_memory(method.buffers, setup, rank, method.state_bytes(rank), method.frozen)
            for rank in range(setup.gpus if setup.sharded else 1)
        )
        draft = MethodEstimate(method.name, by_rank, sequence)
        found[method.name] = draft if sequence is None else draft.with_batch(setup.batch_size)
    return Estimate(
        model=type(module).__name__ if isinstance(model, nn.Module) else str(model),
        parameters=sum(param.numel() for param in module.parameters()),
        projected_matrices=sum(record.matrices for record in run.records),
        cut_matrices=sum(len(group.layout.split) for group in run.groups if group.layout is not None),
        saving=1 - formula_bytes(run.records) / adamw_bytes(run.records),
        setup=setup,
        params=params,
        presets=_presets(module, params, checked) if kind is FIRA_ADAM and "Fira" in methods else {},
        methods=found,
        notes=tuple(_notes(unprojected, setup, config, sequence, methods)),
    )


def _presets(
    module: nn.Module, params: Mapping[str, object], checked: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """What presets give for a model: all of them, or the one that is named, with what the user sets instead."""
    projected = find_projected_weights(module, checked["target_modules"])
    trained = [param for param in module.parameters() if id(param) in projected and param.requires_grad]
    matrices = [(projected[id(param)], shape_of(param), checked["rank"]) for param in trained]
    named = params.get(PRESET)
    found = {}
    for name in PRESETS if named is None else (named,):
        given = values_of(preset_mark(name, matrices))
        own = {} if named is None else {key: params[key] for key in given if key in params}
        found[name] = {**given, **own, **asdict(size_of(matrices))}
    return found


def fits(found: MethodEstimate, available: Available) -> bool:
    """Whether a method's largest rank fits, `MARGIN` of the device left free; unknown activations count as nothing."""
    return _lacking(found, available) is None


def _lacking(found: MethodEstimate, available: Available) -> tuple[int, float, str] | None:
    """Where a method does not fit: the bytes that it needs there, those that are there, and whose they are."""
    largest, usable = found.largest, (1 - MARGIN) * available.device
    if available.shared:
        return (largest.total, available.device, "process") if largest.total > usable else None
    if largest.device.total > usable:
        return largest.device.total, available.device, "GPU"
    return (largest.host.total, available.host, "process on the host") if largest.host.total > available.host else None


def require_fit(found: MethodEstimate, available: Available) -> None:
    """Stop where a method does not fit.

    Raises:
        ValueError: it does not; one sentence with what it needs, what there is and the remedies.
    """
    if lacking := _lacking(found, available):
        needed, there, where = lacking
        raise ValueError(
            f"the model needs about {needed / GIB:.2f} GiB for each {where} with {found.method} and {there / GIB:.2f} "
            "GiB are there; use a smaller model, a smaller micro-batch, activation checkpointing, ZeRO stage 2, more "
            "GPUs or optimizer offload."
        )


def _notes(
    unprojected: int, setup: Setup, config: object, sequence: Activations | None, methods: Sequence[str]
) -> Iterator[str]:
    if unprojected:
        yield (
            f"{unprojected} weights are stepped unprojected, since at their rank low-rank states save nothing: "
            f"{PROJECT_FULL_RANK} projects them."
        )
    if sequence is None:
        kind = getattr(config, "model_type", None)
        known = ", ".join(KNOWN)
        yield f"Activations are left out: no formula for the architecture {kind!r}; there is one for {known}."
    else:
        yield "Activations are an estimate by formula (ds_fira/tools/estimate/activations.py); the rest is counted."
    if "LoRA" in methods:
        yield "LoRA trains its adapters alone; embeddings, head and norms are frozen with the other weights."
    for name, algorithm in RELATIVES.items():
        if name in methods and setup.sharded:
            package = f"{name.lower()}-torch"
            yield f"{name} is {algorithm.name}, in the partitions of Fira: {package} itself has no form under ZeRO."
    yield (
        f"To fit, {1 - MARGIN:.0%} of the memory must do: the rest is for the CUDA context, the allocator's gaps and "
        "the temporaries of an optimizer step."
    )
