"""Which DeepSpeed configs FiraAdam trains under, and how exactly: every combination, run, and the page that says so.

    python -m tests.compatibility.matrix [--stages 0 1 2 3] [--results FILE] [--page FILE]
        [--missing | --feature PART | --page-only]

Every combination of ZeRO stage, dtype, offload, ZeRO's options, clipping and accumulation trains a small net for 5
steps, with refreshes, on 2 real processes over gloo; its gradients and weights are held against one process
(`tests/compatibility/option_jobs.py`). A combination that DeepSpeed refuses with torch's AdamW too is DeepSpeed's
refusal. Features beside these options are tried one by one (`feature_jobs.py`). Writes the results, and from them
docs/compatibility.md; `--page-only` writes the page from the results that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

from benchmarks.common import describe
from tests.compatibility.feature_jobs import FEATURES, JOINED, NEITHER, REFUSED, REMOVED, WITHOUT_EFFECT, merged
from tests.compatibility.option_jobs import PARAMS
from tests.compatibility.page import write_page
from tests.distributed.zero_jobs import config
from tests.ranks import Pools, RankError

RESULTS = Path("benchmarks/results/compatibility.json")
PAGE = Path("docs/compatibility.md")
RANKS = 2
REFUSALS = {"FiraAdam": REFUSED, "DeepSpeed": REMOVED}
BATCH = 8  # combinations a job: a pool gives up on a job after two minutes

# What a dtype adds to the config of `tests.distributed.zero_jobs.config`. The first word is the dtype of the module.
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "bf16, fp32 accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
    "bf16, bf16 masters": {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16, bf16 masters, fp32 states": {"bf16": {"bf16_master_weights_and_grads": True}},
    "fp16": {},
    "fp16, fp32 accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
    "fp16, fp16 masters": {"fp16": {"fp16_master_weights_and_grads": True}},
}
# Options of zero_optimization that every stage from the first listed on reads, with the values tried.
ZERO_OPTIONS: dict[str, tuple[bool, ...]] = {
    "round_robin_gradients": (False, True),
    "reduce_scatter": (True, False),
    "overlap_comm": (False, True),
    "contiguous_gradients": (True, False),
}
# By stage the options that it reads; stage 0 reads none of them, and stage 3 deals out no whole parameters.
STAGES: dict[int, dict[str, tuple[bool, ...]]] = {
    0: {},
    1: ZERO_OPTIONS,
    2: ZERO_OPTIONS,
    3: {name: values for name, values in ZERO_OPTIONS.items() if name != "round_robin_gradients"},
}
TOP_OPTIONS: dict[str, tuple[float | int, ...]] = {
    "gradient_clipping": (0.0, 1.0),
    "gradient_accumulation_steps": (1, 2),
}


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        stage: ZeRO stage.
        dtype: key of `DTYPES`.
        offload: device of the optimizer, "none" or "cpu".
        options: (name, value) of the options of the stage and of `TOP_OPTIONS`.
    """

    stage: int
    dtype: str
    offload: str
    options: tuple[tuple[str, Any], ...]

    @property
    def row(self) -> tuple[int, str, str]:
        """What makes a row of the table."""
        return self.stage, self.dtype, self.offload

    @property
    def values(self) -> list[Any]:
        """The values of the options, as they stand in the results."""
        return [value for _, value in self.options]

    @property
    def settings(self) -> list[tuple[str, Any]]:
        """All (name, value) pairs."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "options"] + list(self.options)

    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed config."""
        extra = {f"zero_{name}" if name in ZERO_OPTIONS else name: value for name, value in self.options}
        if self.offload != "none":
            extra["zero_offload_optimizer"] = {"device": self.offload, "pin_memory": False}
        # Low enough for no step to be skipped, and its growth is in the five steps.
        if self.dtype.startswith("fp16"):
            extra["fp16"] = {"initial_scale_power": 8, "loss_scale_window": 2, **DTYPES[self.dtype].get("fp16", {})}
        return config(self.stage, self.dtype.split(",")[0], PARAMS, **{**DTYPES[self.dtype], **extra})


