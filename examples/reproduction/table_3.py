"""Fine-tuning on multiple-choice questions, the paper's Table 3, with the model that the quickstart pre-trains.

From the repository's root::

    bash launch/quickstart.sh                                     # makes runs/quickstart/model
    python -m examples.reproduction.table_3 [--model runs/quickstart/model] [--seeds 3] [--workers 2] [--quick]

Every training's result is kept in `--cache`, so that an interrupted experiment goes on. LLaMA-7B on the paper's data is
`examples/finetuning/commonsense.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from ds_fira.optim.state_size import ParamRecord, formula_bytes, state_bytes
from examples.finetuning.choices import predictions, training_rows
from examples.finetuning.loop import PlainEngine, fine_tune, schedule, steps_of
from examples.finetuning.tuning import METHODS, Recipe, build_optimizer, prepare, trained_parameters
from examples.reproduction.lib import choice_sets, table_3_report
from examples.reproduction.table_3_memory import memory_rows

NAME = "table_3"
TITLE = "Fine-tuning on multiple-choice questions (Table 3)"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / f"{NAME}.json"
MODEL = ROOT / "runs" / "quickstart" / "model"
CACHE = ROOT / "runs" / "paper_finetune"
BEFORE = "before"
# The rates that validation chooses from; the first is the paper's.
RATES = (Recipe().lr, 1e-3, 3e-3, 1e-2)
# Table 6 fitted to a short run: its warm-up of 100 in 32,000 steps and its gap of 200 would be most of it.
SHORT = Recipe(warmup_steps=10, update_proj_gap=20, max_length=32)
CURVE_POINTS = 40
section = table_3_report.section


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the experiment is.

    Attributes:
        train: training questions of a set.
        validation: questions that choose the learning rate.
        test: questions that are reported.
        rates: learning rates to choose from, the paper's first.
        recipe: how to fine-tune.
    """

    train: int = 320
    validation: int = 150
    test: int = 300
    rates: tuple[float, ...] = RATES
    recipe: Recipe = SHORT


QUICK = Scale(train=32, validation=20, test=20, rates=RATES[:2], recipe=dataclasses.replace(SHORT, epochs=1))


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One training: a set, a method, a learning rate and a seed."""

    set: str
    method: str
    lr: float
    seed: int


@functools.lru_cache(maxsize=4)
def _questions(name: str, scale: Scale) -> choice_sets.ChoiceSet:
    return choice_sets.load_set(name, scale.train, scale.validation, scale.test)


def state_formula_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's states by the paper's Table 1, in float32."""
    names = {id(param): name for name, param in model.named_parameters()}
    adamw = {"proj_type": "std", "formulation": "released"}
    records = (
        ParamRecord.of(names[id(param)], tuple(param.shape), adamw | group)
        for group in optimizer.param_groups
        for param in group["params"]
    )
    return formula_bytes(records)


def run(spec: Spec, scale: Scale, model_folder: Path) -> dict[str, Any]:
    """Fine-tune once and answer the validation and the test questions.

    Returns:
        The spec, `validation` and `test` accuracy, `correct` (a 0 or 1 for every test question), `losses` (the mean of
        each of at most `CURVE_POINTS` stretches), `trained_bytes`, `state_bytes`, `state_formula_bytes`, `seconds`.
    """
    began = time.perf_counter()
    questions = _questions(spec.set, scale)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    result: dict[str, Any] = dataclasses.asdict(spec)
    recipe = dataclasses.replace(scale.recipe, lr=spec.lr)
    if spec.method != BEFORE:
        torch.manual_seed(spec.seed)
        model = prepare(model, spec.method, recipe)
        optimizer = build_optimizer(model, spec.method, recipe)
        rows = training_rows(tokenizer, questions.train, recipe.max_length)
        scheduler = schedule(optimizer, recipe, steps_of(len(rows), recipe))
        engine = PlainEngine(model, optimizer, scheduler, recipe.clipping)
        losses = [float(loss) for loss in fine_tune(engine, rows, recipe, tokenizer.eos_token_id, spec.seed)]
        trained = trained_parameters(model)
        result |= {
            "steps": len(losses),
            "losses": thinned(losses),
            "trained_bytes": sum(param.numel() * param.element_size() for param in trained),
            "state_bytes": state_bytes(optimizer),
            "state_formula_bytes": state_formula_bytes(model, optimizer),
        }
    for name, part in (("validation", questions.validation), ("test", questions.test)):
        found = predictions(model, tokenizer, part, recipe.max_length)
        correct = [int(index == one.answer) for index, one in zip(found, part, strict=True)]
        result[name] = sum(correct) / len(correct)
    return result | {"correct": "".join(map(str, correct)), "seconds": time.perf_counter() - began}


