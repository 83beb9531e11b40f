"""Ways to train beside a reference, seed by seed: the runs, their differences, what is printed and saved of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common import default_device, save

Losses = dict[str, list[float]]
# Of a training, that its result depends on.
OPTIONS = ("steps", "batch_size", "seq_length", "layers", "width", "rank", "gap", "preset")


def losses_of(ways: Iterable[str], args: argparse.Namespace, loss_of: Callable[[str, int], float]) -> Losses:
    """The final losses of all ways, a line for each run; seed by seed, so that pairs are there early.

    Args:
        ways: names of them.
        args: `seeds`.
        loss_of: makes the run of a way and a seed.
    """
    losses: Losses = {way: [] for way in ways}
    for seed in args.seeds:
        for way, found in losses.items():
            found.append(loss_of(way, seed))
            print(f"seed {seed}, {way}: {found[-1]:.4f}", flush=True)
    return losses


def kept_loss(folder: Path, run: tuple[object, ...], args: argparse.Namespace, make: Callable[[], float]) -> float:
    """The loss of a run, read where it was made before with the same options, else made and kept in `folder`.

    Args:
        folder: of all runs.
        run: what tells it from others beside options: the benchmark, the way, the seed.
        args: the options; those of `OPTIONS` that it has are part of the name.
        make: makes the run.
    """
    options = [f"{name}{getattr(args, name)}" for name in OPTIONS if getattr(args, name, None) is not None]
    kept = folder / ("-".join([*map(str, run), *options]).replace(", ", "_") + ".json")
    if kept.exists():
        return json.loads(kept.read_text())["loss"]
    start = time.perf_counter()
    loss = make()
    scratch = kept.with_suffix(".partial")
    scratch.write_text(json.dumps({"loss": loss, "seconds": time.perf_counter() - start}))
    scratch.rename(kept)
    return loss


def differences(losses: Losses, reference: str) -> Losses:
    """Of every way to the reference, seed by seed, as far as both have run."""
    return {
        way: [loss - other for loss, other in zip(found, losses[reference], strict=False)]
        for way, found in losses.items()
        if way != reference
    }


def said(way: str, found: list[float], reference: str) -> str:
    """A line of paired differences: their mean and its standard error, and each."""
    spread = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    by_seed = " ".join(f"{value:+.4f}" for value in found)
    return f"{way:18} to {reference}: {statistics.fmean(found):+.4f} +- {spread:.4f}   by seed {by_seed}"


def conclude(losses: Losses, reference: str, args: argparse.Namespace, **more: object) -> None:
    """Print the differences, and save them with losses and options where `args.json` names a file."""
    found = differences(losses, reference)
    for way, values in found.items():
        print(said(way, values, reference))
    options = vars(args) | {"folder": None, "json": None}
    save(args.json, default_device(), options=options, losses=losses, differences=found, **more)
