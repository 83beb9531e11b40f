"""docs/compatibility.md, from what `tests.compatibility.matrix` and `tests.compatibility.versions` found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Compatibility with DeepSpeed

Written by `python -m tests.compatibility.matrix` from a run, not by hand; `--page-only` writes it again from
`benchmarks/results/compatibility.json`. Measured on a CPU: {device}, torch {torch}, DeepSpeed {deepspeed}, {ranks} real
processes over gloo.

## Stages, dtypes and ZeRO's options

Every combination trains a net with whole, cut, projected and AdamW parameters for 5 steps, with a refresh in every
second. *Weights*: largest difference of the master weights from those of one process that is fed the same gradients,
relative to their change. *Gradients*: largest difference of what FiraAdam was given from the gradients of one process
in float32 with the batches of all ranks, at the same weights; what bf16 and fp16 add there is the rounding of the
backward pass. {trained} combinations trained, and gave right results; {wrong} gave wrong ones; DeepSpeed refuses
{refused}, with torch's AdamW too.

The options are `round_robin_gradients`, `reduce_scatter`, `overlap_comm`, `contiguous_gradients` (each on and off;
stage 0 reads none of them, stage 3 no `round_robin_gradients`), `gradient_clipping` 0 and 1,
`gradient_accumulation_steps` 1 and 2: *all* where every combination trained.

"""
OPTION_NAMES = {
    "gradient_clipping": "clipping",
    "gradient_accumulation_steps": "accumulation",
}
REFUSED = """
DeepSpeed refuses these, with torch's AdamW too:

"""
NOTES = """
## What DeepSpeed does that a config should know of

- **`gradient_clipping` is {clipping} where it is not set.** Set it; 0 switches clipping off.
- Stage 0 reads none of ZeRO's options, nor `offload_optimizer`.
- In fp16 DeepSpeed divides gradients by the loss scale it has just raised, so that they come out half as large in that
  step ([#8588](https://github.com/deepspeedai/DeepSpeed/pull/8588)), and at stage 0 it never multiplies the loss
  ([#8393](https://github.com/deepspeedai/DeepSpeed/pull/8393)). Both are mended for engines that train with FiraAdam
  (`ds_fira/engine/deepspeed/loss_scale.py`); the table is with the mend.
- `torch_autocast` in float16 at stages 1, 2 and 3 may change the loss scale between the param groups of one step, clips
  by the norm of scaled gradients, and keeps a scale that is too large for ever; a checkpoint does not have the scale.
  All of it is mended likewise; the table is with the mend.
- `deepspeed.utils.safe_get_full_fp32_param` gives other parameters' values under `round_robin_gradients`.
- Once an engine with `torch_autocast` was built, DeepSpeed takes every later engine of the process for one.
"""


VERSIONS = """
## Versions of DeepSpeed

`bash launch/test_versions.sh` runs combinations in which every two settings of the table meet. FiraAdam warns once, on
rank 0, under a version that is neither listed nor an older one of a listed minor release. Before 0.19 stage 3 is
refused, and so is what gave wrong gradients in some combinations: `contiguous_gradients` or `reduce_scatter` off, a
`grad_accum_dtype`, bf16 at stage 0; these are not among the combinations. 0.17 does not know bf16 master weights, and
refuses them; 0.18 refuses those of 16 bits under offload, but for bf16 with `bf16_optimizer_states`. 0.18.8 and 0.18.9
fail in a step of stage 2 under torch 2.13, with torch's AdamW too.

"""