def cases(stages: Iterable[int] = tuple(STAGES)) -> list[Case]:
    """Every combination of the stages."""
    result = []
    for stage in stages:
        options = {**STAGES[stage], **TOP_OPTIONS}
        choices = [[(name, value) for value in values] for name, values in options.items()]
        # Stage 0 has no offload: DeepSpeed reads the block from stage 1 on.
        for dtype, offload in itertools.product(DTYPES, ("none", "cpu") if stage else ("none",)):
            result += [Case(stage, dtype, offload, chosen) for chosen in itertools.product(*choices)]
    return result


def covering_pairs(candidates: Sequence[Case]) -> list[Case]:
    """Few of the cases, in which every two settings that meet in any case meet: the greedy way."""
    pairs = {case: set(itertools.combinations(case.settings, 2)) for case in candidates}
    missing = set().union(*pairs.values()) if pairs else set()
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def run(pools: Pools, chosen: Sequence[Case], batch: int = BATCH) -> list[dict[str, Any]]:
    """Run cases on a pool; see `tests.compatibility.option_jobs.try_config`. Ranks that disagree count as wrong."""
    results: list[dict[str, Any]] = []
    for first in range(0, len(chosen), batch):
        ds_configs = [case.ds_config() for case in chosen[first : first + batch]]
        try:
            answers = _try_configs(pools, ds_configs)
        except RankError:  # one by one, to know which it was
            answers = [_try_alone(pools, ds_config) for ds_config in ds_configs]
        for ours, *others in answers:
            alike = all(other.keys() == ours.keys() for other in others)
            results.append(ours if alike else {**ours, "wrong": "the ranks disagree", "message": ""})
        logging.info("%d of %d combinations", len(results), len(chosen))
    return results


