"""`record_scaling_factors`: the factors of equations 9 and 11, against Algorithm 1 and AdamW written out."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import ds_fira
from ds_fira import FiraAdam
from ds_fira.observe import scaling_recorder
from tests.reference.fira_reference import FiraReference
from tests.reference.gradients import make_gradients, make_weight
from tests.reference.harness import with_a_rank
from tests.small_models import llama, loss_of, mixtral
from tests.unit.core.test_device_step import HostReads, drive

STEPS, SHAPES = 7, [(9, 20), (17, 6), (8, 8)]
SETTINGS: dict[str, Any] = {"update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}


class Recorded(FiraReference):
    """The reference, keeping the factors of every step as equations 9 and 11 define them."""

    def __init__(self, shape: tuple[int, int], **settings: Any) -> None:
        super().__init__(torch.zeros(shape), **settings)
        self.matrix: list[float] = []
        self.columns: list[Tensor] = []

    def scale(self, normalised: Tensor, low_rank_gradient: Tensor) -> Tensor:
        psi, (beta1, beta2) = normalised, self.betas
        if self.formulation == "released":
            psi = normalised * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        along = 0 if self.side == "left" else 1
        self.matrix.append(float(psi.norm() / low_rank_gradient.norm()))
        self.columns.append(psi.norm(dim=along) / low_rank_gradient.norm(dim=along))
        return super().scale(normalised, low_rank_gradient)

    def normalize(self, residual: Tensor, gradient: Tensor, low_rank_gradient: Tensor) -> tuple[Tensor, float, float]:
        found, along = super().normalize(residual, gradient, low_rank_gradient), 0 if self.side == "left" else 1
        self.matrix.append(float(found[0].norm() / residual.norm()))
        self.columns.append(found[0].norm(dim=along) / residual.norm(dim=along))
        return found


def train_alone(shapes: list[tuple[int, int]], group: dict[str, Any], every: int, steps: int = STEPS, **settings: Any):
    """An optimizer over named matrices after some steps, and the gradients it had, by name and step."""
    params = {f"m{i}": Parameter(make_weight(shape, seed=i).float()) for i, shape in enumerate(shapes)}
    gradients = {name: make_gradients(p.shape, steps, seed=i) for i, (name, p) in enumerate(params.items())}
    groups = with_a_rank({"params": list(params.items()), **group})
    optimizer = FiraAdam(groups, record_scaling_factors=every, **settings)
    for step in range(steps):
        for name, param in params.items():
            param.grad = gradients[name][step].float()
        optimizer.step()
    return optimizer, gradients


def adamw_factors(gradients: list[Tensor], side: str, eps: float = 1e-6) -> tuple[list[float], np.ndarray]:
    """By step the factor of the whole gradient, and of its columns or rows (steps, entries), in plain NumPy."""
    matrix, columns = [], []
    exp_avg = exp_avg_sq = 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.float().double().numpy()
        exp_avg = 0.9 * exp_avg + 0.1 * g
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * g * g
        psi = math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * exp_avg / (np.sqrt(exp_avg_sq) + eps)
        axis = 0 if side == "left" else 1
        matrix.append(np.linalg.norm(psi) / np.linalg.norm(g))
        columns.append(np.linalg.norm(psi, axis=axis) / np.linalg.norm(g, axis=axis))
    return matrix, np.array(columns)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"formulation": "paper", "scaling": "matrix", "residual_scale": 0.5},
        {"scaling": "none", "limiter": "none"},
        {"proj_type": "reverse_std", "scaling": "matrix"},
        {"residual": "normalized", "residual_scale": 0.5},
        {"residual": "normalized", "scaling": "matrix", "limiter": "growth"},
    ],
    ids=lambda changed: "+".join(map(str, changed.values())) or "defaults",
)
@pytest.mark.parametrize("every", [1, 2])
def test_low_rank_factors_are_those_of_algorithm_1(changed: dict[str, Any], every: int) -> None:
    """Of every recorded step, over refreshes; `scaling` changes nothing of it but where the residual is normalized."""
    settings = {**SETTINGS, **changed}
    optimizer, gradients = train_alone(SHAPES, {"rank": 3}, every, **settings)
    found = ds_fira.scaling_factors(optimizer)
    assert list(found) == ["m0", "m1", "m2"]
    for name, shape in zip(found, SHAPES, strict=True):
        reference = Recorded(shape, rank=3, **settings)
        for gradient in gradients[name]:
            reference.step(gradient.float())
        one, chosen = found[name], slice(every - 1, None, every)
        assert (one["side"], one["rank"], one["shape"]) == (reference.side, 3, shape)
        assert one["steps"] == list(range(every, STEPS + 1, every))
        assert one["matrix"].tolist() == pytest.approx(reference.matrix[chosen], rel=1e-5)
        within = 1e-4 if "residual" in changed else 1e-5  # |D_j|^2 is a difference, here 1% of float32 squares
        torch.testing.assert_close(one["column"], torch.stack(reference.columns[chosen]).mean(0), rtol=within, atol=0)
        assert one["count"].tolist() == [len(one["steps"])] * shape[one["side"] == "left"]


@pytest.mark.parametrize("proj_type", ["std", "left"])
def test_full_rank_factors_are_adams(proj_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rank every 2-D parameter is recorded, along the side that a projection would take; in any blocks."""
    monkeypatch.setattr(scaling_recorder, "BLOCK", 50)
    optimizer, gradients = train_alone(SHAPES, {}, every=1, proj_type=proj_type)
    found = ds_fira.scaling_factors(optimizer)
    sides = ["left", "left" if proj_type == "left" else "right", "left" if proj_type == "left" else "right"]
    for (name, one), side in zip(found.items(), sides, strict=True):
        matrix, columns = adamw_factors(gradients[name], side)
        assert (one["side"], one["rank"]) == (side, None)
        assert one["matrix"].tolist() == pytest.approx(matrix, rel=1e-5)
        np.testing.assert_allclose(one["column"].numpy(), columns.mean(0), rtol=1e-5)


