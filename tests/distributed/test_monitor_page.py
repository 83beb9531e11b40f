"""The page of plots: from the files that DeepSpeed's csv monitor really writes, and from the example's history."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from ds_fira.__main__ import main
from ds_fira.observe.run_record import FILE, Start, add_start, read_starts, without_secrets
from ds_fira.tools.run_report.drawing import smoothed, window
from ds_fira.tools.run_report.plots import write_page
from ds_fira.tools.run_report.run_csv import read_runs
from tests.distributed.report_page import Page, points
from tests.distributed.test_monitor import PARAMS, SHAPES, monitored, read
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

COMPARED = ("limiter_share", "residual_norm")  # whose captions name gamma
EVENTS = ("captured_energy", "grad_norm", "limiter_activations", "limiter_share", "refresh_seconds", "refreshes")
HISTORY = "step,split,loss\n0,validation,3.5\n2,train,3.0\n4,train,2.75\n4,validation,2.5\n"


@pytest.fixture(scope="module")
def written(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as DeepSpeed wrote it on two ranks: six steps, refreshes at the first and the fourth."""
    folder = tmp_path_factory.mktemp("run")
    ds_config = config(2, "fp32", PARAMS, **monitored(folder, interval=None))
    ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=6)
    return folder


@pytest.fixture(scope="module")
def whole(written: Path) -> Page:
    """The page of the run, with all its plots, in its folder."""
    return Page(write_page([written]))


def part(run: Path, folder: Path, *series: str) -> Path:
    """A copy of a run with some series alone, and the learning rate, which all have: each plot costs a while."""
    kept = {FILE, "Train_Samples_lr.csv", *(f"Train_Fira_{name}.csv" for name in series)}
    shutil.copytree(run, folder, ignore=lambda _, names: [each for each in names if "." in each and each not in kept])
    return folder


def test_page_of_a_run(written: Path, whole: Page) -> None:
    """Every plot with its text, the figures of the table, and nothing loaded from elsewhere."""
    page = whole
    assert page.found["h2"] == [
        "Loss",
        "Perplexity",
        "Learning rate",
        "Gradient norm",
        "Residual norm",
        "Limiter",
        "Captured energy",
        "Refresh time",
    ]
    assert len(page.plots) == len(page.found["figcaption"]) == 8
    assert all("Healthy:" in text for text in page.found["figcaption"])
    assert all(value.startswith("data:") for value in page.loaded)
    assert "://" not in re.sub(r"base64,[^\"]*", "", (written / "report.html").read_text())
    cells = dict(zip(page.found["th"], page.found["td"], strict=True))
    assert cells["run"] == written.name
    assert cells["refreshes"] == str(2 * len(SHAPES))
    assert cells["training loss, last"] == f"{read(written, 'Train/Samples/train_loss')[-1][1]:.3f}"
    assert cells["refresh time"].endswith(" s")
    captions = dict(zip(page.found["h2"], page.found["figcaption"], strict=True))
    assert "no more than gamma (1.01) allows, 1 % in a step" in " ".join(captions["Residual norm"].split())
    assert "update_proj_gap (3)" in " ".join(captions["Captured energy"].split())
    assert 'subspace = "randomized" in place of svd' in " ".join(captions["Refresh time"].split())


def test_the_run_says_what_it_is(written: Path, whole: Page) -> None:
    """Settings as they act, the configuration, ranks, device and versions: in the file, and on the page."""
    (start,) = read_starts(written / "run")
    assert (start["step"], start["samples"], start["ranks"], start["samples_per_step"]) == (0, 0, 2, 4)
    assert start["optimizer"] == "FiraAdam"
    assert start["settings"]["rank"] == [PARAMS["rank"]]
    assert start["settings"]["limiter"] == ["growth"]
    assert start["config"]["optimizer"]["params"]["update_proj_gap"] == PARAMS["update_proj_gap"]
    assert start["projected_matrices"] == len(SHAPES)
    assert start["environment"]["torch"].startswith(torch.__version__.partition("+")[0])
    cells = dict(zip(whole.found["th"], whole.found["td"], strict=True))
    assert cells["rank"] == str(PARAMS["rank"])
    told = [cells[title] for title in ("ZeRO stage", "precision", "ranks", "started at step")]
    assert told == ["2", "fp32", "2", "0"]
    assert cells["device"] == start["environment"]["device"]
    assert "&#34;update_proj_gap&#34;: 3" in (written / "report.html").read_text()


def other_run(written: Path, folder: Path, **settings: list[object]) -> Path:
    """A copy of a run that says it had other settings."""
    part(written, folder, *COMPARED)
    record = json.loads((folder / "run" / FILE).read_text())
    record["starts"][-1]["settings"] |= settings
    (folder / "run" / FILE).write_text(json.dumps(record))
    return folder


