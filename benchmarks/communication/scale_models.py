"""Models of 7 to 141 billion parameters as shapes alone, and their plans over any number of ranks: no memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from ds_fira.core.algorithms import FIRA_ADAM
from ds_fira.core.selection import projected_weights
from ds_fira.core.settings import GroupSettings
from ds_fira.engine.binding import bind_layout
from ds_fira.engine.fsdp2.attach import MAX_FLAT_NUMEL
from ds_fira.engine.fsdp2.shards import Packed, Shards
from ds_fira.sharding.plan import GroupLayout, plan_groups, plan_hash, split_by_size
from ds_fira.sharding.projection import is_projected, state_numel
from ds_fira.tools.dry_run import plan_run


@dataclass(frozen=True)
class Shape:
    """A decoder of the LLaMA family, as its published config has it.

    Attributes:
        hidden, inner, layers, heads, kv_heads, vocabulary: sizes.
        rank: of the subspace.
        experts: in each layer; 0 for a dense one.
        chosen: experts that a token goes through.
        stacked: whether the experts of a layer are 3-D tensors, else each has matrices of its own.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rank: int
    experts: int = 0
    chosen: int = 0
    stacked: bool = False

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """The weights of one layer's attention."""
        narrow = self.hidden // self.heads * self.kv_heads
        wide = {"q_proj": self.hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": self.hidden}
        return {name: (rows, self.hidden) for name, rows in wide.items()}

    @property
    def mlp(self) -> dict[str, tuple[int, int]]:
        """The weights of one layer's MLP, or of one expert."""
        up = (self.inner, self.hidden)
        return {"gate_proj": up, "up_proj": up, "down_proj": (self.hidden, self.inner)}

    def parameters(self, active: bool = False) -> int:
        """Parameters, all or those that a token goes through, norms left out."""
        attention, mlp = (sum(m * n for m, n in part.values()) for part in (self.attention, self.mlp))
        times = (self.chosen if active else self.experts) or 1
        return self.layers * (attention + times * mlp) + 2 * self.vocabulary * self.hidden

    def module(self) -> nn.Module:
        """The model on the meta device."""

        def linears(shapes: dict[str, tuple[int, int]]) -> nn.ModuleDict:
            made = {name: nn.Linear(n, m, bias=False, device="meta") for name, (m, n) in shapes.items()}
            return nn.ModuleDict(made)

        def layer() -> nn.ModuleDict:
            parts = {"attention": linears(self.attention), "norm": nn.LayerNorm(self.hidden, device="meta")}
            if not self.experts:
                return nn.ModuleDict({**parts, "mlp": linears(self.mlp)})
            router = linears({"gate": (self.experts, self.hidden)})
            experts: nn.Module = nn.ModuleList(linears(self.mlp) for _ in range(0 if self.stacked else self.experts))
            for name, shape in self.mlp.items() if self.stacked else ():
                experts.register_parameter(name, nn.Parameter(torch.empty(self.experts, *shape, device="meta")))
            return nn.ModuleDict({**parts, "router": router, "experts": experts})

        # Not initialised, for which torch would import its compiler.
        embedding = nn.Embedding.from_pretrained(torch.empty(self.vocabulary, self.hidden, device="meta"), freeze=False)
        head = nn.Linear(self.hidden, self.vocabulary, bias=False, device="meta")
        layers = nn.ModuleList(layer() for _ in range(self.layers))
        return nn.ModuleDict({"embedding": embedding, "layers": layers, "lm_head": head})


# LLaMA 7B of the paper; LLaMA-3 70B (LLaMA-2's differs by its vocabulary of 32,000); Mixtral 8 x 22B.
MODELS = {
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, rank=256),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, rank=1024),
    "8x22b": Shape(6144, 16384, 56, 48, 8, 32768, rank=512, experts=8, chosen=2),
    "8x22b, 3-D": Shape(6144, 16384, 56, 48, 8, 32768, rank=512, experts=8, chosen=2, stacked=True),
}


@lru_cache(maxsize=4)
def module_of(shape: Shape) -> nn.Module:
    """A model, made once for all plans of it."""
    return shape.module()


