"""The numbers in DeepSpeed's monitors, against plain torch: what the algorithm gives for the same gradients.

Gradients are recorded as FiraAdam sees them; `tests.reference` computes from them, matrix by matrix in one process.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from ds_fira import FiraAdam
from ds_fira.engine.deepspeed.monitor import MonitorHook
from tests.distributed.zero_jobs import Net, batches, config
from tests.ranks import Pools
from tests.reference.fira_reference import FiraReference
from tests.reference.harness import with_a_rank
from tests.unit.core.test_device_step import HostReads

# Six matrices: on 2 ranks some are cut in the middle of a row.
SHAPES = [(12, 40), (40, 12), (13, 37), (12, 40), (31, 17), (9, 60)]
PARAMS = {"lr": 0.01, "rank": 3, "update_proj_gap": 3, "alpha": 0.5}
STEPS, INTERVAL = 6, 2
# Float32 against float64; bf16 gradients are the same numbers in both.
TOLERANCE = 1e-4


class Recorded(FiraReference):
    """The reference, keeping what the monitors tell of every step."""

    def __init__(self, shape: tuple[int, int], **settings: Any) -> None:
        super().__init__(torch.zeros(shape), **settings)
        self.energies: list[float] = []
        self.residuals: list[float] = []

    def limit(self, residual: torch.Tensor, norm: float, beside: float) -> torch.Tensor:
        limited = super().limit(residual, norm, beside)
        self.residuals.append(self.residual_scale * limited.norm().item())
        return limited

    def step(self, gradient: torch.Tensor) -> None:
        super().step(gradient)
        whole = gradient.double()
        self.energies.append((self.project(whole).norm() / whole.norm()).item() ** 2)


def monitored(folder: Path, name: str = "csv_monitor", interval: int | None = INTERVAL) -> dict[str, Any]:
    """What a user adds to the DeepSpeed config."""
    added = {name: {"enabled": True, "output_path": str(folder), "job_name": "run"}}
    return added if interval is None else {**added, "steps_per_print": interval}


def read(folder: Path, event: str) -> list[tuple[int, float]]:
    """(x, value) of an event in DeepSpeed's csv files."""
    with (folder / "run" / f"{event.replace('/', '_')}.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", event.rpartition("/")[2]]
    return [(int(x), float(value)) for x, value in rows[1:]]


def check(folder: Path, event: str, xs: list[int], values: list[float]) -> None:
    """An event's rows are these."""
    found = read(folder, event)
    assert [x for x, _ in found] == xs, event
    assert [value for _, value in found] == pytest.approx(values, rel=TOLERANCE), event


