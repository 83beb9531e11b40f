"""All of the paper's experiments that this machine allows, and docs/reproduction.md from their results.

python -m examples.reproduction.report                          everything that has no result yet, then the page
python -m examples.reproduction.report --only table_2 figure_6  these alone, printed
python -m examples.reproduction.report --page-only              the page from the results that are there
python -m examples.reproduction.report --size gpu               LLaMA 60M at the paper's settings, on a GPU

A run that has a result is not trained again: results are kept by a hash of all that decides them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from examples.reproduction.lib.alone import FIGURES, RESULTS
from examples.reproduction.lib.pool import Results
from examples.reproduction.lib.provenance import ROOT, stamp_line
from examples.reproduction.lib.spec import SIZES, Size
from examples.reproduction.lib.tables import Claim, claims_table, table

PAGE = ROOT / "docs" / "reproduction.md"
# One module each, in the order of the page; those beyond the paper come last.
ORDER = (
    *("table_2", "table_4", "figure_2", "figure_5", "figure_6", "table_7", "table_8", "figure_8", "table_1", "table_3"),
    *("beyond_sensitivity", "beyond_combined", "beyond_recipe", "beyond_cost", "beyond_longer"),
)
# What takes GPUs, and the command there.
NOT_RUN = (
    ("every section at LLaMA 60M and the paper's settings", "python -m examples.reproduction.report --size gpu"),
    ("the same in fewer steps", "python -m examples.reproduction.report --size gpu --steps 1000"),
    ("Table 2 at 60M, 130M, 350M, 1B; GaLore beside it", "bash launch/llama_130m.sh [--optimizer GaLoreAdam]"),
    ("Figure 5, LLaMA 7B", "bash launch/llama_7b_rank64.sh"),
    (
        "Table 3, LLaMA-7B on commonsense questions",
        "deepspeed --num_gpus 8 examples/finetuning/commonsense.py --model /data/llama-7b --train "
        "/data/commonsense_170k.json --tests /data/dataset/*/test.json",
    ),
    ("the recipe at 60M", "bash launch/llama_60m.sh --gamma 1.1 --update-proj-gap 67"),
)


def module(name: str) -> ModuleType:
    """An experiment's module."""
    return importlib.import_module(f"examples.reproduction.{name}")


def trains(name: str) -> bool:
    """Whether an experiment is made of runs that it may share with others, and not computed by itself."""
    return hasattr(module(name), "stages")


def train(names: list[str], results: Results, workers: int | None) -> None:
    """Train what the experiments need and what is not there, those of all experiments together.

    An experiment's stages grow as results come in: the learning rates come first, then what is trained with them.
    """
    while True:
        missing = [
            run for name in names for stage in module(name).stages(results) for run in stage if run not in results
        ]
        if not missing:
            return
        results.train(missing, workers)


def lacks(name: str, results: Results) -> bool:
    """Whether an experiment's results are not all there."""
    if trains(name):
        return any(run not in results for stage in module(name).stages(results) for run in stage)
    return not (RESULTS / f"{name}.json").exists()


def compute(name: str, again: bool) -> dict[str, Any]:
    """The results of an experiment without shared trainings, computed unless they are there."""
    path = RESULTS / f"{name}.json"
    if again or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(module(name).compute(), indent=1, allow_nan=False) + "\n")
    return json.loads(path.read_text())


def section(name: str, results: Results) -> str:
    """An experiment's heading and section."""
    found = module(name)
    if lacks(name, results):
        return f"## {found.TITLE}\n\nNot measured yet: `python -m examples.reproduction.report --only {name}`.\n"
    body = found.section(results if trains(name) else compute(name, again=False), FIGURES)
    return body if body.startswith("## ") else f"## {found.TITLE}\n\n{body}"


