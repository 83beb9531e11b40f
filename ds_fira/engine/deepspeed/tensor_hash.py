"""A hash of tensors on their device, to compare copies that have to be equal to the bit.

The bits of a tensor are read as 32-bit words x_i, whatever its dtype, and summed as x_i w_i modulo 2^64 with a 64-bit
number w_i for every place: multilinear hashing, where two different tensors have the same sum once in 2^31 cases or
fewer (Lemire and Kaser 2014, arXiv 1202.4961). The w_i are odd, so a change of one word is always seen. Integer sums do
not depend on their order: the result is the same on every device and in every run. No host waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

WORD = 4  # bytes
# Words hashed at a time, which bounds the temporaries: 64 MB on a device; on a CPU they stay in cache.
DEVICE_CHUNK = 2**22
CPU_CHUNK = 2**15
# Odd constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = 0xBF58476D1CE4E5B9 - 2**64


def hash_tensor(tensor: Tensor) -> Tensor:
    """The hash of a tensor's elements in row-major order.

    Args:
        tensor: of any shape, strides, dtype and device.

    Returns:
        int64, 0-dim, on the tensor's device; 0 for no elements. Trailing zeros do not count: tensors to be compared
        have the same shape.
    """
    flat = tensor.detach().reshape(-1)
    size = CPU_CHUNK if flat.device.type == "cpu" else DEVICE_CHUNK
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(flat.split(size * WORD // flat.element_size())):
        words = _words(chunk)
        # Every chunk has its own odd factor, so their order counts.
        total += (words * _weights(size, flat.device)[: words.numel()]).sum() * _signed64(2 * number * GOLDEN + 1)
    return total


def hash_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The hashes of tensors, int64, (number of tensors,), on the first one's device; all on devices of one kind."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([hash_tensor(tensor).to(tensors[0].device) for tensor in tensors])


def combine(hashes: Tensor) -> Tensor:
    """One hash, int64, (1,), of many in their order."""
    return hash_tensor(hashes).unsqueeze(0)


def describe_difference(rows: Sequence[Mapping[str, int]]) -> str | None:
    """What differs between ranks, for a message; None where nothing does.

    Args:
        rows: of every rank in order, the hashes of the tensors that it holds, by name.
    """
    values: dict[str, list[int]] = {}  # of every tensor, on the ranks that hold it
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    differing = [name for name, found in values.items() if len(set(found)) > 1]
    if not differing:
        return None
    shown = ", ".join(differing[:3])
    shown += f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    usual = {name: max(values[name], key=values[name].count) for name in differing}
    holders = [rank for rank, row in enumerate(rows) if any(name in row for name in differing)]
    if any(2 * values[name].count(usual[name]) <= len(values[name]) for name in differing):
        return f"{shown} on ranks {holders}, of which no majority agrees"
    odd = [rank for rank in holders if any(rows[rank].get(name, usual[name]) != usual[name] for name in differing)]
    return f"{shown} on rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"


def _words(chunk: Tensor) -> Tensor:
    """The bits of a 1-D tensor as int32, zeros after its end."""
    whole = chunk.numel() * chunk.element_size()
    if whole % WORD:
        chunk = torch.nn.functional.pad(chunk.view(torch.uint8), (0, -whole % WORD))
    elif chunk.storage_offset() * chunk.element_size() % WORD:
        chunk = chunk.clone()  # a word has to begin where memory allows it
    return chunk.view(torch.int32)


@cache
def _weights(count: int, device: torch.device) -> Tensor:
    """An odd number for every place, int64, (count,)."""
    place = torch.arange(1, count + 1, dtype=torch.int64, device=device) * GOLDEN
    place = (place ^ ((place >> 30) & (2**34 - 1))) * MIX
    return (place ^ ((place >> 27) & (2**37 - 1))) | 1


def _signed64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
