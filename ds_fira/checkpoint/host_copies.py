"""Copies of a training's memory on the host, made in the one moment for which the training waits for a save."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_fira.checkpoint.outgoing import Extent
from ds_fira.checkpoint.zip_layout import ALIGNMENT


class HostCopies:
    """One piece of host memory for the copies of a save, kept for the next one; pinned where there is a GPU.

    The first save finds it untouched, so that the system has to provide every page of it, which takes longer than to
    copy. Later ones of the same size copy and do nothing else.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the memory that is kept."""
        return self._memory.nbytes

    def take(self, extents: Sequence[Extent]) -> None:
        """Copy what extents hold, and let them hold the copies; those of an earlier call are overwritten."""
        places, end = [], 0
        for extent in extents:
            places.append(end)
            end += -(-len(extent.data) // ALIGNMENT) * ALIGNMENT
        on_device = {extent.data.device for extent in extents if extent.data.device.type != "cpu"}
        if end > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the larger one is made
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=bool(on_device))
        for extent, place in zip(extents, places, strict=True):
            copy = self._memory[place : place + len(extent.data)]
            extent.data = copy.copy_(extent.data, non_blocking=True)
        for device in on_device:
            torch.accelerator.synchronize(device)
