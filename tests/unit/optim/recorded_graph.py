"""What stands for a CUDA graph on a CPU: it records what a step launches, computes nothing, and launches it again.

Like a capture it holds arguments by value and tensors by address, and refuses what a capture cannot do: reads by the
host, uploads from it. Memory is allocated while it records, as from a graph's own pool, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

ATEN = torch.ops.aten
ALLOCATIONS = (ATEN.empty.memory_format, ATEN.empty_strided.default, ATEN.new_empty.default, ATEN.empty_like.default)
REFUSED = (
    *(ATEN._local_scalar_dense.default, ATEN.is_nonzero.default, ATEN.equal.default, ATEN.nonzero.default),
    *(ATEN.masked_select.default, ATEN.lift_fresh.default, ATEN.scalar_tensor.default, ATEN._to_copy.default),
)
INTERPRET = GridExecutor.__call__


class NotOfTheDevice(Exception):
    """Something that the host would have to do or to wait for."""


class RecordedGraph(TorchDispatchMode):
    """Records what is done inside `recording`; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Tensor | None]] = []
        self.pool: list[Tensor] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED:
            raise NotOfTheDevice(str(func))
        if func.namespace == "profiler" or func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.launches.append((func, args, kwargs, None))
            return args[0]
        out = func(*args, **kwargs)
        self.pool.append(out)
        if func not in ALLOCATIONS:
            self.launches.append((func, args, kwargs, out))
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As `torch.cuda.graph`, the kernels being interpreted ones."""

        def record(executor: GridExecutor, *args: Any, **options: Any) -> None:
            self.launches.append((executor, args, options, None))

        with (
            mock.patch.object(torch.cuda, "is_initialized", return_value=True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
            mock.patch.object(GridExecutor, "__call__", record),
            self,
        ):
            yield

    def replay(self) -> None:
        """Launch all again, on what is in the same memory now."""
        with _disable_current_modes():
            for launched, args, options, out in self.launches:
                if isinstance(launched, GridExecutor):
                    INTERPRET(launched, *args, **options)
                elif out is None:
                    launched(*args, **options)
                else:
                    out.copy_(launched(*args, **options))

    def told(self) -> list[Any]:
        """Every launch with all of its arguments: tensors by address, and those of the pool by their place in it."""
        storages = {tensor.untyped_storage().data_ptr(): place for place, tensor in enumerate(self.pool)}

        def tell(value: Any) -> Any:
            if isinstance(value, Tensor):
                place = storages.get(value.untyped_storage().data_ptr())
                address = value.data_ptr() if place is None else (place, value.storage_offset())
                return address, tuple(value.shape), value.stride(), value.dtype
            return tuple(map(tell, value)) if isinstance(value, tuple | list) else (type(value), value)

        return [
            (
                launched.fn.__name__ if isinstance(launched, GridExecutor) else str(launched),
                getattr(launched, "grid", None),
                tell(args),
                {key: tell(value) for key, value in options.items()},
            )
            for launched, args, options, _ in self.launches
        ]