def thinned(losses: list[float]) -> list[float]:
    """Means of consecutive stretches of a curve, `CURVE_POINTS` of them at most."""
    stretch = -(-len(losses) // CURVE_POINTS)
    parts = [losses[start : start + stretch] for start in range(0, len(losses), stretch)]
    return [round(sum(part) / len(part), 4) for part in parts]


def _cached(spec: Spec, scale: Scale, model_folder: Path, cache: Path, partial: bool) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    weights = (model_folder / "model.safetensors").stat()
    key = json.dumps([dataclasses.asdict(spec), dataclasses.asdict(scale), weights.st_size, weights.st_mtime_ns])
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    if partial:
        return None
    result = run(spec, scale, model_folder)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(result))
    scratch.rename(path)
    print(
        f"{spec.set} {spec.method} lr {spec.lr:g} seed {spec.seed}: validation {result['validation']:.3f}, "
        f"test {result['test']:.3f}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result


def chosen_rates(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By set and method, the rate with the best validation accuracy at seed 0; of equals the smallest."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for one in runs:
        if one["method"] != BEFORE and one["seed"] == 0:
            key, value = (one["set"], one["method"]), (one["validation"], -one["lr"])
            best[key] = max(best.get(key, value), value)
    found: dict[str, dict[str, float]] = {}
    for (name, method), (_, rate) in best.items():
        found.setdefault(name, {})[method] = -rate
    return found


def compute(
    model: Path = MODEL,
    seeds: int = 3,
    scale: Scale | None = None,
    workers: int = 2,
    cache: Path = CACHE,
    sets: Sequence[str] = tuple(choice_sets.SETS),
    partial: bool = False,
) -> dict[str, Any]:
    """Run the experiment: all rates with seed 0, then the chosen rate with the other seeds.

    Args:
        model: folder of the pre-trained model.
        seeds: trainings of every method at the chosen rate.
        scale: sizes.
        workers: processes of one thread each.
        cache: folder that keeps every finished training.
        sets: names of the sets.
        partial: train nothing, and take what the cache has.

    Raises:
        ValueError: there is no model in the folder.
    """
    scale = scale or Scale()
    if not (model / "model.safetensors").is_file():
        raise ValueError(f"--model {model} holds no model.safetensors: make it with bash launch/quickstart.sh")
    runs: list[dict[str, Any]] = []
    call = functools.partial(_cached, scale=scale, model_folder=model, cache=cache, partial=partial)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def finish(specs: Iterable[Spec]) -> None:
            done = {Spec(one["set"], one["method"], one["lr"], one["seed"]) for one in runs}
            runs.extend(one for one in pool.map(call, [spec for spec in specs if spec not in done]) if one is not None)

        for name in sets:
            finish([Spec(name, BEFORE, 0.0, 0)])
            finish(Spec(name, method, rate, 0) for rate in scale.rates[::-1] for method in METHODS)
            chosen = chosen_rates(runs)[name]
            # Not at the paper's rate again: a small model moves little at a rate meant for 7B.
            finish(Spec(name, method, rate, seed) for seed in range(1, seeds) for method, rate in chosen.items())
    return {
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "scale": dataclasses.asdict(scale),
        "seeds": seeds,
        "model": describe_model(model),
        "sets": {
            name: {"title": _questions(name, scale).title, "chance": _questions(name, scale).chance} for name in sets
        },
        "chosen": chosen_rates(runs),
        "runs": runs,
        "memory": memory_rows(),
    }


def describe_model(folder: Path) -> dict[str, Any]:
    """What is known of the pre-trained model: its size, and how the quickstart left it if its summary is there."""
    config = json.loads((folder / "config.json").read_text())
    summary = folder.parent / "summary.json"
    told = json.loads(summary.read_text()) if summary.is_file() else {}
    names = ("parameters", "val_loss", "steps", "tokens")
    return {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")} | {
        name: told[name] for name in names if name in told
    }


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> None:
    """Compute, save and print the section."""
    parser = argparse.ArgumentParser(description=TITLE, allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the pre-trained model (the quickstart's)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=CACHE, help="keeps every finished training")
    parser.add_argument("--sets", nargs="+", choices=choice_sets.SETS, default=list(choice_sets.SETS))
    parser.add_argument("--partial", action="store_true", help="train nothing, report what the cache has")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; nothing is saved")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    try:
        scale = QUICK if options.quick else Scale()
        results = compute(
            options.model,
            seeds=options.seeds,
            scale=scale,
            workers=options.workers,
            cache=options.cache,
            sets=options.sets,
            partial=options.partial,
        )
    except ValueError as error:
        parser.error(str(error))
    results = json.loads(json.dumps(results))
    if not options.quick:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results) + "\n")
    figures = ROOT / "docs" / "reproduction" if not options.quick else options.cache
    print(section(results, figures))


if __name__ == "__main__":
    main()
