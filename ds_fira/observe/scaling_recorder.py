"""Which scaling factors a training records: those of its projected matrices, and of its linear layers under AdamW.

What a factor is, and what is kept of it, is in `ds_fira.observe.scaling_series`. Only an AdamW weight that is cut needs
the ranks' sums at every recorded step; all else is put together at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_fira.checkpoint.slices import StateSlice
from ds_fira.core import functional as F
from ds_fira.core import quantization
from ds_fira.core.algorithms import algorithm_of
from ds_fira.core.norms import squared_norms
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ, STEP, compute_dtype, stored_moment
from ds_fira.core.subspace import Side, projection_side
from ds_fira.observe.scaling_series import Factors, Series, carry_on, join
from ds_fira.sharding.comm import Communicator
from ds_fira.sharding.geometry import MatrixShard, matrices_of
from ds_fira.sharding.projection import is_projected
from ds_fira.sharding.row_blocks import inside, row_blocks

# Elements of a weight under AdamW that are looked at together.
BLOCK = 2**20


def under_adamw(shape: Sequence[int], group: dict[str, Any]) -> bool:
    """Whether a parameter is neither projected nor stepped by a rule of the user's, whose factors nobody can tell."""
    return 0 not in shape and not is_projected(shape, group) and algorithm_of(group).rule is None


@dataclass(frozen=True, slots=True)
class _Watched:
    """A weight under AdamW in one stepped tensor.

    Attributes:
        fragment: what this process holds of it; None for nothing.
        side: on which Fira would project it.
        series: on the one process that records it; None elsewhere.
        place: of its entries among those that are summed over the ranks; None where it is whole.
    """

    fragment: MatrixShard | None
    side: Side
    series: Series | None
    place: slice | None