def write_page(path: Path, results: dict[str, Any]) -> None:
    """Write the page."""
    path.write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows = results["rows"]
    versions = results["versions"]
    text = HEAD.format(
        device=results["device"],
        torch=versions["torch"],
        deepspeed=versions["deepspeed"],
        ranks=2,
        trained=sum(len(row["trained"]) for row in rows),
        wrong=sum(_count(row["wrong"]) for row in rows) or "none",
        refused=sum(_count(row["refused"]) for row in rows),
    )
    trained = [row for row in rows if row["trained"] or row["wrong"]]
    head = ("stage", "dtype", "offload", "trained", "options", "weights", "gradients")
    text += _table(head, [_trained_row(row) for row in trained])
    text += REFUSED + _table(
        ("stage", "dtype", "offload", "what it says"),
        [
            (str(row["stage"]), row["dtype"], row["offload"], message.partition(": ")[2])
            for row in rows
            for message in row["refused"]
        ],
    )
    text += _features(results.get("features", []), results.get("features_device", results["device"]))
    text += NOTES.format(clipping=results["gradient_clipping_default"])
    return text + _versions(results.get("tested_versions", []))


def _count(by_message: dict[str, list[Any]]) -> int:
    return sum(len(cases) for cases in by_message.values())


def _trained_row(row: dict[str, Any]) -> tuple[str, ...]:
    trained = row["trained"]
    total = len(trained) + _count(row["refused"]) + _count(row["wrong"])
    return (
        str(row["stage"]),
        row["dtype"],
        row["offload"] if row["stage"] else "-",
        f"{len(trained)} of {total}",
        _options(row["options"], [values for values, *_ in trained]),
        f"{max((weights for _, weights, _ in trained), default=0.0):.1e}",
        f"{max((gradients for *_, gradients in trained), default=0.0):.1e}",
    )


def _options(names: Sequence[str], values: Sequence[Sequence[Any]]) -> str:
    """The values of every option that trained; those of one value only are said so."""
    parts = []
    if len(values) == math.prod(len({value[i] for value in values}) for i in range(len(names))) == 2 ** len(names):
        return "all"
    for i, name in enumerate(names):
        found = sorted({value[i] for value in values})
        if isinstance(found[0], bool):
            parts.append(f"{name} {'both' if len(found) == 2 else 'on' if found[0] else 'off'}")
        else:
            parts.append(f"{OPTION_NAMES.get(name, name)} {' and '.join(f'{value:g}' for value in found)}")
    return ", ".join(parts)


def _features(features: Iterable[dict[str, Any]], device: str) -> str:
    """The other features, one row for all stages where they agree."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for feature in features:
        key = (feature["name"], feature["result"], feature.get("message", "").replace(f"stage {feature['stage']}", ""))
        rows.setdefault(key, []).append(feature)
    body = []
    for (name, result, _), members in rows.items():
        said = members[0].get("message", "").partition(": ")[2].replace("FiraAdam: ", "")
        if members[0].get("adamw"):
            said = f"AdamW: {members[0]['adamw']}; FiraAdam: {said}"
        if result == "supported":
            said = f"weights {_largest(members, 'weights'):.1e}, gradients {_largest(members, 'gradients'):.1e}"
        stages = ", ".join(str(member["stage"]) for member in members)
        body.append((name, stages, result, said.replace("\n", " ").replace("|", "\\|")))
    head = ("feature", "stages tried", "result", "difference from one process, or what is said")
    return (
        f"\n## Other features\n\nTried one by one, as above, on a CPU: {device}; what is refused stops before "
        "training, a call where it is made, on every rank. *AdamW fails too*: torch's AdamW does not train and save "
        "with it here either; the row says with what it fails. *No effect*: AdamW trains as if it were not set, and "
        "FiraAdam stops.\n\n" + _table(head, body)
    )


def _largest(members: Iterable[dict[str, Any]], key: str) -> float:
    return max(member[key] for member in members)


def _versions(versions: Iterable[dict[str, Any]]) -> str:
    body = [tuple(str(entry[key]) for key in ("deepspeed", "torch", "right", "refused", "wrong")) for entry in versions]
    head = ("DeepSpeed", "torch", "right", "refused", "wrong")
    return VERSIONS + _table(head, body)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
