"""The Hugging Face examples for the tests: a small model and text, and what the ranks of a test pool run."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_fira.optim.registry import fira_of
from ds_fira.tools import models

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PROGRAMS = Path(sys.executable).parent
MODEL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
MATRICES = 14  # seven in each of the two layers


def write_inputs(folder: Path, letters: int = 500) -> None:
    """Into an empty folder: `model.json`, and `text.txt`, eleven documents of so many letters by this project."""
    text = " ".join((ROOT / "docs" / "design.md").read_text().split())[: 11 * letters]
    documents = [text[start : start + letters] for start in range(0, len(text), letters)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = json.loads(Path(models.config_file("llama_60m")).read_text())
    (folder / "model.json").write_text(json.dumps(config | MODEL | heads))


def write_config(path: Path, base: str, top: dict[str, Any] | None = None, **params: Any) -> Path:
    """A DeepSpeed JSON of the repository with other values at the top and in the optimizer's block; None removes."""
    config = json.loads((ROOT / "ds_configs" / base).read_text()) | (top or {})
    block = {"rank": 8, "update_proj_gap": 2, **params}
    config["optimizer"]["params"] |= block
    for name, value in block.items():
        if value is None:
            del config["optimizer"]["params"][name]
    path.write_text(json.dumps(config))
    return path


def optimizer_states(folder: Path) -> list[dict[str, Any]]:
    """What DeepSpeed saved of the optimizer in a checkpoint's folder, by rank."""
    return [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in states_files(folder)]


def states_files(folder: Path) -> list[Path]:
    """The files `optimizer_states` reads."""
    return sorted(folder.glob("*_optim_states.pt"))


@contextlib.contextmanager
def example(name: str) -> Iterator[Any]:
    """An example's module; afterwards accelerate is as if it had never been used in this process."""
    from accelerate.state import AcceleratorState

    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def train(arguments: list[str]) -> dict[str, Any]:
    """Run examples/hf_trainer.py; returns its log, its figures and facts about the engine's FiraAdam."""
    with example("hf_trainer") as module:
        trainer = module.build(*module.parse(arguments))
        metrics = module.run(trainer)
        optimizer = fira_of(trainer.model_wrapped)
        result = {
            "history": trainer.state.log_history,
            "metrics": metrics,
            "lrs": sorted({group["lr"] for group in optimizer.param_groups}),
            "steps": sorted({int(state["step"].max()) for state in optimizer.state.values()}),
            "devices": sorted({param.device.type for group in optimizer.param_groups for param in group["params"]}),
            "best": trainer.state.best_model_checkpoint,
        }
        trainer.accelerator.free_memory()
    return result


def fails_in_training(arguments: list[str]) -> str:
    """What examples/hf_trainer.py raises where a callback raises at the end of the first step."""
    from transformers import TrainerCallback

    class Breaks(TrainerCallback):
        def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
            raise ValueError(f"the data broke in step {state.global_step}")

    with example("hf_trainer") as module:
        trainer = module.build(*module.parse(arguments))
        trainer.add_callback(Breaks())
        try:
            module.run(trainer)
        except (ValueError, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            trainer.accelerator.free_memory()
    return "trained"


def complaints(command_lines: list[list[str]]) -> list[str]:
    """What examples/hf_trainer.py says to wrong command lines, before it trains."""
    return [_complaint("hf_trainer", arguments) for arguments in command_lines]


def accelerate_complaints(command_lines: list[list[str]]) -> list[str]:
    """What examples/accelerate_train.py says to wrong command lines, before it trains."""
    return [_complaint("accelerate_train", arguments) for arguments in command_lines]


def _complaint(name: str, arguments: list[str]) -> str:
    with example(name) as module:
        try:
            if name == "hf_trainer":
                module.build(*module.parse(arguments))
            else:
                module.start(module.parse(arguments))
        except (OSError, ValueError) as error:
            return str(error)
    return ""


def accelerate_train(arguments: list[str]) -> None:
    """Run examples/accelerate_train.py up to its end."""
    with example("accelerate_train") as module:
        options = module.parse(arguments)
        accelerator = module.start(options)
        module.set_seed(options.seed)
        module.run(
            accelerator, options, module.load(options.model, options.text, options.seq_length, options.cache_dir)
        )
        accelerator.free_memory()
