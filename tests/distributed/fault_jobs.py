"""What the ranks of a test pool run to see what a fault does to a training, and whether it recovers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_fira.engine.deepspeed import tensor_hash
from ds_fira.optim.registry import fira_of
from tests.distributed.resume_jobs import differences, snapshot
from tests.distributed.zero_jobs import Net, batches, build

# A projected weight and one of AdamW's.
FAULTY = ("layers.1.weight", "lm_head.weight")


def _one(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[2] = value
        return grad

    return spoil


def _repeated(grad: Tensor) -> Tensor:
    """All singular values are one."""
    return torch.eye(*grad.shape, dtype=grad.dtype)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": _one(torch.nan),
    "inf": _one(torch.inf),
    "zero": torch.zeros_like,
    "subnormal": functools.partial(torch.full_like, fill_value=1e-40),
    "rank 1": lambda grad: grad[:, :1] @ grad[:1],
    "repeated": _repeated,
    "1e30": lambda grad: grad * 1e30,
    "1e-30": lambda grad: grad * 1e-30,
    "spike": lambda grad: grad * 1e4,
}
# One rank's alone; the others are the same on all.
LONE = ("nan", "inf")


@dataclass
class Outcome:
    """What one rank tells of a training.

    Attributes:
        losses: over all ranks, by step.
        finite: whether weights and states are.
        skew: the largest |P'P - 1| of the bases held whole.
        hashes: of the module's parameters.
        steps: those that every whole matrix has counted.
    """

    losses: list[float]
    finite: bool
    skew: float
    hashes: list[int]
    steps: list[int]


def outcome(engine: Any, losses: list[float]) -> Outcome:
    """Look at an engine."""
    optimizer = fira_of(engine)
    states = [value for state in optimizer.state.values() for value in state.values()]
    weights = [param.detach() for param in engine.module.parameters()]
    masters = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    skew, steps = 0.0, []
    for state in optimizer.state.values():
        for key, value in state.items():
            if key.startswith("basis") and ".cut" not in key and value.numel():
                bases = value.double().reshape(-1, *value.shape[-2:])
                known = state[key.replace("basis", "refresh_step", 1)].reshape(-1) >= 0
                gram = bases.mT @ bases - torch.eye(bases.shape[-1], dtype=torch.float64)
                skew = max([skew, *gram[known].abs().flatten(1).amax(1).tolist()])
                steps += state[key.replace("basis", "step", 1)].reshape(-1).tolist()
    finite = all(bool(torch.isfinite(value).all()) for value in (*states, *weights, *masters))
    return Outcome(losses, finite, skew, tensor_hash.hash_tensors(weights).tolist(), steps)


def mean_loss(loss: Tensor) -> float:
    """Over all ranks."""
    total = loss.detach().double().reshape(1).clone()
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def train_through(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, when: list[int], kinds: list[str]
) -> dict[str, Outcome]:
    """Train once without a fault and once for every kind of fault, in `FAULTY` at the steps `when`, on one batch.

    Returns:
        By kind, "none" for the first.
    """
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    (tokens,) = batches(1, rank)
    found = {}
    for kind in ("none", *kinds):
        engine = build(ds_config, shapes)
        named = dict(engine.module.named_parameters())
        losses = []
        for step in range(steps):
            hooks = []
            if kind != "none" and step in when and (kind not in LONE or rank == last):
                hooks = [named[name].register_hook(FAULTS[kind]) for name in FAULTY]
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses.append(mean_loss(loss))
            for hook in hooks:
                hook.remove()
        found[kind] = outcome(engine, losses)
        del named
        engine.destroy()
    return found


def overflow(ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, at: list[int]) -> list[list[str]]:
    """Train in fp16 with an infinite gradient on the last rank at some steps; what each of those steps changed."""
    engine = build(ds_config, shapes)
    changed = []
    spoils = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    for step, tokens in enumerate(batches(steps, torch.distributed.get_rank())):
        before = snapshot(engine)
        hook = engine.module.layers[1].weight.register_hook(FAULTS["inf"]) if step in at and spoils else None
        engine.backward(engine(tokens))
        engine.step()
        if step in at:
            changed.append(differences(step, step, before, snapshot(engine)))
        if hook is not None:
            hook.remove()
    engine.destroy()
    return changed


class SkippingNet(Net):
    """`Net` of which one layer can be left out of a forward pass, as LayerDrop does."""

    skipped: int | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        layers = self.layers
        kept = [layer for i, layer in enumerate(layers) if i != self.skipped]
        try:
            self._modules["layers"] = kept  # type: ignore[assignment]
            return super().forward(tokens)
        finally:
            self._modules["layers"] = layers


def train_with_pauses(
    ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int, pause: range, how: str
) -> tuple[Outcome, list[float]]:
    """Train on one batch while layer 1 does not take part for some steps.

    Args:
        ds_config: DeepSpeed config.
        shapes: of the linear layers.
        steps: optimizer steps.
        pause: those in which it does not.
        how: "frozen" by `requires_grad_(False)`, "unused" on every rank, or "unused on one".

    Returns:
        The outcome, and how far the layer's weight moved in every step.
    """
    torch.manual_seed(0)
    model = SkippingNet(shapes)
    engine = build(ds_config, shapes, model=model)
    layer = engine.module.layers[1]
    (tokens,) = batches(1, torch.distributed.get_rank())
    losses, moved = [], []
    for step in range(steps):
        paused = step in pause
        if how == "frozen":
            layer.weight.requires_grad_(not paused)
        else:
            alone = how == "unused on one" and torch.distributed.get_rank() != 0
            engine.module.skipped = 1 if paused and not alone else None
        before = layer.weight.detach().clone()
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(mean_loss(loss))
        moved.append(float((layer.weight.detach() - before).abs().max()))
    found = outcome(engine, losses)
    del layer, model
    engine.destroy()
    return found, moved
