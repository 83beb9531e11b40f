"""No checkpoint runs code: not where it is loaded, nor where it is looked into, nor a released run's."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.optim import lr_scheduler as schedules

from ds_fira.__main__ import main
from ds_fira.checkpoint import safe_load
from ds_fira.engine.deepspeed.save_load.files import load
from tests.distributed.safe_jobs import WANTED, Calls, evil
from tests.ranks import Pools

BF16_WRAPPER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
SCHEDULERS = ({"type": "WarmupLR", "params": {}}, {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacked")


@pytest.mark.parametrize(
    ("stage", "dtype", "legacy"), [(0, "fp32", False), (2, "fp16", False), (2, "fp32", True), (3, "bf16", False)]
)
def test_no_load_runs_code(ranks: Pools, folders: Path, stage: int, dtype: str, legacy: bool) -> None:
    """Wherever it stands, every rank refuses it with the same sentence; with the setting on, it is as it was."""
    folder = folders / f"{stage}-{dtype}-{legacy}"
    folder.mkdir()
    arguments = {"folder": str(folder), "stage": stage, "dtype": dtype, "legacy": legacy}
    first, second = ranks.run(2, "attacked", "tests.distributed.safe_jobs", **arguments)
    assert first["errors"] == second["errors"]
    assert first["marks"] == []
    for tag, error in first["errors"].items():
        kind = (tag if isinstance(tag, str) else tag[0]).rpartition("-")[2]
        assert error.startswith("ValueError: FiraAdam: to read "), (tag, error)
        assert f"_states.pt would import {WANTED[kind]}, and so may run code" in error
        assert '"unpickle_checkpoints": true in the params' in error
        assert error.count("\n") == 0
    assert first["good"] == second["good"] == ""
    expected = {0: None, 2: "deepspeed.runtime.fp16.loss_scaler.LossScaler"}.get(stage, first["scaler"])
    assert first["scaler"] == (expected if dtype != "fp16" else expected.replace("LossScaler", "DynamicLossScaler"))
    # The attacks are real ones: where the user says so, they run.
    if stage < 3:
        assert first["trusted"] == ["m-c-setstate", "m-c-system"]
    (warning,) = [text for text in first["told"] if "unpickle_checkpoints" in text]
    assert warning.startswith("FiraAdam: client_state['x'] holds posix.system, which is saved but not loaded again")
    assert not [text for text in second["told"] if "unpickle_checkpoints" in text]


def test_the_inspector_runs_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is asked; it says what it would have had to import, and that something is wrong."""
    for folder in folders.iterdir():
        for path in folder.glob("m-*"):
            path.unlink()
        for options in ([], ["--verify"], ["--json"], ["--tag", "client-eval"], ["--tag", "optimizer-system"]):
            assert main(["checkpoint", str(folder), *options]) == 1
            told = capsys.readouterr()
            assert told.err == ""
            assert "posix.system" in told.out or "builtins.eval" in told.out
        assert main(["checkpoint", str(folder), "--tag", "good"]) == 0
        assert not list(folder.glob("m-*"))


def test_real_files_need_no_more_than_the_stand_ins(ranks: Pools, tmp_path: Path) -> None:
    """Every stage, wrapper and dtype, with schedules of DeepSpeed."""
    cases = [(stage, dtype, {}) for stage in (0, 1, 3) for dtype in ("fp32", "fp16")]
    cases += [(2, "bf16", {"scheduler": SCHEDULERS[0]}), (1, "bf16", {**BF16_WRAPPER, "scheduler": SCHEDULERS[1]})]
    ranks.run(2, "real_files", "tests.distributed.safe_jobs", folder=str(tmp_path), cases=cases)
    files = list(tmp_path.glob("*/*/*.pt"))
    assert len(files) >= 3 * len(cases) - 4
    for path in files:
        before, found = torch.load(path, weights_only=False), load(path)
        assert found.keys() == before.keys()
        revived = safe_load.for_deepspeed(found).get("optimizer_state_dict", {})
        for key, value in before.get("optimizer_state_dict", {}).items():
            if key == "loss_scaler":
                assert type(revived[key]) is type(value)
                assert vars(revived[key]) == vars(value)


