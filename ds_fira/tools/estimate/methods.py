"""AdamW, GaLore, APOLLO, LoRA and Fira on the same model: which param groups each has, and what states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from ds_fira.core.algorithms import APOLLO_ADAM, GALORE_ADAM, Algorithm
from ds_fira.core.selection import find_projected_weights
from ds_fira.sharding.geometry import matrices_of
from ds_fira.tools.dry_run import FlatBuffer, PlannedRun, plan_run
from ds_fira.tools.estimate.setup import Setup

METHODS = ("AdamW", "GaLore", "APOLLO", "LoRA", "Fira")
# Those that are compared where the user names none.
COMPARED = ("AdamW", "GaLore", "LoRA", "Fira")
# Methods of others that an optimizer of this package makes.
RELATIVES: Mapping[str, Algorithm] = {"GaLore": GALORE_ADAM, "APOLLO": APOLLO_ADAM}
# torch.optim keeps the step count of every tensor that it steps as a float32.
STEP_BYTES = 4


@dataclass(frozen=True)
class MethodPlan:
    """How a method's memory comes about.

    Attributes:
        name: one of `METHODS`.
        buffers: of its param groups.
        frozen: elements of weights that it does not train.
        state_bytes: of a rank.
    """

    name: str
    buffers: tuple[FlatBuffer, ...]
    frozen: int
    state_bytes: Callable[[int], int]


def lora_numel(shape: Sequence[int], rank: int) -> int:
    """Elements of a LoRA adapter of a weight: m r + n r for a matrix, the sum of them for experts."""
    return sum(_adapter(shape, rank))


def compare_methods(
    module: nn.Module, run: PlannedRun, setup: Setup, params: Mapping[str, object], methods: Sequence[str]
) -> list[MethodPlan]:
    """Some methods for one model, with checked settings of FiraAdam.

    AdamW is DeepSpeed's with one param group and states in the masters' dtype. LoRA trains its adapters alone, with
    AdamW. Fira, GaLore and APOLLO, as GaLoreAdam and ApolloAdam, are planned with their real partitions.
    """
    trained = [param for param in module.parameters() if param.requires_grad and param.numel() > 0]
    frozen = sum(param.numel() for param in module.parameters()) - sum(param.numel() for param in trained)
    projected = find_projected_weights(module, params["target_modules"])
    # In the module's order: what a boundary cuts depends on it.
    adapters = [n for param in trained if id(param) in projected for n in _adapter(param.shape, params["rank"])]
    dtype = setup.master_dtype

    def planned(name: str, own: PlannedRun) -> MethodPlan:
        buffers = tuple(group.buffer for group in own.groups)
        return MethodPlan(name, buffers, frozen, lambda dp_rank: own.state_bytes(dp_rank, dtype))

    def relative(name: str) -> MethodPlan:
        kind = RELATIVES[name]
        own = {key: value for key, value in params.items() if key not in kind.without}
        return planned(name, plan_run(module, setup.gpus, setup.zero_stage, kind, **own))

    weights = [param.numel() for param in trained]
    made: dict[str, Callable[[], MethodPlan]] = {
        "AdamW": lambda: _adamw("AdamW", weights, frozen, setup),
        **{name: partial(relative, name) for name in RELATIVES},
        "LoRA": lambda: _adamw("LoRA", adapters, frozen + sum(weights), setup),
        "Fira": lambda: planned("Fira", run),
    }
    return [made[name]() for name in METHODS if name in methods]


def _adapter(shape: Sequence[int], rank: int) -> list[int]:
    """Elements of the two factors of every matrix of a weight, as peft orders them: (r, n), then (m, r)."""
    shapes = [matrix.shape for matrix in matrices_of("", tuple(shape))]
    return [min(rank, m, n) * side for m, n in shapes for side in (n, m)]


def _adamw(name: str, numels: Sequence[int], frozen: int, setup: Setup) -> MethodPlan:
    """AdamW of torch over one param group: two moments in the dtype of what it steps."""
    buffer = FlatBuffer.of(numels, setup.gpus, setup.zero_stage)
    steps = 1 if setup.sharded else len(buffer.numels)
    held = 2 * setup.master_dtype.itemsize * buffer.partition_size + STEP_BYTES * steps
    return MethodPlan(name, (buffer,), frozen, lambda dp_rank: held)
