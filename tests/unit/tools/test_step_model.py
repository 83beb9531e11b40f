"""The model of a step on a card: the arithmetic it stands on, what limits a phase, and how a measurement refutes it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import model
from benchmarks.speed.model import CARDS, Assumptions, Prediction, Share, predict

# One of 8 ranks of LLaMA 7B: 28 matrices and what is not projected.
SHARE = Share(((8, 4096, 4096), (8, 4096, 4096), (4, 11008, 4096), (4, 11008, 4096), (4, 4096, 11008)), 32_800_000)
H100 = CARDS["h100"]


def of(prediction: Prediction, name: str) -> model.Phase:
    (phase,) = [phase for phase in prediction.phases if phase.name == name]
    return phase


def test_bytes_and_operations() -> None:
    """Those of 809.5 M elements in matrices: AdamW's 28 bytes each, G twice and W both ways, 2 m n r a product."""
    found = predict(SHARE, 256, "tf32", H100)
    assert SHARE.elements == pytest.approx(809.5e6, rel=1e-4)
    assert found.adamw == pytest.approx(7.86e-3, rel=1e-3)
    assert found.floor == pytest.approx(4.317e-3, rel=1e-3)
    assert of(found, "project").operations == 2 * 256 * SHARE.elements
    assert of(found, "project").moved == 4 * SHARE.elements + 4 * 256 * (16 * 4096 + 12 * 11008)
    assert of(found, "update").moved == 12 * SHARE.elements
    assert predict(SHARE, 4096, "tf32", H100).phases[1].moved == 36 * SHARE.low_rank_elements(4096)


@pytest.mark.parametrize(
    ("rank", "precision", "ms"),
    [(64, "tf32", 8.0), (256, "tf32", 13.0), (256, "bfloat16", 11.6), (1024, "tf32", 37.0), (1024, "bfloat16", 32.0)],
)
def test_an_independent_count_of_the_same_step(rank: int, precision: str, ms: float) -> None:
    """Made phase by phase from the compiled kernels, before there was this model, with what a batch launched then."""
    then = Assumptions(
        tile=128, rounded=0, overlapped_bfloat16=0.0, norm_reads=1.0, passes=11.0, launches=75.0, rest=1.0
    )
    assert predict(SHARE, rank, precision, H100, then).seconds * 1e3 == pytest.approx(ms, rel=0.05)


def test_what_limits_each_phase() -> None:
    fast = replace(H100, l2=1e15, products={"tf32": 1e18, "bfloat16": 1e18})
    free = Assumptions(gap=0.0, host=0.0)
    by_memory = predict(SHARE, 256, "tf32", fast, free)
    moved = sum(phase.moved for phase in by_memory.phases)
    assert by_memory.seconds == pytest.approx(moved / fast.bandwidth, rel=0.02)
    # Twice the tile's sides, half the traffic out of L2, until the tensor cores are the limit.
    wide = [predict(SHARE, 1024, "tf32", replace(H100, bandwidth=1e18), Assumptions(tile=tile)) for tile in (64, 128)]
    assert of(wide[0], "update").seconds == pytest.approx(2 * of(wide[1], "update").seconds, rel=1e-3)
    # Five batches of nine, and three.
    slow_host = predict(SHARE, 64, "tf32", H100, Assumptions(host=1e-3))
    assert slow_host.seconds == slow_host.host == pytest.approx(0.048)


def test_factors_in_bfloat16() -> None:
    """Half the bytes out of L2, so twice the rate where that is the limit; P read and written once, C in two bytes."""
    free = {"tile": 128, "overlapped_bfloat16": 0.0}
    endless = replace(H100, bandwidth=1e18)
    before, after = (
        predict(SHARE, 1024, "bfloat16", endless, Assumptions(**free, rounded=rounded)) for rounded in (0, 1)
    )
    assert of(before, "update").seconds == pytest.approx(2 * of(after, "update").seconds, rel=1e-3)
    # Of a projection's operands G stays in four bytes: 4 + 2 of 4 + 4.
    assert of(after, "project").seconds == pytest.approx(0.75 * of(before, "project").seconds, rel=1e-3)
    moved = of(after, "moments, P, C").moved - of(before, "moments, P, C").moved
    assert moved == 6 * 1024 * 28 * 4096 - 2 * SHARE.low_rank_elements(1024)
    assert of(after, "small operations").launches == of(before, "small operations").launches + 2 * 5


def test_what_the_update_moves_beside_its_products() -> None:
    """All of it, or none."""
    by_share = [
        of(predict(SHARE, 256, "tf32", H100, Assumptions(overlapped_tf32=share)), "update") for share in (0.0, 1.0)
    ]
    moving = by_share[0].moved / H100.bandwidth
    assert by_share[1].seconds == pytest.approx(max(moving, by_share[0].seconds - moving))


def test_tiles_are_those_of_the_kernels() -> None:
    given, tiles = Assumptions(), pytest.importorskip("ds_fira.core.kernels.tiles").TILES
    for product, by_precision in tiles.items():
        for precision, tile in by_precision.items():
            assert given.tile_of(product, precision) == (tile.rows, tile.columns)


def test_measured_ceilings_and_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(stage: int, what: str, value: float | None, **facts: Any) -> str:
        return json.dumps({"stage": stage, "what": what, "value": value, **facts}) + "\n"

    plain = {"states": "float32", "kernels": "auto", "precision": "tf32"}
    results = tmp_path / "results.jsonl"
    results.write_text(
        line(0, "copy", 6.0)
        + line(0, "product", 300.0, precision="tf32")
        + line(4, "step", None, rank=64, **plain)
        + line(4, "step", 99.0, rank=256, **{**plain, "states": "int8"})
        + line(4, "step", 12.0, rank=256, **plain)
        + line(4, "step", 90.0, rank=1024, **plain)
    )
    monkeypatch.setattr(model, "share_of", lambda *_: SHARE)
    monkeypatch.setattr(sys, "argv", ["model", "--results", str(results), "--precision", "tf32"])
    model.main()
    said = capsys.readouterr().out
    assert said.startswith("h100: copy 6.00 TB/s, L2 5.5 TB/s, tf32 300 TF/s, bfloat16 800 TF/s (copy and products")
    assert "turned_tf32 0.45" in said
    verdicts = [text.strip() for text in said.splitlines() if "measured " in text and "ms:" in text]
    assert [text.split(": ")[1].split(", ")[1] for text in verdicts] == ["holds", "REFUTED"]
    assert verdicts[1].startswith("measured 90.0 ms: -")


@pytest.mark.full
def test_the_share_that_is_planned() -> None:
    """As the engine plans it, of a model of the paper."""
    share = model.share_of("60m", 8, 128)
    assert sum(k for k, _, _ in share.batches) == 56 // 8
    assert {tuple(sorted(shape)) for _, *shape in share.batches} == {(512, 512), (512, 1376)}
    with pytest.raises(ValueError, match="--ranks 3 cuts matrices of 60m; choose 1, 2, 4 or 8"):
        model.share_of("60m", 3, 128)
