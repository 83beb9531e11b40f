"""How a kernel finds its operands: matrices that lie anywhere, taken as one batch by a table of where they begin.

A launch works on k matrices of one shape. Where they follow each other at equal distances a number says where each
begins; else a table on the device does, of distances from the first of them, in elements. Matrices of different
tensors, and those that lie scattered in a flat buffer, so are one batch without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fira.core.capture import capturing, refuse_if_capturing

# A multiple of so many elements lets a kernel read whole 16-byte units.
UNIT = 16


class View(NamedTuple):
    """A batch of matrices, or of one number for each row or column of them, as a kernel takes it.

    Attributes:
        data: a tensor of their dtype, from whose first element on places count.
        batch: elements from one matrix to the next; with a table, what its entries are multiples of.
        rows: elements from one row, or number, to the next.
        columns: elements from one column to the next.
        start: elements from the tensor's first to the first matrix.
        table: where every matrix begins, from the first on, int64, (k,), in units of `batch`; None for equal distances.
    """

    data: Tensor
    batch: int
    rows: int = 0
    columns: int = 0
    start: int = 0
    table: Tensor | None = None


# A tensor, and how many elements behind its first one a matrix begins.
Origin = tuple[Tensor, int]


def batched(tensor: Tensor, *shape: int) -> View:
    """`tensor` as a view of `shape`, which begins with the batch.

    What has one entry for all, along the batch or along another dimension, gets a stride of zero there.

    Raises:
        RuntimeError: it does not fit, as torch says it.
    """
    missing = len(shape) - tensor.ndim
    sizes, strides = (1,) * missing + tuple(tensor.shape), (0,) * missing + tensor.stride()
    if missing < 0 or any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        raise RuntimeError(f"a tensor of size {tuple(tensor.shape)} does not fit {shape}; give it that shape.")
    return View(tensor, *(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)))


def origins(operands: Sequence[Sequence[Origin]]) -> list[View]:
    """Views that say where matrices begin, for operands of k matrices each; `rows` and `columns` are to be filled in.

    Args:
        operands: of each, where its k matrices begin; of one dtype, on one device.
    """
    views: list[View] = []
    scattered: list[tuple[int, ...]] = []
    for matrices in operands:
        data, start = matrices[0]
        size, begin = data.element_size(), data.data_ptr()
        # From one allocation to another too: tensors begin at multiples of their elements' size.
        distances = [(tensor.data_ptr() - begin) // size + at - start for tensor, at in matrices]
        batch = distances[1] if len(distances) > 1 else 0
        table: Tensor | None = None
        if any(distance != place * batch for place, distance in enumerate(distances)):
            batch = 1 if any(distance % UNIT for distance in distances) else UNIT
            scattered.append(tuple(distance // batch for distance in distances))
            table = data  # until it is there
        views.append(View(data, batch, start=start, table=table))
    tables = iter(_tables(operands[0][0][0].device, tuple(scattered)) if scattered else ())
    return [view if view.table is None else view._replace(table=next(tables)) for view in views]


# Tables that a captured graph reads, whose end nobody tells: some hundred bytes of every batch.
_captured: dict[tuple[torch.device, tuple[tuple[int, ...], ...]], tuple[Tensor, ...]] = {}


def _tables(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """The rows as tensors on a device."""
    tables = _uploaded(device, rows)
    if capturing():
        _captured[device, rows] = tables
    return tables


def table_of(device: torch.device, row: tuple[int, ...]) -> Tensor:
    """Numbers that a kernel looks up, int64, on a device; kept for the steps with the same ones.

    Raises:
        ValueError: a capture is under way, and they are others than in the step before.
    """
    return _tables(device, (row,))[0]


@functools.lru_cache(maxsize=1024)
def _uploaded(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """The rows, kept, because weights and states stay where they are.

    Raises:
        ValueError: a capture is under way, which cannot upload.
    """
    refuse_if_capturing(
        "gradients or weights do not lie where they lay in the step before it",
        "make that step with the gradients that are captured, and clear them by zero_grad(set_to_none=False)",
    )
    # Rows of whole 16-byte units, as a kernel is compiled anew for another alignment.
    padded = [row + (0,) * (len(row) % 2) for row in rows]
    table = torch.tensor(padded if len(padded) > 1 else padded[0], dtype=torch.int64)
    if device.type == "cuda":
        # From pinned memory the host does not wait for what the device has yet to do.
        table = table.pin_memory().to(device, non_blocking=True)
    return table.unbind() if len(padded) > 1 else (table,)


@triton.jit
def origin(view, matrix):
    """Where a matrix of a view begins; `matrix` is an int64."""
    if view.table is None:
        at = view.data + matrix * view.batch
    else:
        at = view.data + tl.load(view.table + matrix) * view.batch
    return at + view.start


class Room:
    """Memory of one dtype that a step needs for itself, allocated at once and given out in parts.

    Attributes:
        tensor: all of it, 1-D; None before `allocate`.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self._size = 0

    def reserve(self, count: int, numel: int) -> tuple[int, int]:
        """Take `count` times `numel` elements; gives the place of the first, and the distance from one to the next."""
        start, batch = self._size, -(-numel // UNIT) * UNIT
        self._size += count * batch
        return start, batch

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the memory for all that was reserved."""
        self.tensor = torch.empty(self._size, dtype=dtype, device=device)

    def view(self, reserved: tuple[int, int], rows: int = 0, columns: int = 0) -> View:
        """What was reserved, as a kernel takes it."""
        return View(self.tensor, reserved[1], rows, columns, start=reserved[0])

    def read(self, reserved: tuple[int, int], batch: tuple[int, ...], *shape: int, start: int = 0) -> Tensor:
        """What was reserved, as a tensor (*batch, *shape) whose last dimensions are contiguous.

        Args:
            reserved: as `reserve` gave it.
            batch: () or (k,).
            shape: of the part of one matrix.
            start: elements of each part to leave out in front.
        """
        strides = [1] * len(shape)
        for place in range(len(shape) - 2, -1, -1):
            strides[place] = strides[place + 1] * shape[place + 1]
        return self.tensor.as_strided((*batch, *shape), (*[reserved[1]] * len(batch), *strides), reserved[0] + start)