@dataclass(frozen=True)
class Plan:
    """A model's plan over the ranks that exchange with each other.

    Attributes:
        ranks: that hold the parameters together, each some.
        layouts: of the projected param groups, with their settings.
        beside: elements of state that a rank holds of what is not projected.
        formula: elements of state of the whole model, the paper's mr + 2nr + 1 a matrix.
        seconds: that one rank takes for it: the groups, the plan, its hash and what it has to do itself.
    """

    ranks: int
    layouts: tuple[tuple[GroupLayout, GroupSettings], ...]
    beside: int
    formula: int
    seconds: float

    @property
    def matrices(self) -> int:
        """Matrices that are projected."""
        unsplit = sum(len(held) for layout, _ in self.layouts for held in layout.unsplit)
        return unsplit + sum(len(layout.split) for layout, _ in self.layouts)

    def states(self) -> np.ndarray:
        """Elements of state on every rank."""
        held = np.full(self.ranks, self.beside, dtype=np.int64)
        for layout, settings in self.layouts:
            for rank, shards in enumerate(layout.unsplit):
                held[rank] += sum(_numel(shard.shape, settings) for shard in shards)
            for matrix in layout.split:
                if matrix.way == "gathered":
                    held[matrix.owner] += matrix.state_numel(matrix.owner)
                else:
                    held[list(matrix.sharers)] += np.array(matrix.sums.state_numel)
        return held


def plan(model: str, ranks: int, mode: str, rank: int | None = None, gap: int = 200, dp_rank: int = 0) -> Plan:
    """Plan a model as an engine would.

    Args:
        model: key of `MODELS`.
        ranks: that training has.
        mode: "zero2", "zero3", "fsdp2", or "hsdp8" and the like: FSDP2 within so many ranks, replicas across.
        rank: of the subspace; the model's own if None.
        gap: steps between two refreshes.
        dp_rank: the rank whose part is looked up.
    """
    shape = MODELS[model]
    module, rank = module_of(shape), rank or shape.rank
    group = min(ranks, int(mode.removeprefix("hsdp"))) if mode.startswith("hsdp") else ranks
    start = time.process_time()
    given = {"rank": rank, "update_proj_gap": gap, "subspace": "randomized"}
    if mode.startswith("zero"):
        run = plan_run(module, ranks, zero_stage=int(mode[-1]), **given)
        layouts = [(each.layout, GroupSettings.of(each.settings)) for each in run.groups if each.layout is not None]
        beside = sum(2 * each.partition_size for each in run.groups if each.layout is None)
    else:
        layouts, beside = _sharded(module, group, given)
    plan_hash(layout for layout, _ in layouts)
    communicator = SimpleNamespace(dp_rank=dp_rank, dp_size=group)
    names = [matrix.name for layout, _ in layouts for matrix in (*layout.split, *layout.unsplit[dp_rank])]
    numbers = {name: number for number, name in enumerate(names)}
    for layout, _ in layouts:
        bind_layout(layout, communicator, numbers)
    seconds = time.process_time() - start
    projected = [
        (matrix.shape, settings)
        for layout, settings in layouts
        for matrix in (*layout.split, *(shard for held in layout.unsplit for shard in held))
    ]
    rest = sum(param.numel() for param in module.parameters()) - sum(m * n for (m, n), _ in projected)
    formula = 2 * rest + sum(_numel(*each) for each in projected)
    return Plan(group, tuple(layouts), beside, formula, seconds)


def _sharded(
    module: nn.Module, ranks: int, group: dict[str, object]
) -> tuple[list[tuple[GroupLayout, GroupSettings]], int]:
    """The layouts of what FSDP2 cuts in rows, as `engine.fsdp2.attach` makes them; elements of state of the rest.

    Of a 3-D tensor that is its second dimension, as a `shard_placement_fn` gives it: it has fewer experts than ranks.
    """
    settings, chosen = GroupSettings.of(group), projected_weights(module)
    cut, beside = [], 0
    for name, param in module.named_parameters():
        shards = Shards.of_dimension(name, tuple(param.shape), int(param.ndim == 3), ranks)
        if id(param) in chosen and is_projected(tuple(param.shape), group):
            cut.append((shards.stepped_numel(0), shards))
        else:
            beside += len(FIRA_ADAM.states) * len(shards.rows[0]) * len(shards.columns[0])
    packed = [Packed(part) for part in split_by_size(cut, MAX_FLAT_NUMEL)]
    buffers = [(each.fragments(), each.begin(len(each.shards), 0)) for each in packed]
    layouts = plan_groups(buffers, ranks, [settings] * len(buffers), evenly_sharded=True, beside=beside)
    return [(layout, settings) for layout in layouts], beside


def _numel(shape: tuple[int, int], settings: GroupSettings) -> int:
    return state_numel(shape, settings.rank, settings.proj_type, settings.formulation)
