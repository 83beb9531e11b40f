"""Tensor memory as torch's allocators see it: the peak of a call, and what every block at the peak was for."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

# How torch numbers devices in its traces.
CPU, CUDA = 0, 1
_MARK = "allocation mark "


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of tensors allocated inside a call, minus those allocated when it began.

    On the CPU the profiler's record of every allocation is summed up; libraries' own workspaces (packed panels of a
    matrix product) are not in it. On CUDA the allocator counts.

    Args:
        call: made once.
        device: where its tensors are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in _events(profiler):
        held += event["args"].get("Bytes", 0)
        peak = max(peak, held)
    return peak


def _events(profiler: profile) -> list[dict[str, Any]]:
    """Allocations, frees and marks in the order in which they happened."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    wanted = (event for event in events if event.get("name", "").startswith(("[memory]", _MARK)) and "args" in event)
    return sorted(wanted, key=lambda event: event["ts"])


@dataclass(slots=True)
class Block:
    """One block of an allocator.

    Attributes:
        bytes: its size.
        device: `CPU` or `CUDA`.
        born: number of the event that allocated it; 0 for what was there before.
        died: number of the event that freed it; None while it lives.
        label: of the first mark that named it.
        phase: name of the last mark of a phase before it was born.
    """

    bytes: int
    device: int
    born: int
    died: int | None = None
    label: str | None = None
    phase: str = ""


@dataclass(slots=True)
class Peak:
    """The most that some blocks held at once: bytes, by category, and the phase in which it was reached."""

    bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    phase: str = ""


class Recording:
    """Every allocation and free between `begin` and `end`, with the blocks that were there before.

    Not seen: memory that no allocator of torch gives out (workspaces inside libraries, gloo's and NCCL's buffers),
    page-locked memory taken between `begin` and `end`, and on the CPU the free of a block that was there before, which
    counts on.

    Attributes:
        blocks: all of them.
        phases: number of the event from which on a phase ran, and its name.
        unexplained_bytes: what the replay holds in the end beyond the tensors that Python holds then, on the CPU: 0
            unless something of the above happened, or a thread freed a block that the profiler does not watch. Such a
            block counts as freed at the end of the phase that made it.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.phases: list[tuple[int, str]] = [(0, "")]
        self.unexplained_bytes = 0
        self._profiler: profile | None = None
        self._marks: list[tuple[str, str, set[tuple[int, int]]]] = []
        self._before: dict[tuple[int, int], int] = {}

    def begin(self) -> None:
        """What is counted starts here."""
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()
        self._before = live_storages()
        self._note("begin", "", ())

    def phase(self, name: str) -> None:
        """What follows belongs to a phase."""
        self._note("phase", name, ())

    def label(self, name: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what tensors are for; the first label of a block stays. Nothing outside of a recording."""
        if self._before:
            self._note("label", name, tensors)

    def end(self) -> None:
        """Stop, and work out the life of every block."""
        self._note("end", "", ())
        after = live_storages()
        self._profiler.stop()
        live = self._replay(_events(self._profiler))
        self._profiler, self._before = None, {}
        # On CUDA the allocator rounds sizes up, and the walk does not.
        held = sum(block.bytes for (device, _), block in live.items() if device == CPU)
        self.unexplained_bytes = held - sum(size for (device, _), size in after.items() if device == CPU)
        for (device, address), block in live.items():
            if device == CPU and block.born > 0 and (device, address) not in after:
                # Freed by a thread that the profiler does not watch, as gloo's do with what they have sent. When is
                # not known; what is sent is temporary, so not after the phase it was made in.
                block.died = next((start for start, _ in self.phases if start > block.born), None)

    def peak(self, category: Callable[[Block], str | None]) -> Peak:
        """The peak of the blocks that have a category; the others do not count."""
        chosen = [block for block in self.blocks if category(block) is not None]
        changes = [(block.born, block.bytes) for block in chosen]
        changes += [(block.died, -block.bytes) for block in chosen if block.died is not None]
        held, most, at = 0, 0, 0
        for number, change in sorted(changes):
            held += change
            if held > most and number > 0:
                most, at = held, number
        found = Peak(phase=[name for start, name in self.phases if start <= at][-1])
        for block in chosen:
            if block.born <= at and (block.died is None or block.died > at):
                found.bytes += block.bytes
                name = category(block)
                found.by_category[name] = found.by_category.get(name, 0) + block.bytes
        return found

    def _note(self, kind: str, name: str, tensors: Iterable[Tensor | None]) -> None:
        self._marks.append((kind, name, {key for key, _ in storages(tensors)}))
        with record_function(f"{_MARK}{len(self._marks) - 1}"):
            pass

    def _replay(self, events: list[dict[str, Any]]) -> dict[tuple[int, int], Block]:
        """Make the blocks from the events; returns those that nothing has freed."""
        live: dict[tuple[int, int], Block] = {}
        counting, phase = False, ""
        for number, event in enumerate(events, 1):
            if event["name"].startswith(_MARK):
                kind, name, keys = self._marks[int(event["name"].removeprefix(_MARK))]
                if kind == "begin":
                    counting = True
                    live = {key: Block(size, key[0], 0) for key, size in self._before.items()}
                    self.blocks = list(live.values())
                elif kind == "phase" and counting:
                    phase = name
                    self.phases.append((number, name))
                elif kind == "end":
                    return live
                for key in keys:
                    if key in live and live[key].label is None:
                        live[key].label = name
            elif counting:
                key = (event["args"]["Device Type"], event["args"]["Addr"])
                # A second birth at one address means that the free of the first was not reported.
                old = live.pop(key, None)
                if old is not None:
                    old.died = number
                if event["args"]["Bytes"] > 0:
                    live[key] = Block(event["args"]["Bytes"], key[0], number, phase=phase)
                    self.blocks.append(live[key])
        return live


def live_storages() -> dict[tuple[int, int], int]:
    """Bytes of the storage of every tensor that Python holds, by device and address."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return dict(storages(tensors))


def storages(tensors: Iterable[Tensor | None]) -> Iterator[tuple[tuple[int, int], int]]:
    """Device, address and bytes of the storage of every tensor; the same storage as often as it is given."""
    for tensor in tensors:
        if tensor is None or tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.nbytes():
            yield (CUDA if tensor.device.type == "cuda" else CPU, storage.data_ptr()), storage.nbytes()
