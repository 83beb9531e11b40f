"""An estimate as an aligned table of GiB, and as plain numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from ds_fira.tools.estimate.cards import GIB, Available
from ds_fira.tools.estimate.compute import Estimate, MethodEstimate, fits
from ds_fira.tools.estimate.memory import Memory

ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "master_weights": "master weights",
    "optimizer_states": "optimizer states",
    "backward_buffers": "buffers, backward",
    "activations": "activations (estimate)",
    "step_copies": "gradient copies, step",
    "total": "total at once",
}
LABEL = 36
COLUMN = 11


def estimate_lines(found: Estimate, available: Available | None) -> list[str]:
    """The table and its notes."""
    methods = list(found.methods.values())
    lines = [*_header(found), "", _row("GiB per GPU, largest rank", found.methods)]
    lines += _block([method.largest.device for method in methods])
    if any(method.largest.host.total for method in methods):
        lines += ["", _row("GiB on the host for each GPU", found.methods)]
        lines += _block([method.largest.host for method in methods])
    if available is not None:
        fitting = ["yes" if fits(method, available) else "no" for method in methods]
        lines += ["", _row(f"fits {available.device / GIB:g} GiB", fitting)]
        lines.append(_row("largest micro-batch", [_batch(method, available) for method in methods]))
    presets = [_preset_line(name, values) for name, values in found.presets.items()]
    return [*lines, "", *(f"- {note}" for note in (*presets, *found.notes))]


def estimate_json(found: Estimate, available: Available | None) -> dict[str, object]:
    """Everything in bytes, by method and rank."""
    methods = {}
    for name, method in found.methods.items():
        methods[name] = {
            "by_rank": [
                {place: {**asdict(held), "total": held.total} for place, held in vars(memory).items()}
                for memory in method.by_rank
            ],
            "largest_device_total": method.largest.device.total,
            "fits": None if available is None else fits(method, available),
            "largest_batch": None if available is None else method.largest_batch(available),
        }
    return {
        "model": found.model,
        "parameters": found.parameters,
        "projected_matrices": found.projected_matrices,
        "cut_matrices": found.cut_matrices,
        "state_saving": found.saving,
        "setup": asdict(found.setup),
        "params": found.params,
        "device_bytes": None if available is None or math.isinf(available.device) else int(available.device),
        "methods": methods,
        "presets": found.presets,
        "notes": list(found.notes),
    }


def _header(found: Estimate) -> list[str]:
    setup, params = found.setup, found.params
    masters = setup.master_weights if setup.has_masters else "none"
    checkpointing = ", activation checkpointing" if setup.activation_checkpointing else ""
    offload = ", optimizer offload" if setup.offload else ""
    engine = "steps in the backward pass" if setup.step_in_backward else f"ZeRO stage {setup.zero_stage}"
    return [
        f"{found.model}: {found.parameters / 1e6:.1f}M weights, {found.projected_matrices} projected matrices at rank "
        f"{params['rank']}, {found.cut_matrices} of them cut by partition boundaries",
        f"{engine} on {setup.gpus} GPU{'s' if setup.gpus > 1 else ''}, {setup.dtype}, master "
        f"weights {masters}, Fira's states {params.get('state_dtype', 'float32')}{offload}",
        f"micro-batch of {setup.batch_size} x {setup.seq_length} tokens{checkpointing}",
        f"Fira's states by the paper's formula: {found.saving:.1%} less than AdamW's",
    ]


def _preset_line(name: str, values: Mapping[str, object]) -> str:
    """What a preset gives, and by how much an element of a normalized residual moves W in a step."""
    size = {key: values[key] for key in ("width", "depth", "rank")}
    given = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if key not in size
    )
    return (
        f"preset {name}: {given} (width {size['width']}, depth {size['depth']}, rank {size['rank']}): outside "
        f"the subspace an element steps by {values['lr'] * values['alpha'] * values['residual_scale']:.3g}"
    )


def _block(memories: list[Memory]) -> list[str]:
    lines = []
    for key, label in ROWS.items():
        values = [getattr(memory, key) for memory in memories]
        if key == "total" or any(value is None or value for value in values):
            lines.append(_row(label, ["-" if value is None else f"{value / GIB:.3f}" for value in values]))
    return lines


def _batch(method: MethodEstimate, available: Available) -> str:
    batch = method.largest_batch(available)
    return "-" if batch is None else str(batch) if batch else "none"


def _row(label: str, values: Iterable[str]) -> str:
    return f"{label:{LABEL}}" + "".join(f"{value:>{COLUMN}}" for value in values)
