"""The page of plots: from the files that DeepSpeed's csv monitor really writes, and from the example's history."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ds_fira.__main__ import main
from ds_fira.tools.run_report.plots import write_page
from ds_fira.tools.run_report.run_csv import read_runs
from tests.distributed.test_monitor import PARAMS, SHAPES, monitored, read
from tests.distributed.zero_jobs import config
from tests.ranks import Pools

EVENTS = ("captured_energy", "grad_norm", "limiter_activations", "limiter_share", "refresh_seconds", "refreshes")
HISTORY = "step,split,loss\n0,validation,3.5\n2,train,3.0\n4,train,2.75\n4,validation,2.5\n"


@pytest.fixture(scope="module")
def written(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as DeepSpeed wrote it on two ranks: six steps, refreshes at the first and the fourth."""
    folder = tmp_path_factory.mktemp("run")
    ds_config = config(2, "fp32", PARAMS, **monitored(folder, interval=None))
    ranks.run(2, "train", ds_config=ds_config, shapes=SHAPES, steps=6)
    return folder


class Page(HTMLParser):
    """Titles, captions, plots and table cells of a page, and whether it is one that a browser need not mend."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"h2": [], "figcaption": [], "td": [], "th": []}
        self.plots: list[ElementTree.Element] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect what the page loads; a plot has to be well-formed SVG."""
        self.loaded += [value for key, value in attributes if key in ("src", "href") and value]
        if tag == "img":
            kind, _, data = self.loaded[-1].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.plots.append(ElementTree.fromstring(base64.b64decode(data)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Every element is closed in order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text by element."""
        inside = next((tag for tag in reversed(self.open) if tag in self.found), None)
        if inside is not None:
            self.found[inside].append(data)


def points(plot: ElementTree.Element) -> int:
    """Places that the longest line of a plot goes through; letters have fewer than twenty."""
    drawn = [element.get("d", "") for element in plot.iter("{http://www.w3.org/2000/svg}path")]
    return max(len(re.findall(r"[ML] ", path)) for path in drawn)


def test_page_of_a_run(written: Path) -> None:
    """Every plot with its text, the figures of the table, and nothing loaded from elsewhere."""
    page = Page(write_page([written]))
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


def test_the_plots_show_the_files(written: Path, tmp_path: Path) -> None:
    """The series are DeepSpeed's rows; a line has one vertex for each."""
    (run,) = read_runs(written)
    assert run.in_samples
    for event in EVENTS:
        assert list(zip(run.series[event].x, run.series[event].y, strict=True)) == read(written, f"Train/Fira/{event}")
    # Eighty rows more than the six, of a longer run; no refresh among them.
    longer = tmp_path / "longer"
    shutil.copytree(written, longer)
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
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "history.csv").write_text(HISTORY)
    (tmp_path / "bare" / "Train_Fira_grad_norm.csv").write_text("step,grad_norm\n4,1.0\n")
    for name, said in {
        "nowhere": "is not a folder",
        "empty": "holds no csv files of a run",
        "broken": "line 2 is '4,0.1,7'",
        "words": "line 2 is '4,high'",
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
    assert main(["report", str(written), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(written), "-o", str(tmp_path / "none.html")]) == 2
    assert re.search(r"report: matplotlib is missing, .*; pip install matplotlib", capsys.readouterr().err)
    assert not (tmp_path / "none.html").exists()