def test_runs_with_other_settings_are_told_apart(written: Path, tmp_path: Path) -> None:
    """Captions name each run's value, the table says which rows differ; a run without a record says so."""
    first = part(written, tmp_path / written.name, *COMPARED)
    other, silent = other_run(written, tmp_path / "other", gamma=[1.02]), part(written, tmp_path / "silent", *COMPARED)
    (silent / "run" / FILE).unlink()
    path = write_page([first, other], tmp_path / "page.html")
    page, html = Page(path), path.read_text()
    captions = dict(zip(page.found["h2"], page.found["figcaption"], strict=True))
    assert f"gamma (1.01 in {written.name}, 1.02 in other)" in captions["Limiter"]
    assert "% in a step" not in captions["Residual norm"]
    assert re.findall(r'<tr class="differs"><th>(.*?)</th>', html) == ["gamma"]
    assert html.count("<p><span") == len(page.plots), "each plot has a key of the runs"
    page = Page(write_page([first, silent], tmp_path / "page.html"))
    assert "1.01 in " in (tmp_path / "page.html").read_text()
    assert page.found["td"].count("not recorded") > 10
    write_page([silent], tmp_path / "page.html")
    assert "no fira_run.json" in (tmp_path / "page.html").read_text()


def test_a_phone_shows_the_page(written: Path, whole: Page) -> None:
    """No table is wider than the screen but inside a box that scrolls, and plots are as wide as the screen at most."""
    html = (written / "report.html").read_text()
    assert len(whole.plots) == 8
    assert html.count("<table>") == html.count('<div class="box"><table>') == 2
    assert html.count("<pre>") == html.count('<div class="box"><pre>') == 1
    style = html[html.index("<style>") : html.index("</style>")]
    assert ".box { overflow-x: auto;" in style
    assert "minmax(min(100%, 500px), 1fr)" in style
    assert not re.search(r"[{;]\s*(min-)?width: \d{3,}px", style)
    assert 'name="viewport" content="width=device-width' in html


def test_the_limiter_is_smoothed_over_a_gap(written: Path, tmp_path: Path) -> None:
    """At 100% behind each refresh and low before the next, its running mean lies between, and the text says so."""
    part(written, tmp_path / "run")
    rows = [f"{4 * step},{1.0 if step % 3 == 1 else 0.0}\n" for step in range(1, 31)]
    (tmp_path / "run" / "run" / "Train_Fira_limiter_share.csv").write_text("step,limiter_share\n" + "".join(rows))
    (run,) = read_runs(tmp_path / "run")
    assert window(run, "limiter_share") == PARAMS["update_proj_gap"] == 3
    assert smoothed(np.array(run.series["limiter_share"].y), 3)[1:-1] == pytest.approx(1 / 3)
    assert smoothed(np.array([2.0, 4.0, np.nan]), 3).tolist() == [3.0, 3.0, 4.0]
    page = Page(write_page([tmp_path / "run"]))
    captions = dict(zip(page.found["h2"], page.found["figcaption"], strict=True))
    assert "strong the mean over a whole gap" in captions["Limiter"]
    run.starts = []
    assert window(run, "limiter_share") is None, "without a record no gap is known"


def test_a_resumed_run_adds_a_start(written: Path, tmp_path: Path) -> None:
    """Each has its settings; one from the same step or earlier replaces what it makes again."""
    start: Start = read_starts(written / "run")[0]
    for step in (0, 300, 600, 300):
        add_start(tmp_path, {**start, "step": step, "ranks": step + 1})
    assert [(each["step"], each["ranks"]) for each in read_starts(tmp_path)] == [(0, 1), (300, 301)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    # What another program left under the name does not stop a training.
    (tmp_path / FILE).write_text("[]")
    add_start(tmp_path, start)
    assert read_starts(tmp_path) == [start]


def test_no_key_is_written_down() -> None:
    config = {"comet": {"api_key": "abc", "project": "fira"}, "data": [{"hub_token": "x", "tokens": 7}]}
    hidden = {"comet": {"api_key": "hidden", "project": "fira"}, "data": [{"hub_token": "hidden", "tokens": 7}]}
    assert without_secrets(config) == hidden


@pytest.mark.parametrize(
    "name",
    [
        os.fsdecode(b"\xff run"),
        "<i>&amp;",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("$x_{", "_private", "a\nb", "läuft 跑", "[a-z]*")),
    ],
)
def test_odd_names_of_runs(written: Path, tmp_path: Path, name: str) -> None:
    """A folder may be called anything: the page shows it, alone and beside another run of the same name."""
    first, second = tmp_path / "one" / name, tmp_path / "two" / name
    for folder in (first, second):
        folder.parent.mkdir()
        part(written, folder)
    page = Page(write_page([first], tmp_path / "page.html"))
    assert page.found["td"][0] == os.fsencode(name).decode(errors="replace")
    page = Page(write_page([first, second, second], tmp_path / "page.html"))
    labels = page.found["td"][:3]
    assert len(set(labels)) == 3
    assert labels[2] == f"{labels[1]} (2)"


