"""A turn of a low-rank step by kernels: the phases and collectives of `Turn`, for all its matrices at once.

What is sent is packed by one kernel and what arrives taken apart by one, whatever the number of matrices; parts alike
are one launch of each phase. The host reads the sums that decide which collectives follow, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ds_fira.core import functional as F
from ds_fira.core.kernels import numbers as places
from ds_fira.core.kernels.fragment_squares import PROGRAMS, launch_squares
from ds_fira.core.kernels.moving import Move, add_arrived, move
from ds_fira.core.kernels.split_part import Held, SplitStats
from ds_fira.core.kernels.split_step import SplitStep
from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.comm import Pending
from ds_fira.sharding.lowrank.answer_form import forms_of, needs_sums
from ds_fira.sharding.lowrank.answers import unpack_parts
from ds_fira.sharding.lowrank.device_part import DevicePart
from ds_fira.sharding.lowrank.exchange import Answers
from ds_fira.sharding.lowrank.layout import TurnLayout
from ds_fira.sharding.lowrank.local_plan import LocalShardPlan
from ds_fira.sharding.lowrank.pieces import Delivery, TurnPieces
from ds_fira.sharding.lowrank.turn import GroupStep, Turn
from ds_fira.sharding.split_matrix import GRADIENT_SUMS, LOW_RANK_SUMS, SplitMatrix


class DeviceGroup:
    """What the turns of a param group keep from step to step: where their tensors lie, and memory for the first sums.

    Args:
        matrices: the low-rank matrices of the group by position.
        plans: of those that this rank holds a part of.
    """

    def __init__(self, matrices: Mapping[int, SplitMatrix], plans: Sequence[LocalShardPlan]) -> None:
        self._matrices, self._plans = matrices, plans
        self._layouts: dict[object, TurnLayout] = {}
        self._rows = {plan.position: row for row, plan in enumerate(plans)}
        self._sums: tuple[Tensor, Tensor] | None = None

    def layout(self, positions: Sequence[int], settings: GroupSettings) -> TurnLayout:
        """Where the parts of a turn lie; anew where settings that it goes by have changed."""
        forms = forms_of(positions, self._matrices, settings)
        key = (tuple(forms.items()), settings.measures_residual, settings.has_one_factor)
        if key not in self._layouts:
            own = [plan for plan in self._plans if plan.position in forms]
            self._layouts[key] = TurnLayout(own, settings, forms)
        return self._layouts[key]

    def grad_sums(self, grad: Tensor, flags: Mapping[int, float]) -> Tensor:
        """Of every matrix what the ranks add up first: |G|^2 of this rank's part, and what else `Agreement` asks.

        Args:
            grad: the flat gradient.
            flags: by position, the second number of the parts held.

        Returns:
            (matrices, 2), float64, the same memory in every step.
        """
        if self._sums is None or self._sums[0].device != grad.device:
            sizes = ((len(self._matrices), GRADIENT_SUMS), (max(1, len(self._plans)), PROGRAMS))
            self._sums = tuple(torch.empty(size, dtype=torch.float64, device=grad.device) for size in sizes)
        sums, partial = self._sums
        spans = [(plan.fragment.offset, plan.fragment.numel) for plan in self._plans]
        launch_squares(grad, spans, [self._rows.get(position, -1) for position in self._matrices], partial, sums)
        for row, position in enumerate(self._matrices):
            if flags.get(position):
                sums[row, 1].fill_(flags[position])
        return sums


class DeviceTurn(Turn):
    """The matrices at some positions, in one step, by kernels; see `Turn`.

    Args:
        positions: the same on every rank.
        step: of the group, whose parts are `DevicePart`.
        group: what its turns keep.
        ratio: a residual norm below this share of |phi * G| is rounding.
    """

    def __init__(self, positions: Sequence[int], step: GroupStep, group: DeviceGroup, ratio: float) -> None:
        super().__init__(positions, step)
        self._ratio, self._layout = ratio, group.layout(positions, step.settings)
        size, one = step.exchange.communicator.dp_size, step.settings.has_one_factor
        self._pieces = TurnPieces(self._layout, size, one)
        self._parts: dict[int, DevicePart] = {}
        self._row = {id(part): positions.index(position) for position, part in self._layout.parts.items()}
        self._memory: SplitStep | None = None

    def _sum_low_rank(self, positions: Sequence[int]) -> Iterator[None]:
        step, pieces = self.step, self._pieces
        self._parts |= {position: step.parts[position] for position in positions if position in step.parts}
        held = tuple(position for position in positions if position in step.parts)
        cleared = self._layout.has_gaps or not all(self._parts[position].state.has_basis for position in held)
        if self._memory is None:
            param, sizes = step.param, self._layout.sizes
            self._memory = SplitStep(param, param.grad, sizes, step.settings, self._ratio, cleared=cleared)
        memory = self._memory
        yield from self._borrow_bases(positions, held)
        memory.project(self._held(position for position in held if self._parts[position].state.has_basis))
        delivery = self._layout.known(("sums", held), lambda: pieces.parts_of_sums(held))
        packed = self._layout.known(("packed", held), lambda: pieces.pieces_of_sums(held, delivery))
        collecting = Pending(lambda: None)
        if step.exchange.borrows(positions):
            collecting = self._start(delivery, packed)
        step.agreement.watch(collecting)
        yield
        arrived = collecting.wait()
        if arrived is not None:
            added = self._layout.known(("added", held), lambda: pieces.arrivals(held, delivery))
            add_arrived(memory.words, memory.doubles, arrived, *added)

    def _borrow_bases(self, positions: Sequence[int], held: tuple[int, ...]) -> Iterator[None]:
        """Put the rows of P together that the step works with: the rank's own, and those that are kept or sent now."""
        step, kept = self.step, self.step.kept
        delivery = self._layout.known(("bases", held), lambda: self._pieces.bases(held))
        known, borrowing = kept.has(positions), Pending(lambda: None)
        if known:
            own, bases = self._basis_pieces(held, None)
            move(self._memory.words, self._memory.doubles, bases, self._memory.words, own)
        elif step.exchange.borrows_bases(positions):
            borrowing = self._start(delivery, *self._basis_pieces(held, delivery))
        step.agreement.watch(borrowing)
        step.agreement.start()
        if not known and any(step.matrices[position].shares_basis for position in positions):
            yield
        arrived = borrowing.wait()
        if kept.takes(positions):
            if not known:
                self._keep(positions, held, delivery, arrived)
            arrived, present = kept.wire, tuple(self._parts)
            delivery = self._layout.known(("bases", present), lambda: self._pieces.bases(present))
        if arrived is not None:
            self._take(arrived, ("rows", held), lambda: self._pieces.pieces_of_borrowed_bases(held, delivery))

    def _keep(self, positions: Sequence[int], held: Sequence[int], delivery: Delivery, arrived: Tensor | None) -> None:
        """Keep what has arrived for the next steps, in the places of the first one."""
        kept, parts = self.step.kept, {position: self._parts[position] for position in held}
        if kept.wire is None:
            kept.wire = arrived
        kept.keep(positions, parts, {p: self._pieces.borrowed_rows(p, delivery, arrived) for p in parts})

    def _step(self) -> Iterator[None]:
        step, memory, settings = self.step, self._memory, self.step.settings
        for position in self._parts:
            step.parts.pop(position)
        finite = [position for position in self._parts if position in step.agreement.finite]
        stepped = tuple(position for position in finite if self._parts[position].state.has_basis)
        parts, sums = self._layout.parts, needs_sums(settings)
        early = [p for p in stepped if self._forms[p] == "early" and (parts[p].kept or not sums)]
        rest = [position for position in stepped if position not in early]
        rows = self._own_rows()
        if len(stepped) < len(self.positions):
            rows.zero_()
        totals = [step.agreement.origin(position) for position in stepped]
        memory.advance(self._held(stepped), rows, self._row_of, totals)
        if sums:  # the one keeper's numbers are the sums
            memory.take_sums(self._held(early), rows, self._row_of)
            self._move(("spare", tuple(early)), lambda: self._pieces.pieces_spared(early, back=False))
        memory.combine(self._held(early))
        adding = step.exchange.communicator.start_all_reduce(rows, keep=False)
        answered = [position for position in self.positions if self._forms[position] != "late"]
        answering = self._send_answers(answered, stepped)
        yield
        rows, arrived = adding.wait(), answering.wait()
        memory.take_sums(self._held(rest if sums else stepped), rows, self._row_of)
        needed = self._inexact_of(rows)
        if arrived is not None:
            self._take_answers(answered, arrived, in_parts=True)
        if needed:
            self._sum_residuals(needed, stepped, answered, arrived)
        again = [position for position in early if position in needed]
        self._move(("back", tuple(again)), lambda: self._pieces.pieces_spared(again, back=True))
        in_parts = [position for position in rest if self._forms[position] == "in_parts"]
        memory.combine(self._held(in_parts), over_region=True, exact=bool(needed))
        others = [position for position in rest if position not in in_parts]
        memory.combine(self._held([*others, *again]), exact=bool(needed))
        if arrived is not None:
            self._take_answers(answered, arrived, in_parts=False)
        late = [p for p, form in self._forms.items() if form == "late" or (form == "early" and p in needed)]
        if late:
            answering = self._send_answers(late, stepped)
            yield
            arrived = answering.wait()
            if arrived is not None:
                self._take_answers(late, arrived, in_parts=False)
        memory.apply(self._held(stepped))
        for position in finite:
            if position not in stepped:
                self._parts[position].decay()
        for position in stepped:
            part = parts[position]
            stats = SplitStats(memory.doubles, part.numbers, settings)
            step.done.append((self._layout.plans[position], stats, memory.quotient(part)))

    def _own_rows(self) -> Tensor:
        """Memory for the sums, the same in every step."""
        device, count = self._memory.words.device, len(self.positions)
        return self._layout.known(
            ("sums", device), lambda: torch.empty(count, LOW_RANK_SUMS, dtype=torch.float64, device=device)
        )

    def _held(self, positions: Iterable[int]) -> list[Held]:
        return [(self._layout.parts[position], self._parts[position].state) for position in positions]

    def _row_of(self, part: object) -> int:
        return self._row[id(part)]

    def _start(self, delivery: Delivery, pieces: Sequence[Move], bases: Tensor | None = None) -> Pending[Tensor]:
        """Pack pieces and start to send them."""
        memory = self._memory
        numel, device = sum(delivery.sent_counts), memory.words.device
        if numel:
            sent = memory.words.new_empty(numel)
        else:
            sent = self._layout.known(("nothing", device), lambda: torch.empty(0, device=device))
        move(memory.words, memory.doubles, bases, sent, pieces)
        communicator = self.step.exchange.communicator
        return communicator.start_all_to_all(sent, delivery.sent_counts, delivery.received_counts)

    def _move(self, key: tuple, make: object) -> None:
        self._take(self._memory.words, key, make)

    def _take(self, arrived: Tensor, key: tuple, make: object) -> None:
        move(self._memory.words, self._memory.doubles, None, arrived, self._layout.known(key, make))

    def _basis_pieces(self, held: tuple[int, ...], delivery: Delivery | None) -> tuple[Sequence[Move], Tensor | None]:
        """The rows of P that are sent, unless nothing is, and the own; the tensor from which places of bases count."""
        owners = [position for position in held if self._layout.parts[position].basis is not None]
        if not owners:
            return (), None
        first = self._parts[owners[0]].state.basis
        at = [(self._parts[p].state.basis.data_ptr() - first.data_ptr()) // first.element_size() for p in owners]
        bases = dict(zip(owners, at, strict=True))
        key, make = ("own", held, tuple(at), delivery is None), self._pieces.pieces_of_bases
        return self._layout.known(key, lambda: make(held, delivery, bases)), first

    def _send_answers(self, positions: Sequence[int], known: Collection[int]) -> Pending[Tensor | None]:
        """Start to send what belongs to the entries kept, of the matrices at some positions, where it is known."""
        if not self.step.exchange.borrows(positions):
            return Pending(lambda: None)
        held = tuple(position for position in positions if position in self._parts)
        delivery = self._delivery(held)
        own, make = tuple(position for position in held if position in known), self._pieces.pieces_of_answers
        return self._start(delivery, self._layout.known(("answers", held, own), lambda: make(held, delivery, own)))

    def _delivery(self, held: tuple[int, ...]) -> Delivery:
        return self._layout.known(("answering", held), lambda: self._pieces.answers(held))

    def _take_answers(self, positions: Sequence[int], arrived: Tensor, *, in_parts: bool) -> None:
        """Put what has arrived, in parts or whole, and with that the same of the entries kept, where it goes."""
        held = tuple(position for position in positions if position in self._parts)
        taken, pieces = [p for p in held if (self._forms[p] == "in_parts") == in_parts], self._pieces

        def make() -> list[Move]:
            return [*pieces.pieces_of_borrowed_answers(taken, self._delivery(held)), *pieces.pieces_kept(taken)]

        self._take(arrived, ("taken", held, in_parts), make)

    def _inexact_of(self, rows: Tensor) -> set[int]:
        """`Turn._inexact`, of the sums over the ranks; the host reads them."""
        settings, needed = self.step.settings, set()
        if not settings.measures_residual:
            return needed
        for position, (_, first, second) in zip(self.positions, rows.tolist(), strict=True):
            if settings.has_one_factor:
                total = self.step.agreement.found[position]
                first, second = settings.residual_form.residual_sq(total, second, settings), total
            if F.residual_needed(first, second):
                needed.add(position)
        return needed

    def _sum_residuals(
        self, needed: set[int], stepped: Sequence[int], answered: Sequence[int], arrived: Tensor | None
    ) -> None:
        """|S|^2 from the residual itself, by torch's functions: rarely, and then for few matrices."""
        memory, answers = self._memory, Answers()
        for position in needed & set(stepped):
            part = self._parts[position]
            part.look(memory, self._layout.parts[position])
            if self._forms[position] == "in_parts":
                delivery = self._delivery(tuple(p for p in answered if p in self._parts))
                answers[position] = {}
                for t in part.plan.borrowed:
                    start = delivery.received[position, t]
                    numel = self._pieces.answer_numel(position, t)
                    answers[position][t] = unpack_parts(part, t, arrived[start : start + numel])
        parts = {position: self._parts[position] for position in stepped}
        positions = [position for position in self.positions if position in needed]
        for position, value in self._exact_squares(positions, parts, answers).items():
            part = self._layout.parts[position]
            memory.doubles[part.exact].copy_(value)
            memory.doubles[part.numbers + places.NEEDED].fill_(1.0)
