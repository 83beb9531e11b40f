"""DeepSpeed's `ds_to_universal` in processes of its own, and what lies in the folder that it makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

from tests.programs import run, run_code

UNIVERSAL = {"checkpoint": {"load_universal": True}}
CONVERTER = "deepspeed.checkpoint.ds_to_universal"
# A fork of a process that has imported this package: the converter gets to see none of it.
_WITHOUT_THIS_PACKAGE = f"""
import runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] == "ds_fira"]:
    sys.modules[name] = None
runpy.run_module({CONVERTER!r}, run_name="__main__")
"""


def convert(folder: Path, tag: str, work: Path, shell: bool = False) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Convert a checkpoint by DeepSpeed's command.

    Args:
        folder: of checkpoints.
        tag: of the one.
        work: gets a folder of checkpoints with nothing but the universal one.
        shell: whether a new interpreter runs the command, with its own number of workers.

    Returns:
        That folder, and how the command ended.
    """
    target = work / "universal"
    arguments = ["--input_folder", str(folder / tag), "--output_folder", str(target / tag)]
    work.mkdir(parents=True, exist_ok=True)
    if shell:
        return target, run(["python", "-m", CONVERTER, *arguments], work)
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    return target, run_code(_WITHOUT_THIS_PACKAGE, [*arguments, *workers], work)


def inject(folder: Path, tag: str) -> None:
    """Add what the converter asks a script to have put into its client state, as DeepSpeed's own tests do."""
    path = folder / tag / "mp_rank_00_model_states.pt"
    if path.is_file():
        content = torch.load(path, weights_only=False)
        torch.save({**content, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}, path)


def damaged(universal: Path, work: Path, name: str, how: str) -> Path:
    """A copy of a folder with a universal checkpoint, one file or folder of which is harmed."""
    copy = shutil.copytree(universal, work / f"{how}-{name.replace('/', '-')}")
    (path,) = copy.glob(f"*/{name}")
    if how == "gone":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        content = bytearray(path.read_bytes())
        value = torch.load(path, weights_only=False)
        value = value["param"] if isinstance(value, dict) else value
        place = bytes(content).index(value.detach().numpy().tobytes())
        content[place + 5] ^= 1
        path.write_bytes(content)
    return copy


# DeepSpeed alone, with its AdamW and the model of `zero_jobs`; it would compile an operator for a minute.
ALONE = """
import os, sys
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
import deepspeed
from torch import nn
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
model = nn.Module()
model.embedding, model.norm, model.lm_head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in eval(sys.argv[3]))
optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
settings = {"zero_optimization": {"stage": 2}, "checkpoint": {"load_universal": True}, "optimizer": optimizer}
deepspeed.init_distributed("gloo")
given = {"model": model, "model_parameters": list(model.parameters())}
engine, *_ = deepspeed.initialize(**given, config={**settings, "train_micro_batch_size_per_gpu": 2})
assert "ds_fira" not in sys.modules
engine.load_checkpoint(sys.argv[1])
"""
