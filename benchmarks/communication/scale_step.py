"""What a step of a plan sends between ranks, and how long that takes by a model of the links: no processes.

Bytes and collectives are those that `ds_fira.sharding` makes; `tests/distributed/test_scale.py` compares both with what
live ranks hand to their collectives. The order in which turns start and wait for collectives is that of
`ds_fira.sharding.lowrank.turn`, whose `overlapped` runs the turns here too, on a clock that only links move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ds_fira.core.settings import GroupSettings
from ds_fira.sharding.lowrank.answer_form import PHI_NUMEL, AnswerForm, forms_of
from ds_fira.sharding.lowrank.step import turns_of
from ds_fira.sharding.lowrank.turn import overlapped
from ds_fira.sharding.plan import GroupLayout, owner_turns
from ds_fira.sharding.shared_entries import SharedEntries
from ds_fira.sharding.split_matrix import GRADIENT_SUMS, LOW_RANK_SUMS, SplitMatrix, needs_old_basis

ELEMENT, SUM = 4, 8  # bytes of what is exchanged, float32, and of a sum over all ranks, float64


@dataclass(frozen=True)
class Link:
    """An alpha-beta model: a collective takes `start`, `message` for every rank that one talks to, and its bytes.

    Attributes:
        start: seconds from the call of a collective to its first byte.
        message: seconds for each further rank that the busiest rank sends to or receives from.
        bandwidth: bytes per second of a rank, each way, between nodes.
        inside: the same within a node.
        node: ranks of a node.
        serial: whether collectives that are under way at the same time follow each other, as on NCCL's one stream.
    """

    start: float = 20e-6
    message: float = 2e-6
    bandwidth: float = 50e9
    inside: float = 450e9
    node: int = 8
    serial: bool = True

    def seconds(self, peers: int, numbytes: float, crosses: bool) -> float:
        """Of one collective in which the busiest rank has `peers` others and so many bytes to send or to receive."""
        return self.start + self.message * peers + numbytes / (self.bandwidth if crosses else self.inside)

    def crosses(self, ranks: Sequence[int]) -> bool:
        """Whether some ranks, the first to the last, are on several nodes."""
        return ranks[0] // self.node != ranks[-1] // self.node


@dataclass
class Exchange:
    """What the steps of a plan's param groups have sent, and when.

    Attributes:
        ranks: that exchange.
        link: between them.
        now: seconds on the clock of the slowest rank.
        collectives: that every rank has taken part in.
        messages: ranks that the busiest rank has sent to or received from, in all collectives together.
        sent, received: bytes by rank.
    """

    ranks: int
    link: Link
    now: float = 0.0
    collectives: int = 0
    messages: int = 0
    sent: np.ndarray = field(init=False)
    received: np.ndarray = field(init=False)
    _free: float = 0.0

    def __post_init__(self) -> None:
        self.sent, self.received = np.zeros(self.ranks), np.zeros(self.ranks)

    def deliver(self, flows: Sequence[Flow]) -> float:
        """Start an all-to-all of some matrices; the time at which it has ended."""
        sent, received = np.zeros(self.ranks), np.zeros(self.ranks)
        for flow in flows:
            sent[flow.ranks] += flow.sent
            received[flow.ranks] += flow.received
        peers = max(min(self.ranks, flow.peers) for flow in flows)
        crosses = any(self.link.crosses(flow.sharers) for flow in flows)
        busiest = ELEMENT * max(sent.max(), received.max())
        self.sent += ELEMENT * sent
        self.received += ELEMENT * received
        return self._started(peers, busiest, crosses)

    def add_up(self, numbers: int) -> float:
        """Start a sum of some float64 over all ranks, by a tree; the time at which it has ended."""
        self.sent += SUM * numbers  # as `Communicator.bytes_sent` counts it
        self.received += SUM * numbers
        return self._started(2 * math.ceil(math.log2(self.ranks)), SUM * numbers, self.ranks > self.link.node)

    def wait(self, ends: float) -> None:
        """Until a collective has ended."""
        self.now = max(self.now, ends)

    def _started(self, peers: int, numbytes: float, crosses: bool) -> float:
        begins = max(self.now, self._free) if self.link.serial else self.now
        self._free = begins + self.link.seconds(peers, numbytes, crosses)
        self.collectives += 1
        self.messages += peers
        return self._free


@dataclass(frozen=True)
class Flow:
    """What one matrix adds to a collective.

    Attributes:
        sharers: its ranks.
        sent, received: elements of each of them.
        peers: ranks that the busiest of them talks to.
    """

    sharers: Sequence[int]
    sent: np.ndarray
    received: np.ndarray
    peers: int

    @property
    def ranks(self) -> slice | list[int]:
        """The sharers, to take elements of an array by."""
        return slice(self.sharers[0], self.sharers[-1] + 1) if isinstance(self.sharers, range) else list(self.sharers)

    def back(self) -> Flow:
        """The other way."""
        return Flow(self.sharers, self.received, self.sent, self.peers)


def to_owner(matrix: SplitMatrix, each: np.ndarray) -> Flow:
    """Some elements of every sharer but the owner, to the owner."""
    place = matrix.sharers.index(matrix.owner)
    sent, received = each.copy(), np.zeros(len(each))
    received[place] = each.sum() - each[place]
    sent[place] = 0
    return Flow(matrix.sharers, sent, received, len(each) - 1)


@lru_cache(maxsize=4096)
def fragment_numels(matrix: SharedEntries) -> np.ndarray:
    """Elements that every sharer holds of a matrix."""
    return np.array([fragment.numel for _, fragment in matrix.fragments], dtype=float)


@lru_cache(maxsize=4096)
def entries(matrix: SharedEntries, of_basis: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """By sharer the entries of R, or rows of P, that it borrows and that it lends, and the most that it talks to."""
    needed, held = (matrix.basis_span, matrix.basis_rows) if of_basis else (matrix.touched, matrix.kept)
    needs, holds = [needed(sharer) for sharer in matrix.sharers], [held(sharer) for sharer in matrix.sharers]
    asked = np.zeros(max(matrix.shape) + 1)  # how many sharers need an entry
    for span in needs:
        asked[span.start] += len(span) > 0
        asked[span.stop] -= len(span) > 0
    before = np.concatenate([[0.0], np.cumsum(np.cumsum(asked))])
    own = [max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in zip(needs, holds, strict=True)]
    borrowed = np.array([len(span) for span in needs], dtype=float) - own
    lent = np.array([before[span.stop] - before[span.start] if len(span) else 0.0 for span in holds]) - own
    others = len(needs) - 1
    # A row of R belongs to a row of G, which two neighbours share where each has more than a row.
    neighbours = matrix.side == "right" and not of_basis and fragment_numels(matrix).max() >= matrix.shape[1]
    return borrowed, lent, min(2, others) if neighbours else others


class GroupModel:
    """The exchange of one param group.

    Args:
        layout: of the group.
        settings: of the group.
    """

    def __init__(self, layout: GroupLayout, settings: GroupSettings) -> None:
        self.layout, self.settings, self.matrices = layout, settings, layout.low_rank
        self.turns = turns_of(self.matrices) if self.matrices else []
        first = self.turns[0] if self.turns else []
        self.keeps = set(first) if any(self.matrices[p].shares_basis for p in first) else set()

    def step(self, exchange: Exchange, refresh: bool = False) -> None:
        """Make a step between two refreshes, or one in which every basis is renewed.

        A step right behind a refresh sends the kept rows of P too; they are counted with the refresh.
        """
        for turn in self.layout.gathered_turns:
            flows = [to_owner(matrix, fragment_numels(matrix.alike)) for matrix in turn]
            both = [Flow(flow.sharers, 2 * flow.sent, 2 * flow.received, flow.peers) for flow in flows]
            exchange.wait(exchange.deliver(both))  # gradients and weights
            exchange.wait(exchange.deliver([flow.back() for flow in flows]))
        if self.matrices:
            group = _LowRankStep(self, exchange, refresh)
            overlapped(group.turn(positions) for positions in self.turns)

    def refresh(self, exchange: Exchange) -> None:
        """New bases of all low-rank matrices: in rounds of one matrix an owner."""
        reads = needs_old_basis(self.settings)
        for turn in owner_turns([(matrix, matrix) for matrix in self.matrices.values()], limit=1):
            grads = [to_owner(matrix, fragment_numels(matrix.alike)) for matrix in turn]
            rows = [(matrix, _basis_numels(matrix.alike)) for matrix in turn if matrix.basis_is_split]
            ends = exchange.deliver([to_owner(*each) for each in rows]) if reads and rows else exchange.now
            exchange.wait(exchange.deliver(grads))
            exchange.wait(ends)
            sizes = [(matrix, _basis_numels(matrix.alike) + 1) for matrix in turn]
            change = [matrix.rank**2 * matrix.sends_change(self.settings) for matrix in turn]
            answers = [to_owner(m, each + more).back() for (m, each), more in zip(sizes, change, strict=True)]
            exchange.wait(exchange.deliver(answers))


@lru_cache(maxsize=4096)
def _basis_numels(matrix: SharedEntries) -> np.ndarray:
    return matrix.rank * np.array([len(matrix.basis_rows(sharer)) for sharer in matrix.sharers], dtype=float)


class _LowRankStep:
    """The turns of one step: `Turn.run` and `Agreement`, of which only what crosses ranks is left."""

    def __init__(self, group: GroupModel, exchange: Exchange, refresh: bool) -> None:
        self.group, self.exchange, self.due = group, exchange, refresh
        self.known = set(group.keeps)
        self._agreed: float | None = None
        self._settled = False

    def turn(self, positions: Sequence[int]) -> Iterator[None]:
        exchange, group = self.exchange, self.group
        ahead = not self._settled
        yield from self._sum_low_rank(positions)
        self._settle()
        if ahead and self.due:
            self.known -= set(positions)
            yield from self._sum_low_rank(positions)
        forms = forms_of(positions, group.matrices, group.settings)
        adding = exchange.add_up(LOW_RANK_SUMS * len(positions))
        early = [p for p in positions if forms[p] != "late"]
        answering = self._answer(early, forms)
        yield
        exchange.wait(max(adding, answering))
        late = [p for p in positions if forms[p] == "late"]
        if late:
            answering = self._answer(late, forms)
            yield
            exchange.wait(answering)

    def _settle(self) -> None:
        if self._settled:
            return
        self.exchange.wait(self._agreed)
        self._settled = True
        if self.due:
            self.group.refresh(self.exchange)

    def _sum_low_rank(self, positions: Sequence[int]) -> Iterator[None]:
        exchange, matrices = self.exchange, self.group.matrices
        known = self.known.issuperset(positions)
        shared = [p for p in positions if matrices[p].shares_basis]
        ends = exchange.now
        if not known and any(matrices[p].sums.borrowed_basis_rows for p in shared):
            flows = [self._flow(matrices[p], True, matrices[p].rank).back() for p in shared]
            ends = exchange.deliver(flows)
        if self._agreed is None:
            self._agreed = exchange.add_up(GRADIENT_SUMS * len(matrices))
        if not known and shared:
            yield
        exchange.wait(ends)
        if self.group.keeps.issuperset(positions):
            self.known |= set(positions)
        flows = [self._flow(matrices[p], False, matrices[p].rank + 1) for p in positions]
        ends = exchange.deliver(flows) if any(flow.sent.any() for flow in flows) else exchange.now
        yield
        exchange.wait(ends)

    def _answer(self, positions: Sequence[int], forms: dict[int, AnswerForm]) -> float:
        flows = []
        for position in positions:
            matrix = self.group.matrices[position]
            numel = 2 * matrix.rank + PHI_NUMEL if forms[position] == "in_parts" else matrix.rank + 1
            flows.append(self._flow(matrix, False, numel).back())
        return self.exchange.deliver(flows) if any(flow.sent.any() for flow in flows) else self.exchange.now

    @staticmethod
    def _flow(matrix: SplitMatrix, of_basis: bool, numel: int) -> Flow:
        """Some elements for every borrowed entry, to those who keep them."""
        borrowed, lent, peers = entries(matrix.alike, of_basis)
        return Flow(matrix.sharers, numel * borrowed, numel * lent, peers)
