"""A diagnosis as text for people, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from ds_fira.tools.doctor.examine import Diagnosis, Group, Split
from ds_fira.tools.estimate.cards import GIB
from ds_fira.tools.estimate.memory import Memory
from ds_fira.tools.estimate.table import ROWS

LABEL = 10
MOST_SPLIT, MOST_RANKS = 8, 8  # that the text lists; JSON has all


def diagnosis_lines(found: Diagnosis) -> list[str]:
    """The whole diagnosis, the verdict last."""
    around = found.around
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in around.versions.items())
    built = ", ".join(around.backends)
    lines = [
        *_rows("versions", [versions if around.tested else f"{versions}: this DeepSpeed is not tested"]),
        *_rows("devices", around.devices),
        *_rows("backend", [f"{around.backend} (torch has {built})"]),
    ]
    if found.kernels is not None:
        lines += _rows("kernels", [f"{'on' if found.kernels.on else 'off'}: {found.kernels.reason}"])
    lines += _rows("config", [found.config, *_training(found)])
    lines += _rows("model", [f"{found.model}, {found.parameters / 1e6:.1f}M weights, on {found.gpus} ranks"])
    lines += _rows("groups", [f"{number}: {_group(group)}" for number, group in enumerate(found.groups)])
    lines += _rows("split", _splits(found.split) if found.groups else [])
    lines += _rows("states", _states(found) if found.state_bytes else [])
    lines += _rows("memory", _memory(found) if found.memory is not None else [])
    lines += _rows("ignored", [_ignored(key, near) for key, near in found.ignored.items()])
    lines += _rows("warnings", found.warnings)
    lines += _rows("notes", found.notes)
    return lines + _rows("refused" if found.refusals else "verdict", found.refusals or ["would train"])


def diagnosis_json(found: Diagnosis) -> dict[str, object]:
    """The same for a machine."""
    kept = ("config", "model", "gpus", "refusals", "warnings", "ignored", "notes", "training", "parameters")
    kept += ("state_bytes", "adamw_bytes", "formula_bytes")
    memory = None if found.memory is None else [asdict(rank) for rank in found.memory.by_rank]
    return {
        "trains": not found.refusals,
        **{name: getattr(found, name) for name in kept},
        "around": asdict(found.around),
        "kernels": None if found.kernels is None else asdict(found.kernels),
        "groups": [
            {
                **asdict(group),
                "shapes": [{"shape": shape, "count": count} for shape, count in group.shapes.items()],
                "matrices": [
                    {"shape": shape, "count": count, "side": side, "rank": rank}
                    for shape, (count, side, rank) in group.matrices.items()
                ],
            }
            for group in found.groups
        ],
        "split": [asdict(matrix) for matrix in found.split],
        "memory": memory,
    }


def _rows(label: str, texts: Sequence[str]) -> list[str]:
    """Lines under one label; none where there is nothing."""
    return [f"{label if number == 0 else '':{LABEL}}{text}" for number, text in enumerate(texts)]


def _training(found: Diagnosis) -> Iterator[str]:
    said = found.training
    if said:
        masters = f"{said['dtype']} with {said['master_weights']} master weights"
        yield f"{said['optimizer']} at ZeRO stage {said['zero_stage']}, {masters}"
        yield (
            f"{said['batch']} sequences in a step: {said['micro_batch']} in a micro-batch x {said['accumulation']} "
            "accumulated x ranks"
        )


def _group(group: Group) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in group.settings.items() if value is not None)
    if not group.projected:
        shapes = ", ".join(f"{count} of {_shape(shape)}" for shape, count in group.shapes.items())
        return f"not projected: {shapes}; {settings}"
    shapes = ", ".join(
        f"{count} of {_shape(shape)} ({side}, rank {rank})" for shape, (count, side, rank) in group.matrices.items()
    )
    return f"projected: {shapes}; {settings}"


def _splits(split: Sequence[Split]) -> list[str]:
    if not split:
        return ["no matrix is split by a partition boundary"]
    lines = [_split(matrix) for matrix in split[:MOST_SPLIT]]
    more = len(split) - MOST_SPLIT
    return [*lines, f"and {more} more"] if more > 0 else lines


def _split(matrix: Split) -> str:
    ranks = f"ranks {matrix.ranks[0]} to {matrix.ranks[-1]}"
    basis = "and draws the basis" if matrix.draws_basis else f"rank {matrix.owner} computes the basis"
    how = {
        "gathered": f"gathered and stepped whole by rank {matrix.owner}",
        "low_rank": f"each steps its rows, {basis}",
    }
    return f"{matrix.name} {_shape(matrix.shape)} on {ranks}: {how[matrix.way]}"


def _states(found: Diagnosis) -> list[str]:
    held = found.state_bytes
    by_rank = ", ".join(_size(size) for size in held[:MOST_RANKS])
    more = f" and {len(held) - MOST_RANKS} more ranks" if len(held) > MOST_RANKS else ""
    together = sum(held) if found.training["zero_stage"] else held[0]
    share = f"{together / found.adamw_bytes:.1%} of AdamW's {_size(found.adamw_bytes)} in float32"
    return [f"on each rank {by_rank}{more}", f"together {_size(together)}, {share}"]


def _memory(found: Diagnosis) -> Iterator[str]:
    largest = found.memory.largest
    yield f"on the fullest rank, GPU: {_categories(largest.device)}"
    if largest.host.total:
        yield f"host: {_categories(largest.host)}"


def _categories(memory: Memory) -> str:
    held = {label: getattr(memory, key) for key, label in ROWS.items()}
    return ", ".join(f"{label} {_size(size)}" for label, size in held.items() if size)


def _ignored(key: str, near: str | None) -> str:
    return f"{key}: DeepSpeed reads no key of this name" + (f"; did you mean {near}?" if near else "; remove it.")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _size(size: int) -> str:
    return f"{size / GIB:.3f} GiB" if size >= GIB / 100 else f"{size / 2**20:.3f} MiB"