def _try_configs(pools: Pools, ds_configs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """What every rank answered, by config."""
    answers = pools.run(RANKS, "try_configs", module="tests.compatibility.option_jobs", ds_configs=ds_configs)
    return list(zip(*answers, strict=True))


def _try_alone(pools: Pools, ds_config: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    try:
        return _try_configs(pools, [ds_config])[0]
    except RankError as error:
        return ({"wrong": f"a rank failed: {error.messages}"},)


def rows_of(chosen: Sequence[Case], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results by row of the table.

    Returns:
        Rows with `stage`, `dtype`, `offload`, the names of the `options`; `trained`: a list of the options' values, the
        difference of the weights and that of the gradients; `refused`: by who refuses and the sentence, and `wrong`: by
        what is wrong, a list of the options' values.
    """
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for case, result in zip(chosen, results, strict=True):
        stage, dtype, offload = case.row
        empty = {"stage": stage, "dtype": dtype, "offload": offload, "options": [name for name, _ in case.options]}
        row = rows.setdefault(case.row, {**empty, "trained": [], "refused": {}, "wrong": {}})
        if result.get("refused_by"):
            # The class of an object in a message says what we are, not what is wrong.
            message = result["message"].split(" optimizer type")[0]
            row["refused"].setdefault(f"{result['refused_by']}: {message}", []).append(case.values)
        elif result.get("wrong", result.get("message")):
            row["wrong"].setdefault(result.get("wrong") or result["message"], []).append(case.values)
        else:
            differences = [float(f"{result[key]:.1e}") for key in ("step_difference", "gradient_difference")]
            row["trained"].append([case.values, *differences])
    return list(rows.values())


def run_features(pools: Pools, together: bool = False, part: str = "", every: int = 1) -> list[dict[str, Any]]:
    """Try every feature alone at every stage it is for, or several together at the last of them (`JOINED`).

    Args:
        pools: of ranks.
        together: which of both.
        part: of the names of those that are tried.
        every: how many to go on from one that is tried to the next.

    Returns:
        `name`, `stage`, `expected` and `result`: "supported" with the differences of `weights` and `gradients`,
        "refused" or "DeepSpeed's refusal" with the `message`, "AdamW fails too" with its error in `adamw` besides,
        "no effect" of what DeepSpeed does not read, or "wrong" with what is.
    """
    results, features = [], JOINED if together else FEATURES
    ready = [(number, feature) for number, feature in enumerate(features) if part in feature.name and feature.ready()][
        ::every
    ]
    for position, stage in [(number, stage) for number, feature in ready for stage in feature.stages]:
        job = {"chosen": [(position, stage)], "together": together}
        answers = pools.run(RANKS, "try_features", module="tests.compatibility.feature_jobs", **job)
        (answer,) = answers[0]
        entry = {"name": features[position].name, "stage": stage, "expected": features[position].expected}
        if any(other[0].keys() != answer.keys() for other in answers):
            entry |= {"result": "wrong", "message": "the ranks disagree"}
        elif answer.get("refused_by"):
            result, failure = REFUSALS[answer["refused_by"]], answer.get("adamw")
            result = WITHOUT_EFFECT if " has no effect at stage " in answer["message"] else result
            entry |= {"result": NEITHER, "adamw": without_folders(failure)} if failure else {"result": result}
            entry["message"] = answer["message"]
        elif answer.get("wrong") == "":
            entry |= {"result": "supported", "weights": answer["step_difference"]}
            entry["gradients"] = answer["gradient_difference"]
        else:
            entry |= {"result": "wrong", "message": answer.get("wrong") or answer["message"]}
        results.append(entry)
        logging.info("%s at stage %d: %s", entry["name"], stage, entry["result"])
    return results


def without_folders(error: str) -> str:
    """The first line of an error, of files their names alone."""
    return re.sub(r"(/[^/\s]+)+/", "", error.splitlines()[0])


def trained_cases(rows: Sequence[dict[str, Any]]) -> list[Case]:
    """The cases that trained, from results."""
    return [
        Case(row["stage"], row["dtype"], row["offload"], tuple(zip(row["options"], values, strict=True)))
        for row in rows
        for values, *_ in row["trained"]
    ]


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write JSON with a row a line, which is short and can still be compared."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            lines = ",\n".join(f"    {json.dumps(item, separators=(',', ':'))}" for item in value)
            parts.append(f'  "{key}": [\n{lines}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--missing", action="store_true", help="run only the rows that the results do not have")
    parser.add_argument("--feature", help="try only features with this in their names anew, and no combination")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results that are there")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, Any] = {"rows": []}
    if args.results.exists():
        results.update(json.loads(args.results.read_text()))
    if args.feature is not None:
        pools = Pools()
        results["features"] = merged(results["features"], run_features(pools, part=args.feature))
        pools.close()
        save_results(args.results, results)
    elif not args.page_only:
        pools = Pools()
        if not args.missing:
            results["rows"] = [row for row in results["rows"] if row["stage"] not in args.stages]
        there = {(row["stage"], row["dtype"], row["offload"]) for row in results["rows"]}
        wanted = [case for case in cases(args.stages) if case.row not in there]
        for _, members in itertools.groupby(wanted, key=lambda case: case.row):
            chosen = list(members)
            rows = [*results["rows"], *rows_of(chosen, run(pools, chosen))]
            results |= {**describe(torch.device("cpu")), "rows": sorted(rows, key=lambda row: row["stage"])}
            # After every row, so that a run that was ended goes on with --missing.
            save_results(args.results, results)
        missing = [feature.name for feature in FEATURES if not feature.ready()]
        if missing:
            raise SystemExit(f"this machine lacks what {missing} take; see tests/distributed/test_nvme.py")
        results |= {"features": run_features(pools), "features_device": describe(torch.device("cpu"))["device"]}
        pools.close()
        results["gradient_clipping_default"] = GRADIENT_CLIPPING_DEFAULT
        save_results(args.results, results)
    write_page(args.page, results)


if __name__ == "__main__":
    main()
