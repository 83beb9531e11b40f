"""Checkpoints of earlier versions: how they were made, and what the ranks of a test pool run to load them.

`python -m tests.distributed.old_jobs FOLDER` writes a set with the code of today; `tests/data/checkpoints_0.1.0.tar.xz`
holds the set that version 0.1.0 wrote. Each case is a folder with DeepSpeed's files and, for every rank,
`expected-RANK.pt`: what the run held when it saved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import ds_fira
from ds_fira.optim.registry import fira_of
from tests.distributed.probes import stepped_tensors
from tests.distributed.resize_jobs import ROWS, advance
from tests.distributed.rule_jobs import AdaGrad
from tests.distributed.zero_jobs import Net, build, config

# On two ranks some of these are cut, and ranks 2 and 8 lie below and above their smaller sides.
SHAPES = [(8, 6), (8, 6), (8, 6), (6, 12), (6, 6), (3, 40)]
STEPS = 4
SETTINGS: dict[str, Any] = {"lr": 0.01, "rank": 2, "update_proj_gap": 3, "alpha": 0.5, "weight_decay": 0.1}
# One type for each: Adam, Adam without a residual, a rule with a state of every kind.
FiraAdaGrad = ds_fira.plug(AdaGrad)
ds_fira.register(FiraAdaGrad)
TYPES = ("FiraAdam", "GaLoreAdam", "FiraAdaGrad")
EXPECTED = "expected-{}.pt"
ALONE = "alone.pt"


@dataclass(frozen=True)
class Case:
    """One run that was saved.

    Attributes:
        optimizer: the type in the DeepSpeed config.
        stage: of ZeRO.
        dtype: of the module.
        state_dtype: of the states.
        world_size: ranks.
        settings: of the optimizer, beside `SETTINGS`.
        extra: of the DeepSpeed config.
        name: of the folder.
    """

    optimizer: str
    stage: int
    dtype: str
    state_dtype: str
    world_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed config."""
        params = {**SETTINGS, "state_dtype": self.state_dtype, **self.settings}
        made = config(self.stage, self.dtype, params, **self.extra)
        made["optimizer"]["type"] = self.optimizer
        made["train_micro_batch_size_per_gpu"] = ROWS // self.world_size
        return made


def _cases() -> Iterator[Case]:
    dtypes = {0: "fp32", 1: "bf16", 2: "bf16", 3: "bf16"}
    for optimizer in TYPES:
        for stage, dtype in dtypes.items():
            for state_dtype in ("float32", "int8"):
                for size in (1, 2):
                    name = f"{optimizer}-zero{stage}-{state_dtype}-{size}"
                    yield Case(optimizer, stage, dtype, state_dtype, size, name=name)
    # The other wrappers of DeepSpeed, and what their files hold beside tensors.
    masters = {"data_types": {"grad_accum_dtype": "fp32"}}
    yield Case("FiraAdam", 0, "bf16", "float32", 2, name="stage 0 in bf16")
    yield Case("FiraAdam", 1, "bf16", "float32", 2, extra=masters, name="BF16_Optimizer")
    yield Case("FiraAdam", 2, "fp16", "bfloat16", 2, name="loss scale")
    yield Case("FiraAdam", 2, "bf16", "float32", 2, settings={"exact_cuts": True}, name="whole cuts")
    # A rank that no matrix is too small for was projected all the same.
    for stage, dtype in dtypes.items():
        yield Case("FiraAdam", stage, dtype, "float32", 2, settings={"rank": 8}, name=f"full rank-zero{stage}")


CASES = {case.name: case for case in _cases()}


@contextmanager
def engine_of(case: Case, seed: int) -> Iterator[Any]:
    """An engine with a schedule, ended behind."""
    torch.manual_seed(seed)
    model = Net(SHAPES)
    model.register_buffer("counted", torch.full((3,), float(seed)))
    schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (1 + step))  # noqa: E731
    engine = build(case.ds_config, SHAPES, seed=seed, model=model, lr_scheduler=schedule)
    yield engine
    del model
    engine.destroy()


def save_case(name: str, folder: str) -> None:
    """Train, save, and write down what was saved."""
    with engine_of(CASES[name], 0) as engine:
        advance(engine, 0, STEPS)
        engine.save_checkpoint(f"{folder}/{name}", "kept", client_state={"note": name})
        torch.save(contents(engine), Path(folder, name, EXPECTED.format(torch.distributed.get_rank())))


def load_case(name: str, folder: str) -> dict[str, Any]:
    """Load into a new engine; what it then holds, how losses go on, and what was expected."""
    with engine_of(CASES[name], 7) as engine:
        path, client_state = engine.load_checkpoint(f"{folder}/{name}")
        found = {"found": contents(engine), "tag": Path(path).parent.name if Path(path).suffix else Path(path).name}
        found |= {"client_state": client_state["note"], "losses": advance(engine, STEPS, STEPS + 3)}
    found["expected"] = torch.load(Path(folder, name, EXPECTED.format(torch.distributed.get_rank())), weights_only=True)
    return found


def contents(engine: Any) -> dict[str, Any]:
    """What a run goes on from: tensors by name, and numbers."""
    optimizer = fira_of(engine)
    module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        found: dict[str, Any] = {f"module {name}": value for name, value in module.state_dict().items()}
        found = {name: value.detach().clone() for name, value in found.items()}
    for i, param in enumerate(stepped_tensors(engine)):
        found[f"stepped {i}"] = param.detach().clone()
        found |= {f"state {i} {key}": value.clone() for key, value in optimizer.state[param].items()}
    found["lr"] = [float(group["lr"]) for group in optimizer.param_groups]
    found["counts"] = [engine.global_steps, engine.global_samples, engine.skipped_steps]
    found["schedule"] = engine.lr_scheduler.last_epoch
    found["random"] = torch.get_rng_state()
    found["metrics"] = {
        key: value for key, value in ds_fira.metrics(engine).items() if isinstance(value, int) and "bytes" not in key
    }
    return found


def alone(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    """A run without an engine."""
    torch.manual_seed(seed)
    model = Net(SHAPES)
    groups = ds_fira.param_groups(model, rank=2, target_modules=["layers"], alpha=0.5, update_proj_gap=3)
    return model, ds_fira.FiraAdam(groups, lr=0.01)


def step_alone(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Optimizer steps without an engine."""
    for step in steps:
        optimizer.zero_grad()
        model(torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


def states_alone(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The states by position and key."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {f"{i} {key}": value for i, param in enumerate(params) for key, value in optimizer.state[param].items()}


def save_all(folder: Path) -> None:
    """Write every case, by ranks in processes of their own."""
    from tests.ranks import Pools

    pools = Pools()
    for name, case in CASES.items():
        pools.run(case.world_size, "save_case", "tests.distributed.old_jobs", name=name, folder=str(folder))
        for script in (folder / name).glob("*.py"):  # DeepSpeed's own
            script.unlink()
    pools.close()
    model, optimizer = alone(0)
    step_alone(model, optimizer, range(STEPS))
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "states": states_alone(optimizer)}
    torch.save(kept, folder / ALONE)


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
