"""Every collective of the training step, through `torch.distributed`, on a process group that the engine hands over."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

ProcessGroup = dist.ProcessGroup
T = TypeVar("T")
U = TypeVar("U")
Key = TypeVar("Key", bound=Hashable)


class Pending(Generic[T]):
    """What a collective that has been started will give; what it sends must not change before `wait` has returned.

    All ranks start the same collectives in the same order. They may wait for them in another order, or not at all where
    an error has ended the step.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        """Take what waits for the collective and returns what it gives."""
        self._finish: Callable[[], T] | None = finish
        self._found: list[T] = []

    def wait(self) -> T:
        """What has arrived; on a GPU its stream waits, not the host. A second call returns the same.

        Raises:
            RuntimeError: another process is gone, or did not take part in time, as a collective that is not started
                ahead would raise it.
        """
        if self._finish is not None:
            self._found.append(self._finish())
            self._finish = None  # and with it what was sent
        return self._found[0]

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """What `change` makes of what arrives."""
        return Pending(lambda: change(self.wait()))


class Communicator:
    """The ranks that the engine partitions over, and what this rank has sent them.

    Attributes:
        group: the process group, None for all ranks.
        dp_rank: this process's index in it.
        dp_size: its number of processes.
        collectives: collectives it has taken part in since the start for gradients, weights and bases.
        bytes_sent: payload bytes it has handed to them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.dp_rank = dist.get_rank(group)
        self.dp_size = dist.get_world_size(group)
        self.collectives = 0
        self.bytes_sent = 0

    @property
    def _wire_device(self) -> torch.device:
        # NCCL carries no CPU tensors; under optimizer offload the flat buffers are on the CPU.
        accelerator = None if dist.get_backend(self.group) == "gloo" else torch.accelerator.current_accelerator()
        return accelerator or torch.device("cpu")

    def _count(self, sent: Tensor | None) -> None:
        self.collectives += 1
        self.bytes_sent += 0 if sent is None else sent.nbytes

    def start_all_to_all(self, sent: Tensor, sent_counts: list[int], received_counts: list[int]) -> Pending[Tensor]:
        """Start to exchange pieces of a 1-D tensor with all ranks, one piece each way, in order of rank.

        Args:
            sent: the pieces for rank 0, 1, ... one after the other.
            sent_counts: elements for each rank.
            received_counts: elements from each rank.

        Returns:
            The pieces from rank 0, 1, ... on `sent`'s device.
        """
        wire = sent.to(self._wire_device)
        received = wire.new_empty(sum(received_counts))
        work = dist.all_to_all_single(received, wire, received_counts, sent_counts, group=self.group, async_op=True)
        self._count(sent)
        return self._arriving(work, received, wire, sent.device)

    @staticmethod
    def _arriving(work: dist.Work, received: Tensor, sent: Tensor, device: torch.device) -> Pending[Tensor]:
        def finish(_: Tensor = sent) -> Tensor:  # which lives until then
            work.wait()
            return received.to(device)

        return Pending(finish)

    def start_deliver(
        self,
        sent: Sequence[tuple[int, Sequence[Tensor]]],
        expected: Sequence[tuple[int, Key, int]],
        like: Tensor,
        needed: bool = True,
    ) -> Pending[dict[Key, Tensor]]:
        """Start to exchange payloads in one all_to_all; a collective call unless nothing is needed.

        Several payloads between two ranks arrive in the order in which they are sent.

        Args:
            sent: (target, payload) of all that this rank sends; a payload is tensors of `like`'s dtype.
            expected: (source, key, elements) of all that is sent to this rank.
            like: gives dtype and device, also to a rank that sends nothing.
            needed: whether any rank sends anything; the same on every rank.

        Returns:
            By key, each payload sent to this rank, 1-D.
        """
        if not needed:
            return Pending(dict)
        sent_counts, received_counts = [0] * self.dp_size, [0] * self.dp_size
        tensors = []
        for target, payload in sorted(sent, key=lambda item: item[0]):
            tensors += [tensor.reshape(-1) for tensor in payload]
            sent_counts[target] += sum(tensor.numel() for tensor in payload)
        expected = sorted(expected, key=lambda item: item[0])
        for source, _, numel in expected:
            received_counts[source] += numel
        # One tensor travels as it is: a fragment of a large gradient is not copied.
        packed = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else like.new_empty(0)
        arriving = self.start_all_to_all(packed, sent_counts, received_counts)

        def take_apart(arrived: Tensor) -> dict[Key, Tensor]:
            payloads = arrived.split([numel for *_, numel in expected])
            return {key: payload for (_, key, _), payload in zip(expected, payloads, strict=True)}

        return arriving.then(take_apart)

    def deliver(
        self,
        sent: Sequence[tuple[int, Sequence[Tensor]]],
        expected: Sequence[tuple[int, Key, int]],
        like: Tensor,
        needed: bool = True,
    ) -> dict[Key, Tensor]:
        """Exchange payloads in one all_to_all and wait for them: see `start_deliver`."""
        return self.start_deliver(sent, expected, like, needed).wait()

    def start_all_reduce(self, tensor: Tensor, keep: bool = True) -> Pending[Tensor]:
        """Start to sum `tensor` over all ranks; the sum is the same on each to the bit, on the tensor's own device.

        Unless it is to be kept, the tensor's memory may hold the sum afterwards.
        """
        total = tensor.to(self._wire_device, copy=keep)
        work = dist.all_reduce(total, group=self.group, async_op=True)
        self._count(tensor)
        return self._arriving(work, total, total, tensor.device)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` as the rank `source` of this communicator has it, on the tensor's own device."""
        value = tensor.to(self._wire_device)
        dist.broadcast(value, group=self.group, group_src=source)
        self._count(tensor if source == self.dp_rank else None)
        return value.to(tensor.device)

    def gather_objects(self, item: T) -> list[T]:
        """`item` of every rank, in order of rank; for plans and reports, never in a step."""
        items: list[T] = [item] * self.dp_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, float64, in order of rank; for reports, in one small collective."""
        # A sum in which every rank fills its own row: torch is renaming the gathering collectives.
        rows = torch.zeros(self.dp_size, len(numbers), dtype=torch.float64)
        rows[self.dp_rank] = torch.tensor(numbers, dtype=torch.float64)
        rows = rows.to(self._wire_device)
        dist.all_reduce(rows, group=self.group)
        return rows.tolist()

    def all_equal(self, numbers: Tensor) -> bool:
        """Whether an int64 tensor is the same on every rank; one collective of twice its size, read by the host."""
        # The largest of x and of ~x, which orders the other way round, are x and ~x where all are equal.
        largest = torch.cat([numbers, ~numbers]).to(self._wire_device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        first, second = largest.chunk(2)
        return bool((first == ~second).all())

    def require_same(self, digest: str, optimizer: str) -> None:
        """Stop on every rank unless all of them hold the same plan.

        Args:
            digest: of this rank's plan.
            optimizer: the name of the user's optimizer, for the error.

        Raises:
            RuntimeError: the digests differ; names the ranks that differ from rank 0.
        """
        digests = self.gather_objects(digest)
        differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if differing:
            raise RuntimeError(
                f"{optimizer}: ranks {differing} planned another layout than rank 0; build the same model with the "
                "same settings on every rank."
            )


def is_first_process() -> bool:
    """Whether this process speaks where one of several is enough."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