def page(names: list[str], results: Results) -> str:
    """The whole page; its plots are written."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    ordered = [name for name in ORDER if name in names]
    sections = [section(name, results) for name in ordered]
    judged = [name for name in ordered if trains(name) and not lacks(name, results)]
    verdicts: list[Claim] = [claim for name in judged for claim in module(name).claims(results)]
    if "beyond_cost" in ordered and not lacks("beyond_cost", results):
        verdicts += module("beyond_cost").claims(compute("beyond_cost", again=False))
    return "\n".join([heading(results), claims_table(verdicts), *sections, not_run(results.size)])


def heading(results: Results) -> str:
    """What was trained, on what, and how to read the page."""
    size, trained = results.size, list(results.found.values())
    if not trained:
        return "# The paper's claims, measured\n\nNothing has been trained at this size yet.\n"
    seconds = sum(result["seconds"] for result in trained)
    first = trained[0]
    facts = [
        ("model", f"LLaMA, {first['parameters'] / 1e6:.2f} M parameters: {describe(size)}"),
        (
            "text",
            f"{first['text']['source']}: {first['text']['tokens']['train']:,} training tokens; a run reads "
            f"{size.steps * size.batch * size.seq_length:,}, none twice; a unigram model has perplexity "
            f"{math.exp(first['text']['unigram_entropy']):.0f}",
        ),
        (
            "training",
            f"{size.steps} steps of {size.batch} x {size.seq_length} tokens, warm-up over a tenth, cosine to a tenth",
        ),
        ("runs", f"{len(trained)}, {seconds / 3600:.1f} hours of processor time"),
    ]
    return "\n".join(
        [
            "# The paper's claims, measured\n",
            "Written by `python -m examples.reproduction.report` (environment: `bash launch/setup.sh --test`) from",
            "`examples/reproduction/results/`, where every run stands with its configuration, seed, commit and curve.",
            "Paper: arXiv 2410.01623; its figures are of LLaMA 60M to 7B on C4, beside which the order of methods and",
            "their distances can be compared, not the perplexities.\n",
            table(["", ""], facts),
            f"{stamp_line(first['provenance'])}\n",
            "Perplexities are of held-out text, mean ± standard deviation over three seeds (weights, data order).",
            "These runs are short; the section on runs twice as long tells what of them lasts.",
            "That one method is below another **holds** where its worst seed is below the other's best, is",
            "**not told apart** where seeds overlap, and else **does not hold**.\n",
            "## All verdicts\n",
        ]
    )


def not_run(size: Size) -> str:
    """What this page lacks for want of GPUs; nothing at their size."""
    if size.dtype != "float32":
        return ""
    rows = [(what, f"`{command}`") for what, command in NOT_RUN]
    return "## What was not run here\n\nIt takes GPUs. On a machine that has them:\n\n" + table(["", "command"], rows)


def pictures(text: str) -> list[str]:
    """The plots that a page shows, relative to its folder."""
    return re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)


def describe(size: Size) -> str:
    """A size in words."""
    names = ("hidden", "intermediate", "layers", "heads", "vocabulary")
    values = dataclasses.asdict(size)
    return ", ".join(f"{values[name]} {name}" for name in names) + f", {size.dtype}"


def main() -> None:
    """Train, compute, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the size's")
    parser.add_argument("--only", nargs="+", choices=ORDER, metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--workers", type=int, help="runs trained at a time (default: one per processor; on a GPU 1)")
    parser.add_argument("--again", action="store_true", help="compute anew what needs no shared training")
    parser.add_argument("--page-only", action="store_true", help="train and compute nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.steps is not None:
        size = dataclasses.replace(size, name=f"{size.name}_{args.steps}", steps=args.steps)
    names = args.only or list(ORDER)
    results = Results(size, args.results)
    if not args.page_only:
        train([name for name in names if trains(name)], results, args.workers)
        for name in names:
            if not trains(name):
                compute(name, args.again)
    if args.only:
        print("\n".join(section(name, results) for name in names))
    elif size.name == "cpu":
        PAGE.write_text(page(names, results))
        print(f"{PAGE.relative_to(ROOT)}: {len(results.found)} runs")
    else:
        PAGE.with_name(f"reproduction_{size.name}.md").write_text(page(names, results))


if __name__ == "__main__":
    main()
