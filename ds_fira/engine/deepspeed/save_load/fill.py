"""Give every rank what it needs of the files that all ranks have read together, before DeepSpeed asks for it.

The module's weights, which every rank holds at stages 0 to 2, go from the rank that has read them straight into the
parameters, a few matrices at a time. All else that a file holds is small, or each rank needs its own part of it.

What it relies on, of DeepSpeed 0.17 to 0.19: that a model file's `module` is what `load_module_state_dict` gives to the
module, and frozen weights stand in `frozen_param_fragments` once more.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.storage import TypedStorage, UntypedStorage

from ds_fira.checkpoint.byte_ranges import FileRange
from ds_fira.checkpoint.payload import PAYLOAD
from ds_fira.checkpoint.safe_load import StandIn
from ds_fira.checkpoint.shared_read import PIECE, SharedRead
from ds_fira.engine.deepspeed.save_load.files import MODEL_FILE, CheckpointFiles, load, normalized

FROZEN = "frozen_param_fragments"


def opened(reading: SharedRead | None) -> Callable[[str], object]:
    """What a function of `only_safe_loads` asks: what a file holds that is ready in memory, else None."""

    def find(path: str) -> object:
        name, folder = Path(path).name, os.path.dirname(os.path.abspath(path))
        if reading is None or name not in reading.ready or folder != os.path.abspath(reading.folder):
            return None
        return reading.images[name].structure()

    return find


class _Collector(pickle.Pickler):
    """Lists the tensors in a value, wherever they are, in place of writing them."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.found: list[object] = []

    def persistent_id(self, found: object) -> str | None:
        if isinstance(found, Tensor | UntypedStorage | TypedStorage):
            self.found.append(found)
        return "content" if isinstance(found, Tensor | UntypedStorage | TypedStorage | StandIn) else None


def _ranges(reading: SharedRead, name: str, value: object) -> list[FileRange]:
    """Where in a file the tensors in a value lie; the whole file where one of them is of another kind."""
    collector = _Collector()
    collector.dump(value)
    plain = all(isinstance(found, Tensor) and found.layout is torch.strided for found in collector.found)
    return reading.ranges_of(collector.found) if plain else [FileRange(name, 0, reading.files[name].size)]


def fill_own(
    reading: SharedRead, engine: DeepSpeedEngine, options: Mapping[str, object]
) -> dict[str, Callable[..., None]]:
    """Fill what the ranks that saved load again: the model's file; a file of a rank's own is there. A collective call.

    Returns:
        Methods that the engine has meanwhile.
    """
    methods: dict[str, Callable[..., None]] = {}
    for name, image in reading.images.items():
        if reading.holds(name):
            reading.ready |= {name} if image.legible else set()
        elif reading.files[name].rank is None and MODEL_FILE.fullmatch(name) and image.legible:
            methods |= _fill_model(reading, name, engine, options)
    return methods


def _fill_model(
    reading: SharedRead,
    name: str,
    engine: DeepSpeedEngine,
    options: Mapping[str, object],
    without: Collection[str] = (),
) -> dict[str, Callable[..., None]]:
    """Fill a model's file but for the module where it can be loaded by range; returns as `fill_own`."""
    content = load(reading.folder / name, reading=reading)
    rest = {key: value for key, value in content.items() if key not in ("module", *without)}
    kept = _ranges(reading, name, rest)
    reading.spread(kept)
    reading.ready.add(name)
    if not options.get("custom_load_fn") and _loads_by_name(engine.module, content):
        reading.kept[name] = kept
        return {"load_module_state_dict": partial(_load_by_range, reading, name, engine.module, kept)}
    reading.spread(_ranges(reading, name, content["module"]))
    return {}


def fill_elsewhere(
    reading: SharedRead, files: CheckpointFiles, engine: DeepSpeedEngine, options: Mapping[str, object], simple: bool
) -> dict[str, Callable[..., None]]:
    """Fill what other ranks load beside the optimizer's states: the run's state, and the module or its untrained part.

    Args:
        reading: of the files.
        files: by kind.
        engine: that loads.
        options: of its call.
        simple: whether the module's weights are loaded by name, and not from the master copies.

    Returns:
        As `fill_own`.
    """
    first = files.models[0].name
    if not reading.images[first].legible:
        return {}
    if simple:
        return _fill_model(reading, first, engine, options, without=("optimizer",))
    contents = [files.model(number) for number in range(len(files.models) if files.partitioned else 1)]
    rest = {key: value for key, value in contents[0].items() if key not in ("module", "optimizer", PAYLOAD)}
    wanted = untrained(engine)
    needed = [
        rest,
        {name: value for name, value in contents[0]["module"].items() if normalized({name: 0}).keys() & wanted},
    ]
    needed += [content.get(FROZEN) for content in contents] if files.partitioned else []
    kept = [_ranges(reading, first, value) for value in needed]
    reading.spread(found for ranges in kept for found in ranges)
    reading.kept[first] = kept[0]
    reading.ready.add(first)
    return {}


