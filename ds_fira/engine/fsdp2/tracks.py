"""Entries of states that go from the ranks that have them to those that shall have them, all in one exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_fira.checkpoint.slices import Missing
from ds_fira.sharding.comm import Communicator


@dataclass(frozen=True, slots=True)
class Track:
    """One state of one matrix, by its entries: rows of P, columns or rows of R, or one entry of numbers.

    Attributes:
        width: numbers in an entry.
        sources: by rank, the entries that it has; of what several have, the first gives.
        targets: by rank, the entries that it shall have.
        source: what this rank has, entries along the first dimension; None where it has none.
        target: where what it shall have is written, likewise.
    """

    width: int
    sources: Sequence[range]
    targets: Sequence[range]
    source: Tensor | None
    target: Tensor | None

    def transfers(self) -> Iterator[tuple[int, int, range]]:
        """(from, to, entries) of all that goes from one rank to another, or stays; the same on every rank."""
        for target, wanted in enumerate(self.targets):
            missing = Missing(wanted)
            for source, held in enumerate(self.sources):
                for entries in missing.take(held):
                    yield source, target, entries


def carry(tracks: Iterable[Track], communicator: Communicator, like: Tensor) -> None:
    """Fill the targets of all tracks; a collective call.

    Args:
        tracks: the same on every rank but for `source` and `target`.
        communicator: the ranks.
        like: gives dtype and device of what travels.
    """
    tracks, rank, sent, expected = list(tracks), communicator.dp_rank, [], []
    for number, track in enumerate(tracks):
        for source, target, entries in track.transfers():
            if source == rank:
                values = _part(track.source, entries, track.sources[rank])
                sent.append((target, [values.to(device=like.device, dtype=like.dtype)]))
            if target == rank:
                expected.append((source, (number, entries), len(entries) * track.width))
    for (number, entries), values in communicator.deliver(sent, expected, like).items():
        place = _part(tracks[number].target, entries, tracks[number].targets[rank])
        place.copy_(values.view(place.shape))


def _part(tensor: Tensor, entries: range, held: range) -> Tensor:
    return tensor[entries.start - held.start : entries.stop - held.start]
