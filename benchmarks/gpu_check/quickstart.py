"""Stage 8: the quickstart for 100 steps, beside DeepSpeed's AdamW on the same text: tokens per second and loss."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.record import REPOSITORY, Check
from benchmarks.speed.training import VARIANTS, train

STEPS, REHEARSED_STEPS = 100, 4
NEEDS = 14.0
# A rehearsal's text.
TEXTS = "docs/*.md"


def measure(check: Check) -> None:
    """FiraAdam, then AdamW; the text is prepared once, in the first."""
    steps = REHEARSED_STEPS if check.rehearsal else STEPS
    arguments = ["--steps", str(steps), "--cache-dir", str(check.work / "cache")]
    if check.rehearsal:
        text = check.work / "text.txt"
        text.write_text("\n\n".join(page.read_text() for page in sorted(REPOSITORY.glob(TEXTS))))
        arguments += ["--data", str(text), "--vocab-size", "512", "--seq-length", "32", "--hidden-size", "32"]
        arguments += ["--layers", "1", "--heads", "2", "--batch-size", "2"]
    found: dict[str, float] = {}
    for name in ("FiraAdam", "AdamW"):
        if check.enough("tokens per second", 1.0 if check.rehearsal else NEEDS, optimizer=name):
            with check.attempt("tokens per second", optimizer=name):
                rank = ["--rank", "8"] if check.rehearsal and name == "FiraAdam" else []
                found[name] = _train(check, name, [*arguments, *rank], steps)
    if len(found) == 2:
        check.record("ratio to AdamW", found["FiraAdam"] / found["AdamW"], "ratio", steps=steps)


def _train(check: Check, name: str, arguments: list[str], steps: int) -> float:
    folder = check.work / name
    folder.mkdir()
    summary: dict[str, Any] = train(VARIANTS[name], arguments, folder)
    facts = {"optimizer": name, "steps": steps}
    check.record("tokens per second", summary["tokens_per_second"], "tokens/s", **facts)
    check.record("validation loss", summary["val_loss"], "nats per token", **facts)
    states = sum(summary.get("optimizer_state_bytes", []))
    if states:
        check.record("optimizer states", states / 1e6, "MB", **facts)
    return summary["tokens_per_second"]