def gradients_of(results: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """By step made, the gradient of every projected matrix by number."""
    found = []
    for step in range(len(results[0]["gradients"])):
        seen = [result["gradients"][step] for result in results]
        if not seen[0]:
            continue
        found.append({})
        for i, group in enumerate(results[0]["groups"]):
            if "rank" not in group["settings"]:
                continue
            if group["members"]:
                flat = torch.cat([rank[i][0] for rank in seen])
                for name, shape, offset in group["members"]:
                    found[-1][name] = flat[offset : offset + math.prod(shape)].view(shape)
            else:
                found[-1] |= {f"{i}.{j}": grad for j, grad in enumerate(seen[0][i])}
    return found


def grad_norms(results: list[dict[str, Any]]) -> list[float]:
    """By step made, the norm of all gradients that FiraAdam saw: of every rank's partition, or of one replica."""
    ranks = results if results[0]["groups"][0]["members"] else results[:1]
    return [
        math.sqrt(
            sum(
                float(g.double().square().sum())
                for r in ranks
                for group in r["gradients"][step].values()
                for g in group
            )
        )
        for step in range(len(results[0]["gradients"]))
        if results[0]["gradients"][step]
    ]


def expected_events(results: list[dict[str, Any]], interval: int, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Fira's events, computed in one process from the gradients."""
    gradients = gradients_of(results)
    known = {key: value for key, value in settings.items() if key != "exact_cuts"}
    references = {name: Recorded(tuple(grad.shape), **known) for name, grad in gradients[0].items()}
    refreshed = []
    for made in gradients:
        before = sum(len(reference.refreshes) for reference in references.values())
        for name, grad in made.items():
            references[name].step(grad)
        refreshed.append(sum(len(reference.refreshes) for reference in references.values()) - before)
    count, all_of = len(references), list(references.values())
    events: dict[str, list[float]] = {name: [] for name in ("captured_energy", "limiter_activations", "limiter_share")}
    events |= {"residual_norm": [], "refreshes": []}
    for first in range(0, len(gradients), interval):
        steps = range(first, min(first + interval, len(gradients)))
        limited = sum(reference.limited[step] for reference in all_of for step in steps)
        squares = sum(reference.residuals[step] ** 2 for reference in all_of for step in steps)
        energy = sum(reference.energies[step] for reference in all_of for step in steps)
        events["captured_energy"].append(energy / (count * len(steps)))
        events["limiter_activations"].append(limited)
        events["limiter_share"].append(limited / (count * len(steps)))
        events["residual_norm"].append(math.sqrt(squares / len(steps)))
        events["refreshes"].append(sum(refreshed[step] for step in steps))
    return events


CASES = {
    "zero2, cut": (2, "fp32", {}, {}),
    "zero2, exact cuts": (2, "fp32", {"exact_cuts": True}, {}),
    "zero2, limiter none, residual_scale": (2, "fp32", {"limiter": "none", "residual_scale": 0.5}, {}),
    "zero1, paper, per matrix": (1, "fp32", {"formulation": "paper", "scaling": "matrix"}, {}),
    "zero1, BF16_Optimizer": (1, "bf16", {"history_floor": 2.0**-7}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2, accumulation": (2, "bf16", {"history_floor": 2.0**-7}, {"gradient_accumulation_steps": 2}),
    "zero0": (0, "fp32", {}, {}),
    "zero0, fp16": (0, "fp16", {"history_floor": 2.0**-10}, {"fp16": {"loss_scale": 64}}),
}


@pytest.mark.parametrize("case", CASES)
def test_events_of_two_ranks_are_those_of_plain_torch(ranks: Pools, tmp_path: Path, case: str) -> None:
    """Captured energy, residual norm, limiter, refreshes, gradient norm and loss, by interval, over both ranks."""
    stage, dtype, changed, extra = CASES[case]
    settings = {**PARAMS, **changed}
    floor = {"history_floor": settings.pop("history_floor", 1e-4)}
    ds_config = config(stage, dtype, settings, **extra, **monitored(tmp_path))
    results = ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=STEPS)
    if "cut" in case:
        assert any(layout.split for layout in results[0]["layouts"])
    accumulation = extra.get("gradient_accumulation_steps", 1)
    xs = [2 * 2 * accumulation * step for step in range(INTERVAL, STEPS + 1, INTERVAL)]
    expected = expected_events(results, INTERVAL, {**settings, **floor})
    if settings.get("limiter") != "none":
        assert 0 < sum(expected["limiter_activations"]) < STEPS * len(SHAPES)
    assert expected["refreshes"] == [6, 6, 0]
    for name, values in expected.items():
        check(tmp_path, f"Train/Fira/{name}", xs, values)

    norms = [norm**2 for norm in grad_norms(results)]
    means = [math.sqrt(sum(norms[i : i + INTERVAL]) / INTERVAL) for i in range(0, STEPS, INTERVAL)]
    check(tmp_path, "Train/Fira/grad_norm", xs, means)
    micro = INTERVAL * accumulation
    losses = [
        sum(sum(result["losses"][i : i + micro]) for result in results) / (2 * micro)
        for i in range(0, STEPS * accumulation, micro)
    ]
    check(tmp_path, "Train/Samples/train_loss", xs, losses)
    assert [x for x, _ in read(tmp_path, "Train/Samples/lr")][INTERVAL - 1 :: INTERVAL] == xs

    metrics = results[0]["metrics"]
    assert metrics["residual_norm"] == pytest.approx(
        math.sqrt(sum(value**2 for value in expected["residual_norm"]) / len(xs)), rel=TOLERANCE
    )
    seconds = [value for _, value in read(tmp_path, "Train/Fira/refresh_seconds")]
    assert seconds[0] > 0.0
    assert seconds[2] == 0.0
    # The slowest rank may be another one in another interval.
    assert max(seconds) <= metrics["refresh_seconds"] <= sum(seconds) * (1 + 1e-9)
    assert results[1]["metrics"] == metrics


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16")])
def test_gradient_norm_is_that_before_clipping(ranks: Pools, tmp_path: Path, stage: int, dtype: str) -> None:
    """Of the first step, where plain torch has the same weights; every step is an event where no interval is set."""
    ds_config = config(stage, dtype, PARAMS, gradient_clipping=0.01, **monitored(tmp_path, interval=None))
    ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=2)
    torch.manual_seed(0)
    model = Net(SHAPES)
    sum(model(batches(1, rank)[0]) for rank in range(2)).div(2).backward()
    norm = math.sqrt(sum(float(param.grad.square().sum()) for param in model.parameters()))
    found = read(tmp_path, "Train/Fira/grad_norm")
    assert [x for x, _ in found] == [4, 8]
    assert found[0][1] == pytest.approx(norm, rel=1e-5 if dtype == "fp32" else 3e-2)
    assert norm > 0.1


def test_skipped_steps_count_for_nothing(ranks: Pools, tmp_path: Path) -> None:
    """fp16 overflows at the start: no events in intervals without a step, and the rest as if they had not been."""
    # In the step in which the loss scale grows DeepSpeed divides by the new one: the gradient arrives halved.
    fp16 = {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1000}
    ds_config = config(2, "fp16", PARAMS, fp16=fp16, **monitored(tmp_path, interval=1))
    results = ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=12)
    made = [4 * (step + 1) for step, seen in enumerate(results[0]["gradients"]) if seen]
    assert 3 <= len(made) < 12
    expected = expected_events(results, 1, {**PARAMS, "history_floor": 2.0**-10})
    for name, values in expected.items():
        check(tmp_path, f"Train/Fira/{name}", made, values)
    assert [x for x, _ in read(tmp_path, "Train/Samples/train_loss")] == made
    check(tmp_path, "Train/Fira/grad_norm", made, grad_norms(results))


