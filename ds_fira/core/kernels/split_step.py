"""The step of parts of matrices that ZeRO splits, by kernels: `ShardStep` of `ds_fira.sharding.lowrank` for many.

The phases are those of `ds_fira.core.kernels.step`, with what crosses ranks between them. Parts alike are one launch of
every phase, wherever they lie. What a phase leaves to the next has its place in one memory, from which
`ds_fira.core.kernels.moving` takes what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.combining import launch_combine
from ds_fira.core.kernels.finite import Finite
from ds_fira.core.kernels.fragments import launch_project_edges, launch_update_edges
from ds_fira.core.kernels.measuring import Squares
from ds_fira.core.kernels.moments import launch_adam
from ds_fira.core.kernels.projection import launch_project
from ds_fira.core.kernels.sharing import launch_measure_entries, launch_take_sums
from ds_fira.core.kernels.split_part import Held, SplitPart, by_kind, memory_of, quotient_of, strided, with_edges
from ds_fira.core.kernels.stored import moment
from ds_fira.core.kernels.update import launch_update
from ds_fira.core.kernels.views import Origin, View, origins
from ds_fira.core.settings import GroupSettings
from ds_fira.core.state import EXP_AVG, EXP_AVG_SQ


class SplitStep:
    """One step of some parts of a param group.

    Attributes:
        words: the memory of the step, float32.
        doubles: likewise, float64.
    """

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        sizes: tuple[int, int],
        settings: GroupSettings,
        ratio: float,
        *,
        cleared: bool,
    ) -> None:
        """Make the memory, of a step in one param group.

        Args:
            param: the flat parameter, contiguous as its gradient is.
            grad: its gradient.
            sizes: elements of `words` and `doubles`.
            settings: of the param group.
            ratio: a residual norm below this share of |phi * G| is rounding.
            cleared: whether the memory is zero at first.
        """
        self.param, self.grad, self.settings, self.ratio = param, grad, settings, ratio
        make = torch.zeros if cleared else torch.empty
        self.words = make(sizes[0], dtype=torch.float32, device=param.device)
        self.doubles = make(sizes[1], dtype=torch.float64, device=param.device)

    def project(self, parts: Sequence[Held]) -> None:
        """Line 8: R and |G_j|^2 over the region, of the rank's own rows."""
        for first, alike in by_kind(each for each in parts if each[0].rows):
            low = [part.low_rank + part.body_line * part.rank for part, _ in alike]
            squares = [part.grad_sq + part.body_line for part, _ in alike]
            grad, basis, low_rank, grad_sq = origins(
                [
                    self._flat(self.grad, alike),
                    self._basis(alike, all_rows=False),
                    self._in(self.words, low),
                    self._in(self.doubles, squares),
                ]
            )
            launch_project(
                grad._replace(rows=first.width, columns=1),
                strided(basis, alike),
                low_rank._replace(rows=first.region if first.left else first.rank, columns=1),
                grad_sq._replace(rows=1),
                None,
                (len(alike), first.rows, first.width, first.rank),
                first.side,
                self.settings.chosen_precision,
            )
        for side, cut in with_edges(parts):
            basis, edges = self._edge_bases(cut), [part.edges for part, _ in cut]
            launch_project_edges(self.grad, basis, self.words, self.doubles, edges, cut[0][0].rank, side)

    def advance(
        self, parts: Sequence[Held], rows: Tensor, row_of: Callable[[SplitPart], int], totals: Sequence[Origin]
    ) -> None:
        """Lines 9 to 12: moments, N, phi where it goes by an entry alone, and what the ranks add up.

        Args:
            parts: whose gradients are finite.
            rows: (matrices, 3), float64; written, see `launch_measure_entries`.
            row_of: the row of a part.
            totals: of every part, where |G|^2 over all ranks is.
        """
        total_of = dict(zip((id(part) for part, _ in parts), totals, strict=True))
        for first, alike in by_kind(parts):
            words = [[getattr(part, name) for part, _ in alike] for name in ("kept_low_rank", "direction")]
            if not first.left:
                words[1] = [part.direction + part.kept_start * part.rank for part, _ in alike]
            doubles = [
                [part.grad_sq + part.kept_start for part, _ in alike],
                *([getattr(part, name) for part, _ in alike] for name in ("direction_sq", "low_rank_sq")),
                [self._phi(part, part.kept_start) for part, _ in alike],
                [part.numbers for part, _ in alike],
            ]
            low_rank, direction, *squares, phi, numbers, row, total = origins(
                [self._in(self.words, each) for each in words]
                + [self._in(self.doubles, each) for each in doubles]
                + [[(rows, 3 * row_of(part)) for part, _ in alike], [total_of[id(part)] for part, _ in alike]]
            )
            memory, finite = memory_of(alike, self.settings), Finite(None, total, 1)
            if first.kept:
                self._adam(first, alike, low_rank, direction, (squares[1], squares[2]), finite, memory.step)
            launch_measure_entries(
                Squares(*squares),
                phi,
                numbers,
                row,
                finite,
                memory,
                len(alike),
                first.kept,
                first.shape,
                first.rank,
                self.settings,
                first.side,
            )

    def _adam(
        self,
        first: SplitPart,
        alike: Sequence[Held],
        low_rank: View,
        direction: View,
        squares: tuple[View, View],
        finite: Finite,
        step: View,
    ) -> None:
        moments = []
        for name in (EXP_AVG, EXP_AVG_SQ):
            stored = alike[0][1].moments[name]
            places_of = [[(state.moments[name][suffix], 0) for _, state in alike] for suffix in stored]
            moments.append(moment(stored, origins(places_of)))
        shape = (first.rank, first.kept) if first.left else (first.kept, first.rank)
        launch_adam(
            low_rank,
            tuple(moments),
            direction,
            squares,
            finite,
            step,
            (len(alike), *shape),
            betas=self.settings.betas,
            eps=self.settings.eps,
            side=first.side,
        )

    def take_sums(self, parts: Sequence[Held], rows: Tensor, row_of: Callable[[SplitPart], int]) -> None:
        """Line 13, of what `advance` has written and the ranks have added up."""
        for first, alike in by_kind(parts):
            row, phi, numbers = origins(
                [
                    [(rows, 3 * row_of(part)) for part, _ in alike],
                    self._in(self.doubles, [self._phi(part, 0) for part, _ in alike]),
                    self._in(self.doubles, [part.numbers for part, _ in alike]),
                ]
            )
            known = (len(alike), first.shape, first.rank, self.settings, first.side)
            launch_take_sums(row, phi, numbers, memory_of(alike, self.settings), *known)

    def combine(self, parts: Sequence[Held], *, over_region: bool = False, exact: bool = False) -> None:
        """Lines 14 and 15: the limiter, C and the factors of the gradient; step counts and |S| to remember.

        Args:
            parts: of one way to answer.
            over_region: whether N, R and phi are there over the whole region, not of the entries kept alone.
            exact: whether |S|^2 is there from the residual itself.
        """
        for first, alike in by_kind(parts):
            over_all = over_region or not first.kept
            start = 0 if over_all else first.kept_start
            lines = first.region if over_all else first.kept
            along = 0 if first.left else start * first.rank
            low = [part.low_rank if over_all else part.kept_low_rank for part, _ in alike]
            update = [part.low_rank_update if over_all else part.direction for part, _ in alike]
            low_rank, direction, scales, phi, numbers, sums = origins(
                [
                    self._in(self.words, low),
                    self._in(self.words, [place + along for place in update]),
                    self._in(self.words, [self._scales(part, start) for part, _ in alike]),
                    self._in(self.doubles, [self._phi(part, start) for part, _ in alike]),
                    self._in(self.doubles, [part.numbers for part, _ in alike]),
                    self._in(self.doubles, [part.exact for part, _ in alike]),
                ]
            )
            launch_combine(
                low_rank,
                direction,
                direction,
                phi,
                scales,
                numbers,
                sums,
                memory_of(alike, self.settings),
                (len(alike), first.rank, lines, int(exact)),
                self.settings,
                side=first.side,
                negligible_ratio=self.ratio,
            )

    def apply(self, parts: Sequence[Held]) -> None:
        """Line 16, of the rank's own rows."""
        settings, one = self.settings, self.settings.has_one_factor
        scaled = settings.residual_form.factors is not None
        for first, alike in by_kind(each for each in parts if each[0].rows):
            low_rank_update = [part.low_rank_update + part.body_line * part.rank for part, _ in alike]
            weight, grad, basis, inner, scales, finite, counts = origins(
                [
                    self._flat(self.param, alike),
                    self._flat(self.grad, alike),
                    self._basis(alike, all_rows=False),
                    self._in(self.words, low_rank_update),
                    self._in(self.words, [self._scales(part, part.body_line) for part, _ in alike]),
                    self._numbers(alike, places.FINITE),
                    self._numbers(alike, places.COUNT),
                ]
            )
            basis = strided(basis, alike)
            inner = inner._replace(rows=first.region if first.left else first.rank, columns=1)
            turned = basis._replace(rows=basis.columns, columns=basis.rows)
            launch_update(
                weight._replace(rows=first.width, columns=1),
                grad._replace(rows=first.width, columns=1),
                *((basis, inner) if first.left else (inner, turned)),
                scales._replace(rows=0 if one else 1) if scaled else None,
                finite,
                (len(alike), first.rows, first.width, first.rank),
                settings.decay_factor,
                counts if settings.rounds_stochastically else None,
                by_row=not first.left,
                precision=settings.chosen_precision,
            )
        for side, cut in with_edges(parts):
            launch_update_edges(
                self.param,
                self.grad,
                self._edge_bases(cut),
                self.words,
                [part.edges for part, _ in cut],
                cut[0][0].rank,
                settings.decay_factor,
                side,
                origins([self._numbers(cut, places.COUNT)])[0] if settings.rounds_stochastically else None,
                scaled=scaled,
                one=one,
            )

    def quotient(self, part: SplitPart) -> Callable[[], tuple[Tensor, Tensor, Tensor]] | None:
        """What recorders show of the entries kept, looked up when they ask; None for no entries."""
        return partial(quotient_of, self.doubles, part, self.settings) if part.kept else None

    def _phi(self, part: SplitPart, start: int) -> int:
        return part.phi + start * (not self.settings.has_one_factor)

    def _scales(self, part: SplitPart, start: int) -> int:
        return part.scales + start * (not self.settings.has_one_factor)

    def _edge_bases(self, cut: Sequence[Held]) -> View:
        return strided(origins([self._basis(cut, all_rows=True)])[0], cut)

    @staticmethod
    def _in(memory: Tensor, starts: Sequence[int]) -> list[Origin]:
        return [(memory, start) for start in starts]

    def _numbers(self, alike: Sequence[Held], place: int) -> list[Origin]:
        return self._in(self.doubles, [part.numbers + place for part, _ in alike])

    def _flat(self, tensor: Tensor, alike: Sequence[Held]) -> list[Origin]:
        return self._in(tensor, [part.body for part, _ in alike])

    def _basis(self, alike: Sequence[Held], *, all_rows: bool) -> list[Origin]:
        """Where the rows of P are that the rank works with, or those for its whole rows."""
        found: list[Origin] = []
        for part, state in alike:
            first = 0 if all_rows else part.body_basis
            borrowed = part.basis is not None
            place = part.basis + first * part.rank if borrowed else first * state.basis.stride(0)
            found.append((self.words if borrowed else state.basis, place))
        return found
