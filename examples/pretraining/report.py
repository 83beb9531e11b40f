"""What the pre-training example leaves behind: history, plot, checked checkpoint, sample, summary and table."""

import csv
import dataclasses
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_fira

matplotlib.use("Agg")  # before pyplot: a training machine has no screen
import matplotlib.pyplot as plt

PACKAGES = ("deepspeed", "torch", "transformers", "datasets", "tokenizers")
SAMPLE_TOKENS = 60


@dataclasses.dataclass(slots=True)
class History:
    """Losses in nats per token, averaged over all processes, by optimizer step."""

    train: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write one csv row per measurement."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "split", "loss"])
            rows = [(step, split, loss) for split in ("train", "validation") for step, loss in getattr(self, split)]
            writer.writerows(sorted(rows))


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite where a diverged loss would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def plot_losses(history: History, unigram_entropy: float, title: str, path: Path) -> None:
    """Draw training and validation loss, and the unigram entropy as the line to beat."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    axes.plot(*zip(*history.train, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="training")
    axes.plot(*zip(*history.validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.axhline(
        unigram_entropy, color="tab:gray", linestyle="--", label=f"unigram entropy of the text, {unigram_entropy:.2f}"
    )
    final = history.validation[-1]
    axes.annotate(f"{final[1]:.2f}", final, textcoords="offset points", xytext=(0, 8), ha="center", color="tab:orange")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def sample(checkpoint: Path, prompt: str, seed: int) -> str:
    """Open `checkpoint` as a stranger would, and let it continue `prompt`.

    Raises:
        RuntimeError: the checkpoint lacks weights of the model, or holds some that the model has not.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise RuntimeError(f"{checkpoint} does not fit its own configuration: {loading}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    length = max(1, min(SAMPLE_TOKENS, model.config.max_position_embeddings - ids.shape[1]))
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=length // 2,
        max_new_tokens=length,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a figure may depend on."""
    own = {"python": platform.python_version(), "ds_fira": ds_fira.__version__}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def table(rows: list[tuple[str, str]], title: str) -> str:
    """`rows` of a label and a value as aligned text between two rules."""
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {value}" for label, value in rows]
    rule = "-" * max(len(line) for line in [title, *lines])
    return "\n".join([rule, title, rule, *lines, rule])


def size(count: int) -> str:
    """`count` bytes in MB of 10^6, or in kB below that."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def summary_table(summary: dict[str, Any], output_dir: Path) -> str:
    """The end-of-run table for the terminal."""
    gain = summary["unigram_entropy"] - summary["val_loss"]
    steps = f"{summary['steps']:,}"
    if summary["steps"] < summary["steps_requested"]:
        steps += f" (of {summary['steps_requested']:,}, for the time budget)"
    rows = [
        ("validation loss", f"{summary['val_loss']:.3f} nats per token (perplexity {summary['val_perplexity']:.1f})"),
        ("unigram entropy of the text", f"{summary['unigram_entropy']:.3f} nats per token (model {-gain:+.3f})"),
        ("steps, tokens", f"{steps} and {summary['tokens']:,}, on {summary['world_size']} processes"),
        ("training time", f"{summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens per second"),
        ("waiting for data", f"{summary['data_wait_share']:.2%} of the training time"),
        ("model", f"{summary['parameters']:,} parameters"),
    ]
    if summary["optimizer"] != "AdamW":
        per_process = ", ".join(size(count) for count in summary["optimizer_state_bytes"])
        formula, adamw = summary["optimizer_state_bytes_paper_formula"], summary["optimizer_state_bytes_adamw"]
        total = sum(summary["optimizer_state_bytes"])
        refreshing = summary["refresh_seconds"] / summary["seconds"]
        rows += [
            ("projected matrices", f"{summary['projected_matrices']}, {summary['refreshes']} subspace refreshes"),
            ("refresh time", f"{summary['refresh_seconds']:.1f} s, {refreshing:.1%} of the training time"),
            ("captured energy", f"{summary['captured_energy']:.1%} of the squared gradient norm"),
            ("limiter activations", f"{summary['limiter_activations']:,} in {summary['matrix_steps']:,} matrix steps"),
            ("residual norm", f"{summary['residual_norm']:.4g}, root mean square over the steps"),
            ("optimizer state per process", per_process),
            ("optimizer state together", f"{size(total)} (formula of the paper {size(formula)}, AdamW {size(adamw)})"),
        ]
    rows += [
        ("loss plot", str(output_dir / "loss.png")),
        ("checkpoint", str(output_dir / "model")),
        ("all figures", str(output_dir / "summary.json")),
    ]
    return table(rows, f"{summary['optimizer']} under DeepSpeed ZeRO-{summary['zero_stage']}")


def write(output_dir: Path, *, history: History, summary: dict[str, Any], prompt: str, seed: int) -> None:
    """Write everything into `output_dir`, print the sample and the table. For one process, after training."""
    summary = summary | {"sample": sample(output_dir / "model", prompt, seed), "versions": versions()}
    history.save(output_dir / "history.csv")
    title = f"{summary['optimizer']}, ZeRO-{summary['zero_stage']}, {summary['parameters'] / 1e6:.1f} M parameters"
    plot_losses(history, summary["unigram_entropy"], title, output_dir / "loss.png")
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nSample from the saved checkpoint:\n{summary['sample']}\n")
    print(summary_table(summary, output_dir), flush=True)
