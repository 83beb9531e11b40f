"""Gradients that become final one by one in a backward pass, averaged over replicas in buckets of several.

Every rank fills the same buckets in the same order, that of a backward pass: the last parameters come first. A bucket
travels as soon as all of its parameters have a gradient and the buckets before it are under way; one travels while the
next one fills. What no rank has a gradient of keeps none, as under torch's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ds_fira.sharding.comm import Communicator, Pending
from ds_fira.sharding.plan import split_by_size

# Bytes of gradients that travel together: few enough to keep little memory, enough for a link to be busy with.
BUCKET_BYTES = 25 * 2**20


class MeanBuckets:
    """The replicas' gradients on their way.

    Args:
        params: all that is trained, in the module's order, the same on every rank.
        communicator: the replicas.
        bucket_bytes: of gradients that travel together at most, or one parameter's.
    """

    def __init__(self, params: Sequence[Tensor], communicator: Communicator, bucket_bytes: int) -> None:
        self._communicator = communicator
        kinds = groupby(reversed(params), key=lambda param: (param.dtype, param.device))
        self._buckets = [
            bucket
            for _, alike in kinds
            for bucket in split_by_size([(param.nbytes, param) for param in alike], bucket_bytes)
        ]
        self._number = {id(param): number for number, bucket in enumerate(self._buckets) for param in bucket}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = 0
        self._travelling: tuple[list[Tensor], Pending[Tensor]] | None = None

    def arrive(self, param: Tensor) -> Iterator[tuple[Tensor]]:
        """Take note of a gradient, and give the parameters whose mean gradients have come meanwhile, one by one."""
        self._missing[self._number[id(param)]] -= 1
        while self._sent < len(self._buckets) and self._missing[self._sent] == 0:
            yield from self._send()

    def finish(self) -> Iterator[tuple[Tensor]]:
        """At the end of a backward pass: send what is left, and give the parameters that have not been given yet."""
        while self._sent < len(self._buckets):
            yield from self._send()
        yield from self._receive()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = 0

    def _send(self) -> Iterator[tuple[Tensor]]:
        bucket = self._buckets[self._sent]
        self._sent += 1
        # Behind the gradients stands of each parameter whether there is one: what is unused everywhere is not stepped.
        has = bucket[0].new_tensor([param.grad is not None for param in bucket])
        parts = [torch.zeros_like(param) if param.grad is None else param.grad for param in bucket]
        packed = torch.cat([*(part.reshape(-1) for part in parts), has])
        for param in bucket:
            param.grad = None
        started = self._communicator.start_all_reduce(packed, keep=False)
        yield from self._receive()
        self._travelling = bucket, started

    def _receive(self) -> Iterator[tuple[Tensor]]:
        if self._travelling is None:
            return
        (bucket, arriving), self._travelling = self._travelling, None
        total = arriving.wait()
        *sums, has = total.split([*(param.numel() for param in bucket), len(bucket)])
        for param, one, count in zip(bucket, sums, has.tolist(), strict=True):
            if count > 0:
                param.grad = one.div_(self._communicator.dp_size).view(param.shape)
                yield (param,)