class ScalingRecorder:
    """Records the scaling factors of one process's share of a training.

    Attributes:
        every: steps from one recorded step to the next, at least 1.
        names: of the parameters in the model's order; empty until they are known.

    Args:
        every: as the attribute.
        given: outside of an engine, names by `id` of the parameter in the model's order.
        linear: ids of the weights of linear layers.
    """

    def __init__(self, every: int, given: Mapping[int, str] | None = None, linear: Collection[int] = ()) -> None:
        self.every = every
        self._given = given or {}
        self._linear = linear
        self.names: list[str] = []
        # What the run had recorded that this one resumes, and the steps of it that the optimizer's own count lacks.
        self._earlier: Factors = {}
        self._offset = 0
        self._step = 0
        self._low_rank: dict[Tensor, list[Series]] = {}
        self._watched: dict[Tensor, list[_Watched]] = {}
        self._channels: dict[Tensor, Communicator | None] = {}
        self._alone: dict[Tensor, str] = {}

    def due(self, step: int) -> bool:
        """Whether a step, counted from 1, is one to record; `low_rank` and `full_rank` are then of this step."""
        self._step = step + self._offset
        return self._step % self.every == 0

    def low_rank(self, param: Tensor, places: Callable[[], Sequence[StateSlice]]) -> list[Series]:
        """The series of the projected matrices of a stepped tensor, begun for this step.

        Args:
            param: the tensor.
            places: gives those of the matrices, or parts of matrices, whose moments this process keeps.
        """
        if param not in self._low_rank:
            self._low_rank[param] = [
                Series(self._named(param, place.name), place.shape, place.side, place.rank, place.kept)
                for place in places()
            ]
        return [series.open(self._step) for series in self._low_rank[param]]

    def _named(self, param: Tensor, name: str) -> str:
        """A matrix's name, with the module's name of its parameter where the optimizer alone knows only a number."""
        number, bracket, expert = name.partition("[")
        return self._alone[param] + bracket + expert if number.isdigit() and param in self._alone else name

    def watch(
        self,
        param: Tensor,
        matrices: Sequence[Mapping[int, MatrixShard]],
        group: dict[str, Any],
        communicator: Communicator | None = None,
    ) -> None:
        """Record weights under AdamW that lie in a stepped tensor.

        Args:
            param: the tensor.
            matrices: the fragments of every weight by dp_rank, alike on all ranks that hold one.
            group: the param group, for the side.
            communicator: the ranks; None for this process alone, as dp_rank 0.
        """
        self._channels[param], watched, used = communicator, [], 0
        dp_rank = 0 if communicator is None else communicator.dp_rank
        for fragments in matrices:
            first = min(fragments)
            shape, name = fragments[first].shape, fragments[first].name
            side = projection_side(shape, group["proj_type"], group["formulation"])
            count, place = shape[side == "left"], None
            if len(fragments) > 1:
                place = slice(used, used + count)
                used += count
            series = Series(name, shape, side, None, range(count)) if first == dp_rank else None
            watched.append(_Watched(fragments.get(dp_rank), side, series, place))
        self._watched[param] = watched

    def watch_alone(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Find names and weights of an optimizer that is in no engine, from what its constructor was given.

        Of parameters without a name every 2-D one is a weight.

        Args:
            param_groups: of the optimizer.
        """
        if self.names:
            return
        params = [param for group in param_groups for param in group["params"]]
        taken: set[str] = set()
        for number, param in enumerate(params):
            name = self._given.get(id(param), f"parameter {number}").replace("_orig_mod.", "")  # of torch.compile
            self._alone[param] = f"{number}.{name}" if name in taken else name
            taken.add(name)
        order = {key: place for place, key in enumerate(self._given)}
        self.names = [self._alone[param] for param in sorted(params, key=lambda p: order.get(id(p), len(order)))]
        for group in param_groups:
            for param in [param for param in group["params"] if under_adamw(param.shape, group)]:
                if id(param) in self._linear or (id(param) not in self._given and param.ndim == 2):
                    matrices = matrices_of(self._alone[param], tuple(param.shape))
                    self.watch(param, [{0: matrix} for matrix in matrices], group)

    def full_rank(self, param: Tensor, settings: GroupSettings, state: dict[str, Tensor]) -> None:
        """Record the weights in a tensor that AdamW has just stepped; a collective call where any of them is cut.

        Args:
            param: the tensor with its gradient.
            settings: of its param group.
            state: its moments, updated.
        """
        watched = self._watched.get(param, ())
        if not watched:
            return
        used = max((one.place.stop for one in watched if one.place is not None), default=0)
        shared = torch.zeros(2, used, dtype=torch.float64, device=param.device)
        bias_correction = F.bias_correction(state[STEP], settings.betas)

        def squares(one: _Watched) -> Tensor:
            return _adamw_squares(one.fragment, one.side, param, settings, state)

        for one in watched:
            if one.place is not None and one.fragment is not None:
                shared[:, one.place] = squares(one)
        if used:
            shared = self._channels[param].start_all_reduce(shared).wait()
        for one in [one for one in watched if one.series is not None]:
            direction_sq, grad_sq = squares(one) if one.place is None else shared[:, one.place]
            one.series.open(self._step).add(direction_sq, grad_sq, bias_correction, grad_sq.sum().isfinite())

    def gather(
        self, communicator: Communicator | None, replicated: bool, counts: Callable[[Tensor], bool] = lambda _: True
    ) -> Factors:
        """What all processes have recorded, as `ds_fira.scaling_factors` gives it; waits for a GPU.

        Args:
            communicator: the ranks, which all make the call; None for this process alone.
            replicated: whether every rank records the same.
            counts: whether what this rank has recorded of a stepped tensor is asked for, or another has the same.
        """
        kept = [series for param, listed in self._low_rank.items() if counts(param) for series in listed]
        kept += [
            one.series
            for param, listed in self._watched.items()
            if counts(param)
            for one in listed
            if one.series is not None
        ]
        parts = [series.plain() for series in kept if len(series.entries) and series.steps]
        if communicator is not None and not replicated:
            parts = [part for listed in communicator.gather_objects(parts) for part in listed]
        by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for part in parts:
            by_name[part["name"]].append(part)
        found = {name: join(listed) for name, listed in by_name.items()}
        for name, earlier in self._earlier.items():
            found[name] = carry_on(name, earlier, found.get(name))
        order = {name: place for place, name in enumerate(self.names)}

        def place(name: str) -> tuple[int, int]:
            owner, _, index = name.partition("[")
            return order.get(owner, len(order)), int(index.rstrip("]") or 0)

        return {name: found[name] for name in sorted(found, key=place)}

    def state_dict(self) -> dict[str, Any]:
        """What an optimizer that is in no engine saves, in plain Python and tensors."""
        return {"step": self._step, "factors": self.gather(None, replicated=False)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state_dict` gave; from nothing where the saved run recorded nothing."""
        state = state or {"step": self._step, "factors": {}}
        self.restart(state["factors"])
        self._offset += state["step"] - self._step
        self._step = state["step"]

    def restart(self, earlier: Factors) -> None:
        """Forget what was recorded, and go on from what another run had.

        Args:
            earlier: as `ds_fira.scaling_factors` gives it.
        """
        self._earlier = dict(earlier)
        self._low_rank.clear()
        for param, watched in self._watched.items():
            anew = [one.series and _anew(one.series) for one in watched]
            self._watched[param] = [replace(one, series=series) for one, series in zip(watched, anew, strict=True)]


def _anew(series: Series) -> Series:
    return Series(series.name, series.shape, series.side, series.rank, series.entries)


def _adamw_squares(
    fragment: MatrixShard, side: Side, param: Tensor, settings: GroupSettings, state: dict[str, Tensor]
) -> Tensor:
    """Squared norms of N = M / (sqrt(V) + eps) and of G by column (left) or row (right), (2, n or m), float64.

    Args:
        fragment: what to look at; entries that it does not touch stay 0.
        side: columns or rows.
        param: the tensor with its gradient that the fragment lies in.
        settings: of its param group.
        state: its moments.
    """
    dtype = compute_dtype(param.dtype)
    grad = param.grad.reshape(-1)
    moments = [stored_moment(state, key) for key in (EXP_AVG, EXP_AVG_SQ)]
    count = fragment.shape[side == "left"]
    found = torch.zeros(2, count, dtype=torch.float64, device=param.device)
    for piece in row_blocks(fragment):
        width = len(piece.columns)
        height = max(1, BLOCK // width)
        for first in range(0, len(piece.rows), height):
            rows = piece.rows[first : first + height]
            start = fragment.offset + piece.offset + first * width
            stop = start + len(rows) * width
            exp_avg, exp_avg_sq = (quantization.elements(moment, start, stop, dtype) for moment in moments)
            divisor = exp_avg_sq.sqrt().add_(settings.eps)
            direction = torch.where(divisor > 0.0, exp_avg / divisor, 0.0).view(len(rows), width)
            slope = grad[start:stop].to(dtype).view(len(rows), width)
            along = inside(piece.columns if side == "left" else rows, range(count))
            found[:, along] += torch.stack([squared_norms(direction, side), squared_norms(slope, side)])
    return found
