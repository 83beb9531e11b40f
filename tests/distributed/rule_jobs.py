"""Rules of users, and what the ranks of a test pool run with them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

import ds_fira
from tests.distributed.resize_jobs import rows, run
from tests.distributed.zero_jobs import Net, resume, train, try_to_build

__all__ = ["alone", "resume", "run", "train", "try_to_build"]


class Lion(ds_fira.Rule):
    """Sign momentum (arXiv 2302.06675)."""

    betas: Annotated[tuple[float, float], Field(description="two numbers below 1")] = (0.9, 0.99)
    states: ClassVar = {"momentum": "first"}
    elementwise: ClassVar = True

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """N = sign(b1 M + (1 - b1) R), then M <- b2 M + (1 - b2) R, by a new tensor."""
        first, second = self.betas
        before = states["momentum"]
        states["momentum"] = second * before + (1.0 - second) * grad
        return torch.sign(first * before + (1.0 - first) * grad)


class AdaGrad(ds_fira.Rule):
    """AdaGrad with momentum: a state of every kind, a step size that changes, and N in the memory of a state."""

    eps: float = 1e-6
    states: ClassVar = {"total": "second", "velocity": "first", "seen": "reset"}
    elementwise: ClassVar = True

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """The velocity itself."""
        states["total"].addcmul_(grad, grad)
        states["seen"] += 1.0
        return states["velocity"].mul_(0.5).add_(grad / (states["total"].sqrt() + self.eps))

    def step_size(self, step: Tensor) -> Tensor:
        """Warm-up."""
        return 1.0 - 0.5**step


class Ages(ds_fira.Rule):
    """Momentum that learns less with age, and a state whose name begins as that of the basis."""

    beta: float = 0.9
    states: ClassVar = {"basis_age": "first", "momentum": "first"}
    elementwise: ClassVar = True

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """N = M / (1 + A), A the sum of |R|."""
        age = states["basis_age"].add_(grad.abs())
        return states["momentum"].mul_(self.beta).add_(grad, alpha=1.0 - self.beta) / (1.0 + age)


class Normalized(ds_fira.Rule):
    """Momentum over its norm, which needs the whole of it."""

    beta: float = 0.9
    states: ClassVar = {"momentum": "first"}

    def direction(self, grad: Tensor, states: dict[str, Tensor], step: Tensor) -> Tensor:
        """N = M / |M|."""
        momentum = states["momentum"].mul_(self.beta).add_(grad, alpha=1.0 - self.beta)
        return momentum / (momentum.norm() + 1e-8)


FiraLion = ds_fira.plug(Lion)
FiraAdaGrad = ds_fira.plug(AdaGrad)
FiraNormalized = ds_fira.plug(Normalized)
FiraAges = ds_fira.plug(Ages)
ds_fira.register(FiraLion, FiraAdaGrad, FiraNormalized, FiraAges)


def alone(kind: type, shapes: list[tuple[int, int]], steps: int, settings: dict[str, Any], frozen: bool = False) -> Any:
    """Losses and weights of one process that sees all rows; the layers are projected.

    Args:
        kind: of the optimizer.
        shapes: of the layers.
        steps: of the run.
        settings: of the optimizer.
        frozen: whether nothing but the layers is trained.
    """
    torch.manual_seed(0)
    model = Net(shapes)
    settings = {key: value for key, value in settings.items() if key != "target_modules"}
    rank = settings.pop("rank")
    chosen = [layer.weight for layer in model.layers]
    rest = [param for name, param in model.named_parameters() if not name.startswith("layers.")]
    optimizer = kind([{"params": chosen, "rank": rank}, *([] if frozen else [{"params": rest}])], **settings)
    losses = []
    for step in range(steps):
        loss = model(rows(step))
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: param.detach() for name, param in model.named_parameters()}


def run_frozen(ds_config: dict[str, Any], shapes: list[tuple[int, int]], steps: int) -> dict[str, Any]:
    """`run` with nothing but the layers trained."""
    from tests.distributed.resize_jobs import ROWS, advance, module_weights
    from tests.distributed.zero_jobs import build

    ds_config = {**ds_config, "train_micro_batch_size_per_gpu": ROWS // torch.distributed.get_world_size()}
    torch.manual_seed(0)
    model = Net(shapes)
    chosen = [layer.weight for layer in model.layers]
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("layers."))
    engine = build(ds_config, shapes, model=model, model_parameters=chosen)
    losses = advance(engine, 0, steps)
    ways = [matrix.way for layout in ds_fira.optim.registry.fira_of(engine).layouts for matrix in layout.split]
    result = {"losses": losses, "weights": module_weights(engine), "ways": ways}
    engine.destroy()
    return result
