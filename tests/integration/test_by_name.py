"""`TrainingArguments(optim="fira_adamw", optim_args="rank=...")`, and modules that `ds_fira.run` starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_fira import hf
from tests.grids import full_if
from tests.programs import ROOT, Forked
from tests.small_models import llama

LINE = {
    "optim": "fira_adamw",
    "optim_args": "rank=4,alpha=0.5,subspace=gram",
    "learning_rate": "0.01",
    "weight_decay": "0.1",
    "adam_beta2": "0.99",
    "max_steps": "3",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "use_cpu": "True",
    "disable_tqdm": "True",
    "report_to": "none",
}
START = "import sys; sys.path.insert(0, {root!r}); from ds_fira.run import main; main(sys.argv[1:])"


def start(folder: Path, name: str, ranks: int = 0, **changes: Any) -> list[Any]:
    """`python -m ds_fira.run -m tests.integration.by_name ...`, in forks; what each process ended with."""
    script = folder / "start.py"
    script.write_text(START.format(root=str(ROOT)))
    values = {"output_dir": str(folder / name), **LINE, **changes}
    line = [item for key, value in values.items() if value is not None for item in (f"--{key}", value)]
    return Forked(str(script), ["-m", "tests.integration.by_name", *line], folder, name, ranks=ranks).wait()


def result(done: Any, optim: str = "fira_adamw") -> tuple[str, list[dict[str, Any]], list[float]]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    kind, groups, losses, name = json.loads(line.removeprefix("RESULT "))
    assert name == optim
    return kind, groups, losses


def write(folder: Path, name: str, **more: Any) -> str:
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config = {**auto, "gradient_clipping": "auto", "zero_optimization": {"stage": 2}, **more}
    (folder / name).write_text(json.dumps(config))
    return str(folder / name)


@pytest.mark.parametrize("name", full_if(lambda name: name != "fira_adamw", hf.NAMES))
def test_with_and_without_deepspeed(tmp_path: Path, name: str) -> None:
    """The same training: its settings from `optim_args` and the Trainer's arguments, norms without weight decay."""
    chosen = {"optim": name}
    if name == "fira_apollo_adamw":  # which has no subspace to choose
        chosen["optim_args"] = "rank=4,alpha=0.5"
    alone = result(start(tmp_path, "alone", **chosen)[0], name)
    more = {"deepspeed": write(tmp_path, "ds.json"), "per_device_train_batch_size": "2"}
    under = result(start(tmp_path, "under", ranks=2, **more, **chosen)[0], name)
    for kind, groups, losses in (alone, under):
        assert kind == hf.NAMES[name].__name__
        assert {group["rank"] for group in groups} == {4, None}
        assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
        assert all(group["weight_decay"] == 0.1 for group in groups if group["rank"])
        for group in groups:
            assert (group["betas"], group["eps"]) == ([0.9, 0.99], 1e-6)
            assert group["alpha"] == 0.5 or group["rank"] is None
        # At this rate in three steps FiraAdam's alone.
        assert losses[-1] < losses[0] if name == "fira_adamw" else len(set(losses)) == 3
    assert under[2] == pytest.approx(alone[2], rel=1e-4)


def test_steps_in_the_backward_pass(tmp_path: Path) -> None:
    """The losses of a plain training, and on from a checkpoint in the midst of it."""
    released = f"{LINE['optim_args']},step_in_backward=true"
    once = {"max_grad_norm": "0", "save_steps": "2"}
    plain = result(start(tmp_path, "plain", **once)[0])
    found = result(start(tmp_path, "found", **once, optim_args=released)[0])
    assert found == plain
    resumed = {
        "optim_args": released,
        "max_grad_norm": "0",
        "resume_from_checkpoint": str(tmp_path / "found/checkpoint-2"),
    }
    assert result(start(tmp_path, "resumed", **resumed)[0])[2][-1] == plain[2][-1]


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path) -> None:
    fira = {"optimizer": {"type": "FiraAdam", "params": {"rank": 4, "lr": "auto"}}}
    cases = {
        'optim_args of optim = "fira_adamw" has no rank': {"optim_args": None},
        # Without DeepSpeed the Trainer splits them first.
        "optim_args of optim = \"fira_adamw\" has 'rank'; write name=value pairs": {
            "optim_args": "rank",
            "deepspeed": write(tmp_path, "ds.json"),
        },
        "step_in_backward = true does not go with gradient_accumulation_steps = 2": {
            "optim_args": "rank=4,step_in_backward=true",
            "gradient_accumulation_steps": "2",
        },
        "step_in_backward = true does not go with DeepSpeed": {
            "optim_args": "rank=4,step_in_backward=true",
            "deepspeed": write(tmp_path, "ds.json"),
        },
        "did you mean 'alpha'": {"optim_args": "rank=4,alhpa=1"},
        'optim = "fira_adamw" contradicts the DeepSpeed config, which names FiraAdam;': {
            "deepspeed": write(tmp_path, "named.json", **fira)
        },
    }
    for number, (expected, changes) in enumerate(cases.items()):
        (done,) = start(tmp_path, f"refused-{number}", ranks=1, **changes)
        assert done.returncode == 1
        assert expected in done.stderr.splitlines()[-1]


GIVEN = {
    **LINE,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "learning_rate": 0.01,
}


def test_each_name_has_its_optimizer_and_its_settings() -> None:
    for name, kind in hf.NAMES.items():
        args = SimpleNamespace(**{**GIVEN, "optim": name, "optim_args": "rank=4,alpha=0.5"})
        made, arguments = hf._make(SimpleNamespace(args=args, model=llama()))
        optimizer = made(**arguments)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["alpha"] == 0.5
    args = SimpleNamespace(**{**GIVEN, "optim": "fira_apollo_adamw"})
    with pytest.raises(ValueError, match=r'of optim = "fira_apollo_adamw": subspace = .gram. is a setting of'):
        hf.settings_of(args)


def test_what_is_refused_under_fsdp() -> None:
    """By what the Trainer hands over: its own arguments are not made with FSDP where there is no GPU."""
    args = SimpleNamespace(**GIVEN, fsdp=["full_shard"], fsdp_config={"version": 1})
    with pytest.raises(ValueError, match=r"does not train under FSDP with fsdp_config version = 1, .*set version to 2"):
        hf._make(SimpleNamespace(args=args, model=llama()))
    args.fsdp_config, args.optim_args = {"version": 2}, f"{args.optim_args},step_in_backward=true"
    args.gradient_accumulation_steps, args.world_size, args.fp16 = 1, 2, False
    with pytest.raises(ValueError, match="step_in_backward = true does not go with FSDP under the Trainer"):
        hf._make(SimpleNamespace(args=args, model=llama()))


def test_a_module_that_is_not_there_exits_2(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(START.format(root=str(ROOT)))
    for line in (["-m"], ["-m", "no.module"], ["-m", "no_module"]):
        (done,) = Forked(str(script), line, tmp_path).wait()
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("ds_fira.run: ")