def test_full_rank_factors_of_compressed_moments() -> None:
    """They are of the moments as stored: near those of float32."""
    factors = {}
    for state_dtype in ("float32", "bfloat16"):
        optimizer, _ = train_alone([(70, 90)], {}, every=1, state_dtype=state_dtype)
        factors[state_dtype] = ds_fira.scaling_factors(optimizer)["m0"]
    coded, plain = factors["bfloat16"], factors["float32"]
    assert not torch.equal(coded["matrix"], plain["matrix"])
    torch.testing.assert_close(coded["matrix"], plain["matrix"], rtol=0.02, atol=0)


@pytest.mark.parametrize("group", [{"rank": 3}, {}], ids=["low rank", "full rank"])
def test_recording_changes_nothing_of_the_training(group: dict[str, Any]) -> None:
    """Weights and states are the same bits; without it there is no recorder and nothing in the state dict."""
    off, _ = train_alone(SHAPES, group, every=0, **SETTINGS)
    on, _ = train_alone(SHAPES, group, every=1, **SETTINGS)
    assert off.recorder is None
    assert "scaling_factors" not in off.state_dict()["fira"]
    pairs = zip(off.param_groups[0]["params"], on.param_groups[0]["params"], strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
        assert off.state[ours].keys() == on.state[theirs].keys()
        assert all(torch.equal(off.state[ours][key], on.state[theirs][key]) for key in off.state[ours])
    assert ds_fira.state_bytes(off) == ds_fira.state_bytes(on)
    with pytest.raises(ValueError, match=r"record_scaling_factors = 0 .* give a number of steps"):
        ds_fira.scaling_factors(off)


@pytest.mark.parametrize("value", [-1, True, 2.5, "all"])
def test_a_wrong_value_is_refused(value: Any) -> None:
    """One sentence with the setting, the value, the remedy."""
    with pytest.raises(ValueError, match=r"record_scaling_factors = .* give a whole number of steps"):
        FiraAdam([Parameter(torch.ones(3, 4))], record_scaling_factors=value)


@pytest.mark.parametrize("rank", [2, 99])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_linear_layers_of_a_model_by_name(build: Any, rank: int) -> None:
    """The weights that a rank would project and no others, in the model's order, with its names."""
    torch.manual_seed(0)
    model = build()
    optimizer = FiraAdam(model, rank=rank, record_scaling_factors=1)
    for seed in range(2):
        tokens = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(seed))
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = []
    for name, param in model.named_parameters():
        # Mixtral's router is not a linear layer of torch's.
        if param.ndim > 1 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.weight")):
            expected += [f"{name}[{e}]" for e in range(len(param))] if param.ndim == 3 else [name]
    found = ds_fira.scaling_factors(optimizer)
    assert list(found) == expected
    # At full rank nothing is projected.
    assert all(one["steps"] == [1, 2] and one["rank"] == (None if rank == 99 else 2) for one in found.values())


def test_two_modules_with_the_same_names_stay_apart() -> None:
    """The second one's names get a number."""
    modules = [nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False)]
    optimizer = FiraAdam(
        [pair for module in modules for pair in module.named_parameters()], rank=99, record_scaling_factors=1
    )
    for module in modules:
        module(torch.ones(6)).square().sum().backward()
    optimizer.step()
    assert list(ds_fira.scaling_factors(optimizer)) == ["weight", "1.weight"]


