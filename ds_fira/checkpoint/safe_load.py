"""Read files of `torch.save` without running anything that stands in them.

A pickle names classes and functions, and unpickling it calls them: whoever wrote the file decides which. torch's
`weights_only` unpickler calls only those of its own list, which rebuild tensors, and those that it is given by name.
DeepSpeed's optimizer files need three names more. Each gets a stand-in from here, so that not even DeepSpeed's classes
are called with what a file says: a `StandIn` takes attributes that are plain values, and nothing else.

What this relies on, of DeepSpeed 0.17 to 0.19: the loss scaler, `fragment_address` and `ZeroStageEnum` are the only
objects in its files, at every stage and dtype (`tests/distributed/test_safe_files.py` looks into real ones).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import ClassVar

import torch
from torch import Tensor
from torch.serialization import safe_globals

# What a stand-in may have as an attribute.
_PLAIN = (bool, int, float, str, torch.dtype, type(None))
_ZIP = b"PK\x03\x04"
# How torch's unpickler says that it runs nothing else: with the name of what it does not import, or without.
_UNSAFE = re.compile(r"GLOBAL (\S+)|Unsupported operand|TorchScript")


class UnsafeFileError(ValueError):
    """A file that cannot be read without importing what it names.

    Attributes:
        path: of the file.
        wanted: the class or function, with its module; None where the file does not say it in a way that is read here.
        found: the first half of the sentence, without the remedy.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: str | None, remedy: str) -> None:
        named = f"import {wanted}" if wanted else "run a pickle of a kind that torch's safe reader does not know"
        self.path, self.wanted = Path(path), wanted
        self.found = f"to read {path} would {named}, and so may run code that whoever wrote the file chose"
        super().__init__(f"{self.found}; {remedy}.")


class StandIn:
    """Stands for an object of a class that is not imported: its attributes, as far as they are plain."""

    origin: ClassVar[str]
    tensors: ClassVar[bool] = False

    def __setstate__(self, state: object) -> None:
        """Take the attributes that the file has.

        Raises:
            UnpicklingError: they are more than plain values.
        """
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise UnpicklingError(f"{self.origin} has a state that is no dict of attributes")
        for name, value in state.items():
            if not (isinstance(value, _PLAIN) or (self.tensors and _is_tensors(value))):
                raise UnpicklingError(f"{self.origin}.{name} is a {type(value).__name__}")
            self.__dict__[name] = value


def _is_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(item, Tensor) for item in value))


def stand_in(origin: str, tensors: bool = False) -> type[StandIn]:
    """A class that stands for another one in files.

    Args:
        origin: module and name of the other.
        tensors: whether its attributes may also be tensors and lists of them.
    """
    module, _, name = origin.rpartition(".")
    # torch finds it by these two.
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name, "origin": origin, "tensors": tensors})


def _stage(value: object) -> int:
    """A ZeRO stage, which DeepSpeed compares with numbers."""
    if type(value) is not int:
        raise UnpicklingError(f"a ZeRO stage is a {type(value).__name__}")
    return value


_stage.__module__, _stage.__qualname__ = "deepspeed.runtime.zero.config", "ZeroStageEnum"
_SCALERS = ("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")
DEEPSPEED: tuple[Callable[..., object], ...] = (
    _stage,
    stand_in("deepspeed.utils.tensor_fragment.fragment_address"),
    *map(stand_in, _SCALERS),
)
SETTING = "unpickle_checkpoints"
REMEDY = (
    f'set "{SETTING}": true in the params of the optimizer if you trust whoever wrote it, and keep client_state to '
    "tensors, numbers, strings, lists and dicts"
)


def read(
    path: str | os.PathLike[str],
    stand_ins: Sequence[Callable[..., object]] = DEEPSPEED,
    remedy: str = REMEDY,
    *,
    map_location: object = "cpu",
    mmap: bool = True,
) -> object:
    """What a file of `torch.save` holds, of any version of its format.

    Args:
        path: of the file.
        stand_ins: for the classes and functions that it may name beside tensors.
        remedy: the second half of the sentence where it names others.
        map_location: as in `torch.load`.
        mmap: whether its tensors are mapped, not read; those of the old format are always read.

    Raises:
        UnsafeFileError: it names others.
        ValueError: it cannot be read.
        OSError: likewise.
    """
    with open(path, "rb") as file:
        mmap = file.read(len(_ZIP)) == _ZIP and mmap
    with refused(path, stand_ins, remedy):
        return torch.load(os.fspath(path), map_location=map_location, mmap=mmap, weights_only=True)


@contextmanager
def refused(
    path: str | os.PathLike[str], stand_ins: Sequence[Callable[..., object]] = DEEPSPEED, remedy: str = REMEDY
) -> Iterator[None]:
    """Let torch's safe unpickler know the stand-ins, and say in one sentence what it does not read; as `read`."""
    try:
        with safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused here in one sentence
            yield
    except OSError:
        raise
    except Exception as error:
        unsafe = isinstance(error, UnpicklingError) and _UNSAFE.search(str(error))
        if not unsafe:
            raise _unreadable(path, error) from None
        wanted = unsafe[1] and (unsafe[1] if "." in unsafe[1] else f"builtins.{unsafe[1]}")
        raise UnsafeFileError(path, wanted, remedy) from None


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    # torch's texts go on with advice over many lines; the last says what is wrong.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = next((line for line in lines if "WeightsUnpickler error: " in line), lines[0])
    reason = reason.rpartition("WeightsUnpickler error: ")[2].split(". ")[0].rstrip(".")[:200]
    told = ": ".join(filter(None, (type(error).__name__, reason)))
    return ValueError(f"{path} cannot be read ({told}); load another checkpoint, or save it anew.")


def for_deepspeed(content: object) -> object:
    """What was read, with DeepSpeed's own loss scaler where its stand-in is, for DeepSpeed to go on with."""
    wrappers = [content.get(key) for key in ("optimizer_state_dict", "optimizer")] if isinstance(content, dict) else []
    for wrapper in wrappers:
        for key, value in wrapper.items() if isinstance(wrapper, Mapping) else ():
            if isinstance(value, StandIn) and value.origin in _SCALERS:
                module, _, name = value.origin.rpartition(".")
                kind = getattr(importlib.import_module(module), name)
                wrapper[key] = kind.__new__(kind)
                wrapper[key].__dict__.update(vars(value))
    return content


@contextmanager
def only_safe_loads(enabled: bool = True, opened: Callable[[str], object] = lambda path: None) -> Iterator[None]:
    """Replace `torch.load` for a while: in this thread it reads as `read` does, whatever its caller asks for.

    DeepSpeed calls it in several places (the checkpoint engine, `zero_to_fp32` for weights alone at stage 3), each time
    with `weights_only=False`.

    Args:
        enabled: False leaves everything as it is.
        opened: what a file holds that has been read already; None for one that is to be read now.
    """
    if not enabled:
        yield
        return
    original: Callable[..., object] = torch.load
    owner = threading.get_ident()

    def load(f: object, map_location: object = None, *args: object, **options: object) -> object:
        if threading.get_ident() != owner or options.get("weights_only"):
            return original(f, map_location, *args, **options)
        if not isinstance(f, str | os.PathLike):
            with safe_globals(list(DEEPSPEED)):
                return for_deepspeed(original(f, map_location, weights_only=True))
        content = opened(os.fspath(f))
        if content is None:
            content = read(f, map_location=map_location, mmap=bool(options.get("mmap")))
        return for_deepspeed(content)

    torch.load = load
    try:
        yield
    finally:
        torch.load = original