def _scheduler(kind: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    return kind(optimizer)


@pytest.mark.parametrize(
    "kind",
    [
        lambda o: schedules.LambdaLR(o, lambda n: 1.0),
        lambda o: schedules.MultiStepLR(o, [1, 2]),
        lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.LinearLR(o)], [2]),
        lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]),
        schedules.ReduceLROnPlateau,
        lambda o: schedules.CyclicLR(o, 0.01, 0.1, scale_fn=lambda n: n),
        lambda o: schedules.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    ],
)
def test_schedules_of_torch_are_plain(kind: Any, tmp_path: Path) -> None:
    """Their states load without the setting."""
    torch.save({"lr_scheduler": _scheduler(kind).state_dict()}, tmp_path / "schedule.pt")
    assert load(tmp_path / "schedule.pt")["lr_scheduler"]


class Made:
    """Unpickled as a call of `function`, whose result then gets `state`."""

    def __init__(self, function: Any, args: tuple[Any, ...], state: Any = None) -> None:
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.made


THROUGH_ALLOWED: dict[str, Any] = {
    "a method of the loss scaler": Made(LossScaler, (), {"backward": torch._utils._rebuild_parameter}),
    "slots of the loss scaler": Made(LossScaler, (), ({}, {"__class__": torch.Tensor})),
    "arguments of the loss scaler": Made(LossScaler, ("touch",)),
    "a member of an enum": Made(ZeroStageEnum, (2,), {"_value_": 0}),
    "an enum with other members": Made(ZeroStageEnum, ("name", ["a", "b"])),
    "a stage of another type": Made(ZeroStageEnum, ("2",)),
    "an object among plain values": Made(fragment_address, (), {"start": torch.ones(2)}),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("how", THROUGH_ALLOWED)
def test_what_is_allowed_takes_plain_values_only(how: str, legacy: bool, tmp_path: Path) -> None:
    """Neither DeepSpeed's classes nor an enum of the process is called or changed by a file."""
    torch.save({"x": THROUGH_ALLOWED[how]}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"x\.pt cannot be read \(.*\); load another"):
        load(tmp_path / "x.pt")
    assert ZeroStageEnum.gradients._value_ == 2
    assert "backward" not in vars(LossScaler())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bare_pickles(protocol: int, tmp_path: Path) -> None:
    """Files that torch never wrote."""
    marker = tmp_path / "mark"
    for number, content in enumerate((evil("system", marker), [evil("eval", marker)], {"module": evil("x", marker)})):
        (tmp_path / "bare.pt").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(ValueError, match=r"bare\.pt (would|cannot)") as caught:
            load(tmp_path / "bare.pt")
        assert str(caught.value).count("\n") == 0, number
    assert not marker.exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    """Torn, empty, of another kind: one sentence each."""
    contents = {"empty": b"", "text": b"hello\n" * 9, "zip": b"PK\x03\x04" + bytes(99), "noise": os.urandom(3000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"(cannot be read|would run a pickle)") as caught:
            load(tmp_path / name)
        assert str(caught.value).count("\n") == 0
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list where DeepSpeed keeps a dict"):
        load(tmp_path / "list.pt")
    script = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(script, tmp_path / "script.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "script.pt")


def test_other_threads_load_as_before(tmp_path: Path) -> None:
    """What is guarded is the load of a checkpoint, not the process."""
    from concurrent.futures import ThreadPoolExecutor

    torch.save(Calls(os.path.join, "a", "b"), tmp_path / "call.pt")
    before = torch.load
    with ThreadPoolExecutor(1) as pool, safe_load.only_safe_loads():
        assert pool.submit(torch.load, tmp_path / "call.pt", weights_only=False).result() == "a/b"
        with pytest.raises(safe_load.UnsafeFileError, match=r"would import posixpath\.join"):
            torch.load(tmp_path / "call.pt", weights_only=False)
    assert torch.load is before
