"""Every collective of the package, through `torch.distributed`. No other file communicates."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_fira.sharding.geometry import MatrixShard
from ds_fira.sharding.plan import GroupLayout


@dataclass(frozen=True, slots=True)
class Message:
    """Elements that one rank sends to another in an exchange that all ranks know beforehand.

    Attributes:
        source: the dp_rank that sends it.
        target: the dp_rank that receives it, another one.
        key: tells the message from the others of the same exchange.
        numel: its elements.
    """

    source: int
    target: int
    key: Hashable
    numel: int


class Communicator:
    """The ranks that ZeRO partitions over, and what this rank has sent them.

    Attributes:
        group: the process group, None for all ranks.
        dp_rank: this process's index in it.
        dp_size: its number of processes.
        collectives: collectives it has taken part in since the start for gradients, weights and bases.
        bytes_sent: payload bytes it has handed to them.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.dp_rank: int = dist.get_rank(group=group)
        self.dp_size: int = dist.get_world_size(group=group)
        self.collectives = 0
        self.bytes_sent = 0

    def _wire_device(self) -> torch.device:
        # NCCL carries no CPU tensors; under optimizer offload the flat buffers are on the CPU.
        over_cpu = dist.get_backend(self.group) == "gloo" or not torch.cuda.is_available()
        return torch.device("cpu") if over_cpu else torch.device("cuda", torch.cuda.current_device())

    def all_to_all(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Tensor:
        """Exchange pieces of a 1-D tensor with all ranks, one piece each way, in order of rank.

        Args:
            sent: the pieces for rank 0, 1, ... one after the other.
            sent_counts: elements for each rank.
            received_counts: elements from each rank.

        Returns:
            The pieces from rank 0, 1, ... on `sent`'s device.
        """
        device = self._wire_device()
        received = torch.empty(sum(received_counts), dtype=sent.dtype, device=device)
        dist.all_to_all_single(received, sent.to(device), received_counts, sent_counts, group=self.group)
        self.collectives += 1
        self.bytes_sent += sent.numel() * sent.element_size()
        return received.to(sent.device)

    def deliver(
        self,
        messages: Sequence[Message],
        payloads: Mapping[Hashable, Sequence[Tensor]],
        like: Tensor,
        needed: bool | None = None,
    ) -> dict[Hashable, Tensor]:
        """Exchange messages in one all_to_all; none where there is no message at all.

        Args:
            messages: of all ranks, or those that this rank sends or receives; in one order on every rank.
            payloads: by key, the tensors that make up each message this rank sends, of `like`'s dtype.
            like: gives dtype and device, also to a rank that sends nothing.
            needed: whether any rank has a message; None where `messages` are of all ranks.

        Returns:
            By key, each message sent to this rank, 1-D.
        """
        if not (messages if needed is None else needed):
            return {}
        sent = sorted((m for m in messages if m.source == self.dp_rank), key=lambda message: message.target)
        received = sorted((m for m in messages if m.target == self.dp_rank), key=lambda message: message.source)
        sent_counts, received_counts = [0] * self.dp_size, [0] * self.dp_size
        for message in sent:
            sent_counts[message.target] += message.numel
        for message in received:
            received_counts[message.source] += message.numel
        tensors = [tensor.reshape(-1) for message in sent for tensor in payloads[message.key]]
        # One tensor travels as it is: a fragment of a large gradient is not copied.
        packed = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else like.new_empty(0)
        arrived = self.all_to_all(packed, sent_counts, received_counts)
        pieces = _split(arrived, [message.numel for message in received])
        return {message.key: piece for message, piece in zip(received, pieces, strict=True)}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, the same on each to the bit, on the tensor's own device."""
        carried = tensor.to(self._wire_device(), copy=True)
        dist.all_reduce(carried, group=self.group)
        self.collectives += 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return carried.to(tensor.device)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` as the rank `source` of this communicator has it, on the tensor's own device."""
        carried = tensor.to(self._wire_device())
        dist.broadcast(carried, self._global_rank(source), group=self.group)
        self.collectives += 1
        if source == self.dp_rank:
            self.bytes_sent += tensor.numel() * tensor.element_size()
        return carried.to(tensor.device)

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every rank, in order of rank; for plans and reports, never in a step."""
        items: list[Any] = [None] * self.dp_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, float64, in order of rank; for reports, in one small collective."""
        # A sum in which every rank fills its own row: torch is renaming the gathering collectives.
        rows = torch.zeros(self.dp_size, len(numbers), dtype=torch.float64)
        rows[self.dp_rank] = torch.tensor(numbers, dtype=torch.float64)
        rows = rows.to(self._wire_device())
        dist.all_reduce(rows, group=self.group)
        return rows.tolist()

    def all_equal(self, numbers: Tensor) -> bool:
        """Whether an int64 tensor is the same on every rank; one collective of twice its size, read by the host."""
        # The largest of x and of ~x, which orders the other way round, are x and ~x where all are equal.
        largest = torch.cat([numbers, ~numbers]).to(self._wire_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        first, second = largest.chunk(2)
        return bool((first == ~second).all())

    def require_same(self, digest: str) -> None:
        """Stop on every rank unless all of them hold the same plan.

        Raises:
            RuntimeError: the digests differ; names the ranks that differ from rank 0.
        """
        digests = self.gather_objects(digest)
        differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if differing:
            raise RuntimeError(
                f"FiraAdam: ranks {differing} planned another layout than rank 0; build the same model with the same "
                "DeepSpeed config on every rank."
            )

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class GatherExchange:
    """Carries the fragments of one param group's cut matrices to their owners and the new weights back.

    The base way, exact to the bit: the owner assembles gradient and weight, makes the whole-matrix step, and every
    sharer gets its part of the result. Two collectives a step for the group, on all ranks of the communicator.
    """

    def __init__(self, layout: GroupLayout, communicator: Communicator) -> None:
        self.communicator = communicator
        rank = communicator.dp_rank
        self._sent, self._received = layout.exchange_counts(rank)
        # (owner, fragment) of what this rank lends out, in the order in which all_to_all carries it.
        self._lent: list[tuple[int, MatrixShard]] = sorted(
            (
                (matrix.owner, fragment)
                for matrix in layout.base_cuts
                for holder, fragment in matrix.fragments
                if holder == rank != matrix.owner
            ),
            key=lambda item: item[0],
        )
        self.owned = layout.owned_cuts(rank)  # in the layout's order

    def to_owners(self, *flats: Tensor) -> list[list[Tensor]]:
        """Assemble the cut matrices this rank owns.

        Args:
            *flats: flat buffers of one dtype and layout, such as gradients and weights.

        Returns:
            For every owned cut matrix, in the layout's order, an (m, n) tensor from each buffer.
        """
        width = len(flats)
        pieces = [[fragment.fragment(flat) for flat in flats] for _, fragment in self._lent]
        sent = torch.cat([piece for pair in pieces for piece in pair]) if pieces else flats[0].new_empty(0)
        received = self.communicator.all_to_all(
            sent, [width * count for count in self._sent], [width * count for count in self._received]
        )
        whole = [[flat.new_empty(matrix.shape) for flat in flats] for matrix in self.owned]
        views = list(self._borrowed_views(whole))
        for view, piece in zip(views, _split(received, [view.numel() for view in views]), strict=True):
            view.copy_(piece)
        for tensors, fragment in self._own_fragments(whole):
            for tensor, flat in zip(tensors, flats, strict=True):
                _part(tensor, fragment).copy_(fragment.fragment(flat))
        return whole

    def to_holders(self, flat: Tensor, matrices: Sequence[Tensor]) -> None:
        """Write the new value of every cut matrix into the fragments of `flat`, on all ranks that share it.

        Args:
            flat: the flat weights.
            matrices: for every owned cut matrix, in the layout's order, its new (m, n) value.
        """
        whole = [[matrix] for matrix in matrices]
        pieces = list(self._borrowed_views(whole))
        sent = torch.cat(pieces) if pieces else flat.new_empty(0)
        received = self.communicator.all_to_all(sent, self._received, self._sent)
        for (_, fragment), piece in zip(
            self._lent, _split(received, [fragment.numel for _, fragment in self._lent]), strict=True
        ):
            fragment.fragment(flat).copy_(piece)
        for (tensor,), fragment in self._own_fragments(whole):
            fragment.fragment(flat).copy_(_part(tensor, fragment))

    def _borrowed_views(self, whole: list[list[Tensor]]) -> Iterator[Tensor]:
        """Views of the parts that other ranks hold, in the order in which all_to_all delivers them."""
        for holder in range(self.communicator.dp_size):
            for tensors, matrix in zip(whole, self.owned, strict=True):
                for other, fragment in matrix.fragments:
                    if other == holder != self.communicator.dp_rank:
                        yield from (_part(tensor, fragment) for tensor in tensors)

    def _own_fragments(self, whole: list[list[Tensor]]) -> Iterator[tuple[list[Tensor], MatrixShard]]:
        """The assembled tensors of every owned matrix that this rank holds a part of, with that part."""
        for tensors, matrix in zip(whole, self.owned, strict=True):
            for holder, fragment in matrix.fragments:
                if holder == self.communicator.dp_rank:
                    yield tensors, fragment


def _part(matrix: Tensor, fragment: MatrixShard) -> Tensor:
    """The elements of an assembled matrix that a fragment stands for."""
    return matrix.view(-1)[fragment.start : fragment.stop]


def _split(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return tensor.split(sizes) if sizes else ()
