"""Wrap calls of DeepSpeed's methods: their arguments by name, and methods that are others for a while."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator

_signature = functools.lru_cache(inspect.signature)


def bound(method: Callable[..., object], *args: object, **kwargs: object) -> inspect.BoundArguments:
    """The arguments of a call by name, with the defaults of those that are not given."""
    call = _signature(method).bind(*args, **kwargs)
    call.apply_defaults()
    return call


@contextlib.contextmanager
def replaced(owner: object, **methods: Callable[..., object]) -> Iterator[None]:
    """Give one object other methods, or values, for a while; afterwards it has what it had.

    Args:
        owner: the object.
        **methods: by the names that they replace, called without the object; of a value the value.
    """
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)
        vars(owner).update(before)
