"""summary.txt: for every figure that README and docs call unknown, the figure, or the reason why it is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Something that nobody knows before the check.

    Attributes:
        text: as README or docs/performance.md have it.
        stage: that answers it; None where no stage can.
        what: measurements that answer it.
        keys: facts to show beside the value.
        worst_by: facts of which each has its own worst value, where that alone is shown; a truth is counted.
        reason: why there is no figure, where no stage can answer.
    """

    text: str
    stage: int | None
    what: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    reason: str = ""
    worst_by: tuple[str, ...] = ()


QUESTIONS = (
    Question(
        "What the device can do at most",
        0,
        ("copy", "product", "launch of an operation", "launch of a kernel", "cholesky", "eigh", "svd"),
        ("precision", "side"),
    ),
    Question("Do the tests of the kernels pass on a GPU", 1, ("tests passed", "tests failed", "tests skipped")),
    Question(
        "Rounding of the products at full size, against float64",
        2,
        ("error of R", "bias of |R|^2", "error of the update", "error of |S|"),
        ("precision", "bound", "shape", "rank", "share"),
        worst_by=("precision",),
    ),
    Question("Does a step give the same bits twice", 2, ("same bits twice",), worst_by=("of",)),
    Question(
        "Speed of the kernels",
        3,
        ("time",),
        ("kernel", "shape", "rank", "precision", "tile", "of ceiling", "of cuBLAS"),
    ),
    Question("The step beside fused AdamW", 4, ("step / fused AdamW",), ("rank", "precision", "states", "kernels")),
    Question("Its time on the device", 4, ("step", "fused AdamW"), ("rank", "precision", "states", "kernels")),
    Question("Its time on the host", 4, ("host time of a step",), ("rank", "precision", "states", "kernels")),
    Question("Its launches", 4, ("launches of a step",), ("rank", "precision", "states", "kernels")),
    Question(
        "Its time in a CUDA graph", 4, ("replay of a step", "host time of a replay", "the same bits"), ("matrices",)
    ),
    Question("Its memory beyond weights, gradients and states", 4, ("peak beyond",), ("rank", "precision", "states")),
    Question("The step beside fira, GaLore and APOLLO", 5, ("ds_fira / peer",), ("peer", "shape", "rank")),
    Question("Time of a refresh", 6, ("refresh",), ("method", "start", "shape", "rank")),
    Question("Energy that a refresh captures", 6, ("energy of the optimum",), ("method", "start", "shape", "rank")),
    Question("Does an engine train on a GPU", 7, ("trains", "overflow is skipped", "weights stay finite"), ("config",)),
    Question("Is a resumed run equal to the bit on a GPU", 7, ("resumed equal to the bit",), ("config",)),
    Question("The quickstart on a GPU", 8, ("validation loss", "tokens per second", "ratio to AdamW"), ("optimizer",)),
    Question("Where the time of a step goes", 9, ("kernel in two steps",), ("kernel", "calls")),
    Question(
        "A LLaMA 7B on one GPU",
        10,
        ("training step", "optimizer's part of it", "peak memory", "estimated peak"),
        ("config",),
    ),
    Question("NCCL between ranks, and the step beside AdamW on several GPUs", None, reason="the check takes one GPU"),
    Question("The preset and longer trainings on a GPU", None, reason="they take hours, not minutes"),
)


def read_lines(out: Path) -> list[Line]:
    """The measurements of a folder."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(line: Line, keys: Iterable[str]) -> str:
    """One measurement in a line."""
    value = line["value"]
    said = f"{line['what']}: " + ("no figure" if value is None else f"{value:.4g} {line['unit']}")
    said += "".join(f", {key} {_plain(line[key])}" for key in keys if line.get(key) is not None)
    if line.get("ok") is False:
        said += "  <-- NOT AS IT SHOULD BE"
    return said + (f" ({line['reason']})" if line.get("reason") else "")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def answer(question: Question, lines: list[Line]) -> list[str]:
    """What the measurements say to a question; the reason where they say nothing."""
    if question.stage is None:
        return [f"not measured: {question.reason}"]
    of_stage = [line for line in lines if line["stage"] == question.stage]
    told = [line for line in of_stage if line["what"] in question.what]
    found = worst(told, question) if question.worst_by else [shown(line, question.keys) for line in told]
    ends = [line for line in of_stage if line["what"] == "stage"]
    if not ends:
        return [*found, f"not measured{' further' if found else ''}: stage {question.stage} was not run"]
    if ends[-1]["ended"] != "done" and not (found and ends[-1]["ended"] == "failed"):
        found.append(f"not measured{' further' if found else ''}: stage {question.stage} was {_end(ends[-1])}")
    return found or [f"not measured: stage {question.stage} recorded nothing of it"]


def worst(lines: list[Line], question: Question) -> list[str]:
    """Of measurements of one kind the one that is farthest off; of truths how many are true."""
    kinds: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        kinds.setdefault((line["what"], *(line.get(key) for key in question.worst_by)), []).append(line)
    said = []
    for (what, *by), of_kind in kinds.items():
        values = [line for line in of_kind if line["value"] is not None]
        if values and values[0]["unit"] == "true or not":
            true = sum(line["value"] == 1.0 for line in values)
            said.append(f"{what}, {', '.join(map(str, by))}: {true} of {len(of_kind)}")
        elif values:
            farthest = max(values, key=lambda line: abs(line["value"]))
            said.append(f"worst of {len(of_kind)}: {shown(farthest, question.keys)}")
        else:
            said.append(shown(of_kind[0], question.keys))
    return said


def _end(line: Line) -> str:
    return f"{line['ended']}, {line['reason']}" if line.get("reason") else line["ended"]


def summarize(lines: list[Line]) -> str:
    """The text of summary.txt."""
    known = next((line for line in lines if "device" in line), {})
    versions = known.get("versions", {})
    said = [
        f"device    {known.get('device', 'unknown')}" + (f", CUDA {known['cuda']}" if "cuda" in known else ""),
        "versions  " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"code      commit {known.get('commit', 'unknown')}, sources {known.get('source', 'unknown')}",
    ]
    if known.get("rehearsal"):
        said.append("A REHEARSAL at small sizes on a CPU: no figure below says anything of a GPU.")
    said += ["", "STAGES"]
    said += [
        f"  {line['stage']:>2} {line['name']:12} {line['value']:7.1f} s  {_end(line)}"
        for line in lines
        if line["what"] == "stage"
    ]
    faults = [line for line in lines if line.get("ok") is False]
    said += ["", f"NOT AS IT SHOULD BE: {len(faults)}"]
    said += [f"  stage {line['stage']}, {shown(line, (key for key in line if key in _SETTINGS))}" for line in faults]
    for question in QUESTIONS:
        said += ["", question.text.upper(), *(f"  {text}" for text in answer(question, lines))]
    return "\n".join(said) + "\n"


# What may tell measurements of one name apart.
_SETTINGS = {key for question in QUESTIONS for key in question.keys}


def write_summary(out: Path) -> str:
    """Write summary.txt anew from results.jsonl; returns its text."""
    text = summarize(read_lines(out))
    (out / "summary.txt").write_text(text)
    return text