@pytest.mark.parametrize("group", [{"rank": 3}, {}], ids=["low rank", "full rank"])
def test_what_has_no_factor_is_left_out(group: dict[str, Any]) -> None:
    """A gradient of zero or one that is not finite at matrix level; a column of zeros there alone."""
    params = [Parameter(make_weight((9, 20), seed=0).float())]
    optimizer = FiraAdam(with_a_rank({"params": params, **group}), record_scaling_factors=1)
    for step in range(1, 7):
        grad = make_gradients((9, 20), 7, seed=0)[step].float()
        if step == 2:
            grad[:, 4] = 0.0
        if step == 3:
            grad.zero_()
        if step == 5:
            grad[1, 1] = math.nan
        params[0].grad = grad
        optimizer.step()
    (one,) = ds_fira.scaling_factors(optimizer).values()
    assert one["steps"] == [1, 2, 4, 6]
    assert one["matrix"].isfinite().all()
    assert one["column"].isfinite().all()
    assert one["column"].max() < 1e4
    assert one["count"].tolist() == [4.0] * 4 + [3.0] + [4.0] * 15


@pytest.mark.parametrize("group", [{"rank": 3}, {}], ids=["low rank", "full rank"])
def test_a_loaded_state_dict_goes_on_recording(group: dict[str, Any]) -> None:
    """As if there had been no pause; one without a record begins anew."""
    whole, gradients = train_alone(SHAPES, group, every=2, **SETTINGS)
    first, _ = train_alone(SHAPES, group, every=2, steps=3, **SETTINGS)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = FiraAdam(
        with_a_rank({"params": [(f"m{i}", p) for i, p in enumerate(first.param_groups[0]["params"])], **group}),
        record_scaling_factors=2,
        **SETTINGS,
    )
    second.load_state_dict(saved)
    for step in range(3, STEPS):
        for i, param in enumerate(second.param_groups[0]["params"]):
            param.grad = gradients[f"m{i}"][step].float()
        second.step()
    expected, found = ds_fira.scaling_factors(whole), ds_fira.scaling_factors(second)
    for name, one in expected.items():
        assert found[name]["steps"] == one["steps"] == [2, 4, 6]
        assert torch.equal(found[name]["matrix"], one["matrix"])
        assert torch.equal(found[name]["count"], one["count"])
        torch.testing.assert_close(found[name]["column"], one["column"], rtol=1e-12, atol=0)
    # Back to the third step: what came after it is forgotten.
    second.load_state_dict(saved)
    assert [one["steps"] for one in ds_fira.scaling_factors(second).values()] == [[2]] * 3
    del saved["fira"]["scaling_factors"]
    second.load_state_dict(saved)
    assert ds_fira.scaling_factors(second) == {}


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    """Plain arrays, read back as they were; a missing folder is made."""
    optimizer, _ = train_alone(SHAPES, {"rank": 3}, every=3)
    full, _ = train_alone(SHAPES, {}, every=3)
    for source in (optimizer, full):
        ds_fira.write_scaling_factors(source, tmp_path / "new" / "factors.npz")
        found, expected = (
            ds_fira.read_scaling_factors(tmp_path / "new" / "factors.npz"),
            ds_fira.scaling_factors(source),
        )
        assert list(found) == list(expected)
        for name, one in expected.items():
            assert found[name].keys() == one.keys()
            for key, value in one.items():
                same = torch.equal(found[name][key], value) if isinstance(value, Tensor) else found[name][key] == value
                assert same, key
                assert type(found[name][key]) is type(value)


@pytest.mark.usefixtures("kernels_allowed")
@pytest.mark.parametrize("kind", [pytest.param("flat", marks=pytest.mark.full), "experts", "adamw"])
def test_kernels_record_the_same(kind: str) -> None:
    """Batches of matrices, decided on the device, with one gradient that is not finite."""
    pytest.importorskip("triton")
    settings = {"steps": 4, "spoil": 2, "record_scaling_factors": 1}
    expected = ds_fira.scaling_factors(drive(kind, kernel=False, **settings)[1])
    found = ds_fira.scaling_factors(drive(kind, kernel=True, **settings)[1])
    assert len(found) == {"flat": 4, "experts": 3, "adamw": 1}[kind]
    assert list(found) == list(expected)
    assert min(len(one["steps"]) for one in found.values()) == 3
    for name, one in expected.items():
        assert found[name]["steps"] == one["steps"]
        torch.testing.assert_close(found[name]["matrix"], one["matrix"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[name]["column"], one["column"], rtol=1e-5, atol=0)
        assert torch.equal(found[name]["count"], one["count"])


@pytest.mark.usefixtures("kernels_allowed")
@pytest.mark.parametrize("kind", ["flat", "adamw"])
def test_recording_reads_nothing_from_the_device(kind: str) -> None:
    """The host asks for as many numbers with it as without."""
    pytest.importorskip("triton")
    reads = {}
    for every in (0, 1):
        with HostReads([]) as counter:
            drive(kind, kernel=True, steps=2, record_scaling_factors=every)
        reads[every] = counter.count
    assert reads[0] == reads[1]