def test_the_plots_show_the_files(written: Path, tmp_path: Path) -> None:
    """The series are DeepSpeed's rows; a line has one vertex for each."""
    (run,) = read_runs(written)
    assert run.in_samples
    for event in EVENTS:
        assert list(zip(run.series[event].x, run.series[event].y, strict=True)) == read(written, f"Train/Fira/{event}")
    # Eighty rows more than the six, of a longer run; no refresh among them.
    longer = part(written, tmp_path / "longer", "residual_norm", "captured_energy", "refreshes")
    with (longer / "run" / "Train_Fira_residual_norm.csv").open("a") as file:
        file.writelines(f"{4 * step},{1 + 0.2 * (step % 2)}\n" for step in range(7, 87))
    page = Page(write_page([longer], tmp_path / "deep" / "page.html"))
    titles = dict(zip(page.found["h2"], page.plots, strict=True))
    assert points(titles["Residual norm"]) == 86 > points(titles["Captured energy"])


def test_runs_are_laid_over_each_other(written: Path, tmp_path: Path) -> None:
    """Runs with csv files and one with a history alone: all on steps, each with its colour and its name."""
    other, history = tmp_path / "other", tmp_path / "old <b>"
    shutil.copytree(written, other)
    history.mkdir()
    (history / "history.csv").write_text(HISTORY)
    page = Page(write_page([written, other, history], tmp_path / "page.html"))
    assert [text for text in page.found["td"] if text in (written.name, "other", "old <b>")] == [
        written.name,
        "other",
        "old <b>",
    ]
    drawn = [ElementTree.tostring(plot, encoding="unicode") for plot in page.plots]
    colors = [[color in svg.lower() for color in ("#0072b2", "#d55e00", "#009e73")] for svg in drawn]
    assert colors[0] == [True, True, True]
    assert all(pair == [True, True] for *pair, _ in colors)
    runs = [read_runs(folder)[0] for folder in (written, history)]
    assert runs[0].in_steps().series["lr"].x == [1, 2, 3, 4, 5, 6]
    assert runs[1].in_steps().series["validation_loss"].x == [0, 4]


def test_history_beside_csv_files_is_on_their_axis(written: Path, tmp_path: Path) -> None:
    """Validation comes from the history, moved to samples; training loss from the csv files."""
    shutil.copytree(written, tmp_path / "run")
    (tmp_path / "run" / "history.csv").write_text(HISTORY)
    (run,) = read_runs(tmp_path / "run")
    assert run.series["validation_loss"].x == [0, 4 * 4]
    assert len(run.series["train_loss"].x) == 6


def test_a_resumed_run_replaces_what_it_makes_again(tmp_path: Path) -> None:
    """DeepSpeed appends to the file it finds, header and all."""
    (tmp_path / "Train_Samples_lr.csv").write_text("step,lr\n4,0.1\n8,0.2\n12,0.3\nstep,lr\n8,0.5\n12,0.6\n16,0.7\n")
    (run,) = read_runs(tmp_path)
    assert run.series["lr"].x == [4, 8, 12, 16]
    assert run.series["lr"].y == [0.1, 0.5, 0.6, 0.7]


def test_several_jobs_in_one_folder_are_several_runs(written: Path, tmp_path: Path) -> None:
    """They are named by their folders."""
    for name in ("first", "second"):
        shutil.copytree(written / "run", tmp_path / "logs" / name)
    assert [run.label for run in read_runs(tmp_path)] == ["logs/first", "logs/second"]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, an empty one, a broken file, a folder without the learning rate."""
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "step,lr\n4,0.1,7\n"), ("words", "step,lr\n4,high\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Train_Samples_lr.csv").write_text(text)
    for name in ("waiting", "still", "record"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Train_Samples_lr.csv").write_text("step,lr\n" + "0,0.1\n" * (name != "waiting"))
    (tmp_path / "still" / "history.csv").write_text(HISTORY)
    (tmp_path / "record" / FILE).write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "history.csv").write_text(HISTORY)
    (tmp_path / "bare" / "Train_Fira_grad_norm.csv").write_text("step,grad_norm\n4,1.0\n")
    for name, said in {
        "nowhere": "is not a folder",
        "empty": "holds no csv files of a run",
        "broken": "line 2 is '4,0.1,7'",
        "words": "line 2 is '4,high'",
        "waiting": "has written no values yet",
        "still": "has steps of 0 samples",
        "record": "cannot be read as the record of a run: it has another shape",
        "bare": "has no Train_Samples_lr.csv",
    }.items():
        assert main(["report", str(tmp_path / name)]) == 2
        told = capsys.readouterr()
        assert re.fullmatch(rf"ds-fira report: [^\n]*{said}[^\n]*\.\n", told.err)
        assert told.out == ""


def test_command_line_and_a_missing_matplotlib(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command prints where the page is; without matplotlib it says what to install."""
    run = str(part(written, tmp_path / "run"))
    assert main(["report", run, "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", run, "-o", str(tmp_path / "none.html")]) == 2
    assert re.search(r"report: matplotlib is missing, .*; pip install matplotlib", capsys.readouterr().err)
    assert not (tmp_path / "none.html").exists()
