"""What every prototype shares: Adam for embeddings, norms and head, and a direction for each hidden matrix."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from examples.reproduction.transfer.trials import Trial

BETAS, EPS = (0.9, 0.999), 1e-8
# The published scale of the low-rank methods (GaLore, Fira: alpha; apollo-torch: scale).
PUBLISHED_ALPHA = 0.25


class Prototype:
    """Trains a model; one step at a time, the gradients being there.

    Hidden matrices are the weights of linear layers but the head. A matrix is given to `direction` with its projected
    side first, (s, l): the smaller one, as GaLore and Fira project it.

    Attributes:
        trial: gives the rate and the settings.
        settings: of the trial, over the class's `defaults`.
        step_count: steps made.
    """

    # Settings and their values where the trial says nothing.
    defaults: ClassVar[dict[str, Any]] = {}
    # Whether `state_dict` has all that a training needs to go on.
    resumable = True

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        self.trial, self.settings = trial, {**self.defaults, **dict(trial.settings)}
        unknown = self.settings.keys() - self.defaults.keys()
        if unknown:
            raise ValueError(f"{trial.method} has no settings {sorted(unknown)}; it has {sorted(self.defaults)}")
        self.hidden = [
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("lm_head")
        ]
        chosen = {id(weight) for weight in self.hidden}
        rest = [param for param in model.parameters() if id(param) not in chosen]
        kinds = [[param for param in rest if (param.dim() < 2) is vectors] for vectors in (False, True)]
        groups = [{"params": params, "vectors": number == 1} for number, params in enumerate(kinds) if params]
        self.adam = torch.optim.Adam(groups, lr=trial.lr, betas=BETAS, eps=EPS)
        self.states: list[dict[str, Any]] = [{} for _ in self.hidden]
        self.step_count = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Step everything with this share of the peak rate."""
        self.step_count += 1
        for group in self.adam.param_groups:
            factor = self.vector_factor() if group["vectors"] else 1.0
            group["lr"] = self.trial.lr * share * self.rest_factor() * factor
        self.adam.step()
        for weight, state in zip(self.hidden, self.states, strict=True):
            tall = self.on_the_right(weight.shape)
            state["tall"] = tall
            direction = self.direction(weight.grad.mT if tall else weight.grad, state)
            scale = self.trial.lr * share * self.rate_factor(weight.shape)
            weight.sub_(direction.mT if tall else direction, alpha=scale)

    @abstractmethod
    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """What is subtracted from a hidden matrix, times the rate.

        Args:
            grad: (s, l).
            state: of the matrix; at first it has `tall` alone, whether the matrix was transposed.
        """

    def rate_factor(self, shape: tuple[int, int]) -> float:
        """The rate of a hidden matrix of this shape, in the trial's."""
        return 1.0

    def on_the_right(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix is transposed first: as the released code projects it, a square one on the right."""
        return shape[0] >= shape[1]

    def rank(self, grad: Tensor) -> int:
        """The subspace rank of a matrix: the trial's share of the width."""
        return min(max(1, round((self.trial.rank or 1.0) * self.trial.width)), grad.shape[0])

    def rest_factor(self) -> float:
        """The rate of embeddings, head and norms, in the trial's."""
        return 1.0

    def vector_factor(self) -> float:
        """The rate of norms, in that of embeddings and head: the setting `vectors`, where a method has it."""
        return self.settings.get("vectors", 1.0)

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, step counts left out."""
        states = [*self.states, *self.adam.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"adam": self.adam.state_dict(), "states": self.states, "step": self.step_count}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.adam.load_state_dict(saved["adam"])
        self.states, self.step_count = saved["states"], saved["step"]


class LowRank(Prototype):
    """A subspace of the gradient's smaller side, new every `gap` steps: the left singular vectors of a gradient."""

    defaults: ClassVar[dict[str, Any]] = {"gap": 50}

    def basis(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        """P, (s, r), orthonormal columns; refreshed where it is due."""
        if (self.step_count - 1) % self.settings["gap"] == 0:
            rank = self.rank(grad)
            # Of the matrix as it is: the signs of singular vectors differ otherwise, and moments are kept through them.
            whole = torch.linalg.svd(grad.mT if state["tall"] else grad, full_matrices=False)
            state["basis"] = (whole[2].mT if state["tall"] else whole[0])[:, :rank].contiguous()
        return state["basis"]

    def adam_direction(self, grad: Tensor, state: dict[str, Any], eps: float = EPS) -> Tensor:
        """M / (sqrt(V) + eps) of a tensor by its moments in the state, bias not corrected."""
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, torch.zeros_like(grad))
        state["exp_avg"].lerp_(grad, 1 - BETAS[0])
        state["exp_avg_sq"].lerp_(grad.square(), 1 - BETAS[1])
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)

    def bias_correction(self) -> float:
        """Adam's, of the direction."""
        return (1 - BETAS[1] ** self.step_count) ** 0.5 / (1 - BETAS[0] ** self.step_count)
