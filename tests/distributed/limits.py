"""Limits of the package set so low that a small training meets them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def limited(limits: Mapping[str, int]) -> Iterator[None]:
    """Give module attributes other values for a while.

    Args:
        limits: by their full names.
    """
    places = {path: path.rpartition(".")[::2] for path in limits}
    modules = {path: (importlib.import_module(module), name) for path, (module, name) in places.items()}
    before = {path: getattr(*place) for path, place in modules.items()}
    for path, value in limits.items():
        setattr(*modules[path], value)
    try:
        yield
    finally:
        for path, value in before.items():
            setattr(*modules[path], value)