def release(reading: SharedRead | None) -> None:
    """Give back what only the load has needed of the model's file, on whose memory the client state lies."""
    for name, kept in ({} if reading is None else reading.kept).items():
        reading.forget_all_but(name, kept)


def release_payloads(reading: SharedRead | None) -> None:
    """Give back the states of stage 3, once loaded, in the file of the model's states: it has the client state too."""
    for name, image in ({} if reading is None else reading.images).items():
        if MODEL_FILE.fullmatch(name) and image.legible and reading.holds(name):
            content = load(reading.folder / name, reading=reading)
            if PAYLOAD in content:
                rest = {key: value for key, value in content.items() if key != PAYLOAD}
                reading.forget_all_but(name, _ranges(reading, name, rest))


def untrained(engine: DeepSpeedEngine) -> set[str]:
    """The names of buffers and of parameters that the optimizer does not step, without torch.compile's prefix."""
    trained = {name for group in engine.basic_optimizer.members for name, _ in group}
    named = normalized({**dict(engine.module.named_parameters()), **dict(engine.module.named_buffers())})
    return named.keys() - trained


def untrained_tensors(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The buffers, and the parameters that the optimizer does not step, that a module saves, by name."""
    wanted = untrained(engine)
    found = normalized(engine.module.state_dict())
    return {name: value.detach() for name, value in found.items() if name in wanted and isinstance(value, Tensor)}


def _loads_by_name(module: nn.Module, content: Mapping[str, object]) -> bool:
    """Whether a module takes its weights tensor by tensor, so that no hook and no method of its own sees them all."""
    saved, own = content["module"], _tensors(module)
    plain = all(
        type(part)._load_from_state_dict in (nn.Module._load_from_state_dict, _NORM)
        and type(part).load_state_dict is nn.Module.load_state_dict
        and type(part).set_extra_state is nn.Module.set_extra_state
        and not (part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks)
        for part in module.modules()
    )
    return (
        plain
        and not content.get(FROZEN)
        and isinstance(saved, Mapping)
        and saved.keys() == module.state_dict().keys()
        and saved.keys() <= own.keys()
        and all(isinstance(value, Tensor) and value.layout is torch.strided for value in saved.values())
        and all(value.shape == own[name].shape for name, value in saved.items())
    )


# Of batch norms, which knows files of old versions without a counter; those do not have the same names.
_NORM = nn.modules.batchnorm._NormBase._load_from_state_dict


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


@torch.no_grad()
def _load_by_range(
    reading: SharedRead,
    name: str,
    module: nn.Module,
    kept: Iterable[FileRange],
    checkpoint: Mapping[str, Mapping[str, Tensor]],
    **_: object,
) -> None:
    """In place of `load_module_state_dict`: some matrices after the other, each from the ranks that have read it.

    Args:
        reading: of the file.
        name: of the file.
        module: that takes the weights.
        kept: what of the file stays in memory.
        checkpoint: what it holds.
    """
    own, image = _tensors(module), reading.images[name]
    for batch in _in_turns(reading, checkpoint["module"]):
        ranges = [found for _, found in batch]
        reading.spread(ranges)
        for key, _ in batch:
            own[key].copy_(checkpoint["module"][key])
        start, stop = ranges[0].start, max(one.stop for one in ranges)
        if not any(start < other.stop and other.start < stop for other in kept):
            image.forget(range(start, stop))


def _in_turns(reading: SharedRead, saved: Mapping[str, Tensor]) -> Iterator[list[tuple[str, FileRange]]]:
    """Tensors in the order of the file, so many at a time as `PIECE` bytes hold, at least one."""
    turn: list[tuple[str, FileRange]] = []
    places = [(key, reading.ranges_of([value])) for key, value in saved.items()]
    for key, (found,) in sorted(((key, found) for key, found in places if found), key=lambda item: item[1]):
        if turn and found.stop - turn[0][1].start > PIECE and found.start >= max(one.stop for _, one in turn):
            yield turn
            turn = []
        turn.append((key, found))
    if turn:
        yield turn
