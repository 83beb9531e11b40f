"""What large models cost on 64 to 2048 ranks: planning, states, bytes, collectives and a model of the time.

    python -m benchmarks.communication.scale [--models 7b 70b 8x22b] [--ranks 64 512 2048] [--write docs/scale.md]

Nothing is trained: models are shapes on the meta device, plans are those that the engines make, and times follow from
bytes and collectives by an alpha-beta model of the links, whose numbers are options. The time of a step is
6 x (parameters that a token goes through) x tokens / (ranks x `--flops` x `--mfu`); what ZeRO or FSDP2 themselves send
is taken to travel beside it. `--write` puts the tables between the marks of a page, `--json` all figures into a file.

`--check` makes the steps of `benchmarks.communication.delayed` in real processes and prints the model's time beside.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import device_name, save
from benchmarks.communication import delayed
from benchmarks.communication.scale_models import MODELS
from benchmarks.communication.scale_rows import Row, Step, knee, moves, row
from benchmarks.communication.scale_step import Exchange, GroupModel, Link

MODES = ("zero2", "zero3", "fsdp2", "hsdp64", "hsdp8")
NAMES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2", "hsdp64": "HSDP, 64", "hsdp8": "HSDP, 8"}
MEGABYTE = 10**6


def _mb(numbytes: float) -> str:
    return f"{numbytes / MEGABYTE:,.1f}"


def _ranks(found: Row) -> str:
    return f"{found.ranks}{' and more' if found.mode.startswith('hsdp') else ''}"


def plan_table(rows: list[Row]) -> list[str]:
    """Planning and states."""
    lines = [
        "| model, rank | engine | ranks | matrices | planning, s | s per 1,000 matrices | fullest rank, MB |"
        " over the mean | all states over the formula |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model}, {r.rank} | {NAMES[r.mode]} | {_ranks(r)} | {r.matrices} | {r.seconds:.2f} | "
            f"{1000 * r.seconds / r.matrices:.2f} | {r.state / MEGABYTE:,.0f} | {r.imbalance:.2f} | {r.copies:.2f} |"
        )
    return lines


def step_table(rows: list[Row]) -> list[str]:
    """Bytes, collectives and times."""
    lines = [
        "| model, rank | engine | ranks | sent / received, MB | with a refresh | collectives | with a refresh |"
        " messages | exchange, ms | with a refresh | step, ms | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model}, {r.rank} | {NAMES[r.mode]} | {_ranks(r)} | {_mb(r.sent)} / {_mb(r.received)} | "
            f"{_mb(r.refresh_sent)} / {_mb(r.refresh_received)} | {r.collectives} | {r.refresh_collectives} | "
            f"{r.messages:,} | {1e3 * r.exchange:.1f} | {1e3 * r.refresh:.0f} | {1e3 * r.step:.0f} | "
            f"{r.mean / r.step:.1%} |"
        )
    return lines


def knee_table(models: list[str], link: Link, step: Step) -> list[str]:
    """From how many ranks on the exchange is more than `LIMIT` of a step."""
    lines = [
        f"| model, rank | engine | {step.tokens:,} tokens a rank | {step.batch:,} tokens in all |",
        "|---|---|---|---|",
    ]
    for model in models:
        for mode in MODES:
            found = [knee(model, mode, link, step, fixed) for fixed in (False, True)]
            texts = ["none up to 2048" if each is None else f"{each} ranks" for each in found]
            lines.append(f"| {model}, {MODELS[model].rank} | {NAMES[mode]} | {texts[0]} | {texts[1]} |")
    return lines


def moves_table(models: list[str], ranks: int, link: Link, step: Step) -> list[str]:
    """What moves the share, at one number of ranks."""
    lines = ["| model | engine | changed | exchange, ms | share of a step |", "|---|---|---|---|---|"]
    for model in models:
        for mode in ("zero2", "zero3"):
            for name, found, share in moves(model, mode, ranks, link, step):
                if mode == "zero2" or not name.startswith("HSDP"):
                    lines.append(f"| {model} | {NAMES[found.mode]} | {name} | {1e3 * found.mean:.1f} | {share:.1%} |")
    return lines


def check_table(ranks: int, delay: float, repeats: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Steps in real processes over a delayed link, and the model's time for them."""
    lines = [
        "| case | collectives, counted | model | ms, measured | without the delay | difference | model | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = delayed.measure(ranks, delay, repeats)
    for measured, case in zip(found, delayed.CASES, strict=True):
        exchange = Exchange(ranks, Link(start=delay, message=0.0, bandwidth=1e18, inside=1e18, serial=False))
        GroupModel(*delayed.plan(ranks, *case)).step(exchange)
        ms, taken = 1e3 * exchange.now, measured["ms"] - measured["ms_without_delay"]
        measured |= {"model_ms": ms, "model_collectives": exchange.collectives, "error": ms / taken - 1}
        lines.append(
            f"| {measured['case']} | {measured['collectives']} | {exchange.collectives} | {measured['ms']:.0f} | "
            f"{measured['ms_without_delay']:.0f} | {taken:.0f} | {ms:.0f} | {measured['error']:+.0%} |"
        )
    return lines, found


def write(page: Path, tables: dict[str, list[str]]) -> None:
    """Put tables between their marks in a page.

    Raises:
        ValueError: the page lacks one's marks.
    """
    text = page.read_text()
    for name, lines in tables.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(
                f"--write = {str(page)!r} has no marks {begin} and {end}; write them where the table goes."
            )
        body = "\n".join([begin, "", *lines, "", end])
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL)
    page.write_text(text)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--tokens", type=int, default=Step.tokens, help="of a rank in a step")
    parser.add_argument("--batch", type=int, default=Step.batch, help="tokens of a step, where these are fixed")
    parser.add_argument("--flops", type=float, default=Step.flops, help="of a rank in a second, at most")
    parser.add_argument("--mfu", type=float, default=Step.mfu, help="share of them that a step reaches")
    parser.add_argument("--start", type=float, default=1e6 * Link.start, help="microseconds to start a collective")
    parser.add_argument("--message", type=float, default=1e6 * Link.message, help="microseconds for each further rank")
    parser.add_argument("--bandwidth", type=float, default=Link.bandwidth / 1e9, help="GB/s of a rank between nodes")
    parser.add_argument("--inside", type=float, default=Link.inside / 1e9, help="GB/s of a rank within a node")
    parser.add_argument("--node", type=int, default=Link.node, help="ranks of a node")
    parser.add_argument("--check", action="store_true", help="compare the model with steps over a delayed link")
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds of that link")
    parser.add_argument("--repeats", type=int, default=20, help="steps over that link, of which the quickest counts")
    parser.add_argument("--write", type=Path, help="page to put the tables into")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    link = Link(args.start / 1e6, args.message / 1e6, args.bandwidth * 1e9, args.inside * 1e9, args.node)
    step = Step(args.tokens, args.batch, args.flops, args.mfu)
    if args.check:
        lines, found = check_table(3, 1e-3 * args.delay, args.repeats)
        tables = {"check": lines}
        figures: dict[str, Any] = {"check": found}
    else:
        # What shards within some ranks is the same on any number of them.
        counts = {mode: args.ranks[:1] if mode.startswith("hsdp") else args.ranks for mode in args.modes}
        rows = [row(m, mode, n, link, step) for m in args.models for mode in args.modes for n in counts[mode]]
        distinct = [model for model in args.models if not MODELS[model].stacked]
        tables = {
            "plans": plan_table(rows),
            "steps": step_table(rows),
            "knees": knee_table(distinct, link, step),
            "moves": moves_table(distinct, 512, link, step),
        }
        figures = {"link": asdict(link), "step": asdict(step), "rows": [asdict(each) for each in rows]}
    print(device_name(torch.device("cpu")))
    print("\n\n".join("\n".join(lines) for lines in tables.values()))
    if args.write is not None:
        write(args.write, tables)
    save(args.json, torch.device("cpu"), **figures)


if __name__ == "__main__":
    main()