def test_a_step_between_events_reads_and_sends_nothing(ranks: Pools, tmp_path: Path) -> None:
    """One read and one collective an interval; none without a monitor, and the steps' own collectives as before."""
    job = {"function": "count_reports", "module": "tests.distributed.monitor_jobs", "shapes": SHAPES, "steps": 7}
    plain = ranks.run(2, ds_config=config(2, "fp32", PARAMS), **job)
    monitored_ranks = ranks.run(2, ds_config=config(2, "fp32", PARAMS, **monitored(tmp_path, interval=3)), **job)
    for (silent, collectives), (found, others) in zip(plain, monitored_ranks, strict=True):
        assert silent == [(0, 0)] * 7
        assert [sent for _, sent in found] == [0, 0, 1, 1, 1, 2, 2]
        # One more read before the first step.
        assert [read - 1 for read, _ in found] == [0, 0, 1, 1, 1, 2, 2]
        assert others == collectives


def test_a_monitored_step_leaves_losses_and_norms_on_their_device() -> None:
    """The host asks for no number before the interval ends."""
    optimizer, written = FiraAdam(with_a_rank({"params": [Parameter(torch.ones(3))]})), []
    hook = MonitorHook(optimizer, written.extend, interval=4)
    norm = torch.tensor(2.0)
    for step in range(1, 5):
        with HostReads([]) as reads:
            hook.add_loss(torch.tensor(3.0 * step, requires_grad=True))
            hook.after_step(applied=True, grad_norm=norm, step=step, samples=10 * step)
        assert (reads.count > 0) == (step == 4)
    assert written == [("Train/Samples/train_loss", 7.5, 40), ("Train/Fira/grad_norm", 2.0, 40)]


def test_other_engines_are_left_alone(ranks: Pools, tmp_path: Path) -> None:
    """AdamW in the same process writes what DeepSpeed writes for it, and no more."""
    fira, adamw = tmp_path / "fira", tmp_path / "adamw"
    ds_config = config(2, "fp32", PARAMS, **monitored(fira))
    ranks.run(
        2,
        "train_beside_adamw",
        "tests.distributed.monitor_jobs",
        ds_config=ds_config,
        shapes=SHAPES[:2],
        adamw_folder=str(adamw),
        steps=2,
    )
    assert (fira / "run" / "Train_Fira_residual_norm.csv").exists()
    assert [path.name for path in (adamw / "run").iterdir()] == ["Train_Samples_lr.csv"]


def test_tensorboard_event_file(ranks: Pools, tmp_path: Path) -> None:
    """The same events come back from TensorBoard's own reader as from the csv files."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    both = {**monitored(tmp_path / "csv"), **monitored(tmp_path / "tb", "tensorboard")}
    ranks.run(2, "train", ds_config=config(2, "bf16", PARAMS, **both), shapes=SHAPES[:2], steps=4)
    events = reader.EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    tags = events.Tags()["scalars"]
    fira = ("captured_energy", "residual_norm", "limiter_activations", "limiter_share", "refreshes", "refresh_seconds")
    assert {*(f"Train/Fira/{name}" for name in fira), "Train/Fira/grad_norm", "Train/Samples/train_loss"} <= set(tags)
    for tag in tags:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(x, pytest.approx(value, rel=1e-6)) for x, value in read(tmp_path / "csv", tag)], tag
