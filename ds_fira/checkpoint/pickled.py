"""Pickle what `torch.save` would, with its storages apart: the bytes of the structure, and what is to be copied.

A pickle of a training's state takes milliseconds, since it holds names, shapes and numbers. The storages are what
takes time and memory: they are copied or written later, by range, and by other processes where these hold the same.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.serialization import location_tag

_PROTOCOL = 2  # torch.save's
_STORAGES = frozenset({torch.storage.TypedStorage, torch.UntypedStorage})
_START, _SET, _STOP = b"\x80\x02", b"s", b"."  # of a pickle: the protocol; an item of the dict below it; its end


class _Pickler(pickle.Pickler):
    """Puts a number in the place of every storage."""

    def __init__(self, buffer: io.BytesIO, first: int) -> None:
        super().__init__(buffer, protocol=_PROTOCOL)
        self.storages: dict[str, torch.UntypedStorage] = {}
        self._first = first
        self._keys: dict[int, str] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if type(value) not in _STORAGES:  # first, since this is asked of every object that is pickled
            return None
        if isinstance(value, torch.storage.TypedStorage):
            storage, dtype, length = value._untyped_storage, value.dtype, value._size()
            kind = getattr(torch, value._pickle_storage_type())
        else:
            storage, dtype, length, kind = value, torch.uint8, value.nbytes(), torch.UntypedStorage
        place = storage.data_ptr()
        if place != 0 and self._dtypes.setdefault(place, dtype) != dtype:
            raise RuntimeError(
                f"tensors of {dtype} and {self._dtypes[place]} lie in the same memory, which a file of torch.save "
                "cannot hold"
            )
        key = self._keys.setdefault(storage._cdata, str(self._first + len(self._keys)))
        self.storages[key] = storage
        return "storage", kind, key, location_tag(storage), length


def pickled(value: object, first: int = 0) -> tuple[bytes, list[torch.UntypedStorage]]:
    """The pickle of a value as it stands in a file of `torch.save`, and the storages that it names, in order.

    Args:
        value: of anything that can be pickled.
        first: the number of the first storage.

    Raises:
        Exception: whatever pickling raises of a value that cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, first)
    pickler.dump(value)
    return buffer.getvalue(), list(pickler.storages.values())


def with_item(structure: bytes, key: str, value: object, first: int) -> tuple[bytes, list[torch.UntypedStorage]]:
    """The pickle of a dict with one item more, and the storages of that.

    Args:
        structure: the pickle of the dict, of this module.
        key: of the item, not in the dict.
        value: of the item.
        first: how many storages the dict has.
    """
    # A pickle is a program that leaves its value on a stack: this one goes on where the first would have stopped.
    name, (item, storages) = pickled(key)[0], pickled(value, first)
    parts = (structure, name.removeprefix(_START), item.removeprefix(_START))
    return b"".join(part.removesuffix(_STOP) for part in parts) + _SET + _STOP, storages


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples, in the order in which a pickle has them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a 1-D uint8 tensor, on its device, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
