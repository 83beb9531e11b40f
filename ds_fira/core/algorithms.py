"""What the optimizers of this package differ in: states, settings, limiter. A param group names its algorithm.

The name is a plain string, so that it is saved with the group and a checkpoint says what made its states. A group
without one is FiraAdam's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from ds_fira.core.rules import Kind, Rule

ADAM_STATES: Mapping[str, Kind] = {"exp_avg": "first", "exp_avg_sq": "second"}
KEY = "method"
# A value of `subspace` that an algorithm has fixed: see `ds_fira.core.drawn_basis`.
DRAWN = "drawn"


class PlainAlgorithm(TypedDict):
    """What a checkpoint says of an algorithm."""

    name: str
    states: dict[str, Kind]
    limited: bool


@dataclass(frozen=True)
class Algorithm:
    """One optimizer of this package.

    Attributes:
        name: its class, and its type in a DeepSpeed config.
        states: of every projected matrix, of R's shape; every other parameter has the same ones in its own shape.
        without: settings of FiraAdam that it does not have.
        fixed: of those, values that the arithmetic reads from a param group.
        limited: whether a matrix keeps the residual norm of the limiter.
        rule: the base optimizer, whose hyper-parameters are settings too; None for Adam.
    """

    name: str
    states: Mapping[str, Kind] = field(default_factory=lambda: ADAM_STATES)
    without: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    limited: bool = True
    rule: type[Rule] | None = None

    @property
    def draws_basis(self) -> bool:
        """Whether its bases are drawn in every step, and no state."""
        return self.fixed.get("subspace") == DRAWN

    @property
    def own_settings(self) -> tuple[str, ...]:
        """The hyper-parameters of its rule."""
        return () if self.rule is None else tuple(self.rule.model_fields)

    @property
    def group_values(self) -> dict[str, object]:
        """The entries of its param groups beside settings."""
        return {**self.fixed, **({} if self.name == FIRA_ADAM.name else {KEY: self.name})}

    def upgraded(self, group: Mapping[str, object]) -> dict[str, object]:
        """A param group of any version, with what this one has to know of it.

        Version 0.1.0 had one residual, and took GaLoreAdam's away by settings that it has no use for now.
        """
        gone = {name for name in self.without if name not in self.fixed}
        kept = {name: value for name, value in group.items() if name not in gone}
        kept.setdefault("residual", "scaled")
        return {**kept, **self.fixed}

    def to_plain(self) -> PlainAlgorithm:
        """What a checkpoint says of it, so that its states can be read where the algorithm is not known."""
        return {"name": self.name, "states": dict(self.states), "limited": self.limited}

    @classmethod
    def from_plain(cls, plain: PlainAlgorithm | None) -> Algorithm:
        """The reverse of `to_plain`, enough of it to read states; None for a checkpoint that says nothing."""
        return FIRA_ADAM if plain is None else cls(plain["name"], states=plain["states"], limited=plain["limited"])


FIRA_ADAM = Algorithm("FiraAdam")
GALORE_ADAM = Algorithm(
    "GaLoreAdam",
    without=(
        "gamma",
        "residual",
        "residual_beta",
        "residual_warmup",
        "residual_scale",
        "scaling",
        "limiter",
        "refresh_limiter",
        "formulation",
        "preset",
    ),
    fixed={"residual": "none", "limiter": "none", "formulation": "released"},
    limited=False,
)
APOLLO_ADAM = Algorithm(
    "ApolloAdam",
    without=(
        "residual",
        "residual_beta",
        "residual_warmup",
        "residual_scale",
        "subspace",
        "refresh_moments",
        "refresh_limiter",
        "formulation",
        "capturable",
        "preset",
    ),
    fixed={
        "residual": "gradient",
        "subspace": DRAWN,
        "refresh_moments": "keep",
        "formulation": "released",
        "capturable": False,
    },
)
# Methods of others, made of FiraAdam's parts.
RELATIVES = (GALORE_ADAM, APOLLO_ADAM)
ALGORITHMS = {algorithm.name: algorithm for algorithm in (FIRA_ADAM, *RELATIVES)}


def algorithm_of(group: Mapping[str, object]) -> Algorithm:
    """The algorithm of a param group.

    Raises:
        ValueError: it is one that this process does not know.
    """
    name = group.get(KEY, FIRA_ADAM.name)
    if name not in ALGORITHMS:
        raise ValueError(f"{name} is no optimizer that this process knows; import the module that plugs its rule.")
    return ALGORITHMS[name]
