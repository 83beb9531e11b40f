"""trl's own training script, unedited, started by `ds_fira.run -m trl.scripts.sft`, with the optimizer by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from examples.pretraining.tokenization import train_tokenizer
from tests.programs import ROOT, Forked

START = "import sys; sys.path.insert(0, {root!r}); from ds_fira.run import main; main(sys.argv[1:])"


def write_inputs(folder: Path) -> None:
    """A model of a few thousand parameters with its tokenizer, and a data set of texts, as folders."""
    texts = [f"the matrix {number} is projected by its basis" for number in range(16)]
    tokenizer = train_tokenizer(texts * 3, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    zero = {"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    (folder / "ds.json").write_text(json.dumps({**sizes, **zero}))


@pytest.mark.full
def test_trl_s_script_trains_with_fira_adam_by_name(tmp_path: Path) -> None:
    """Under DeepSpeed on two ranks: a wrong setting is refused by FiraAdam's sentence, a right one trains."""
    pytest.importorskip("trl", reason="pip install trl")
    write_inputs(tmp_path)
    script = tmp_path / "start.py"
    script.write_text(START.format(root=str(ROOT)))
    values = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "deepspeed": tmp_path / "ds.json",
        "optim": "fira_adamw",
        "learning_rate": 0.01,
        "max_length": 32,
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": "False",
        "bf16": "False",
        "use_cpu": "True",
        "report_to": "none",
        "save_strategy": "no",
    }
    line = ["-m", "trl.scripts.sft", *(item for key, value in values.items() for item in (f"--{key}", str(value)))]

    def start(name: str, optim_args: str) -> list[object]:
        return Forked(str(script), [*line, "--optim_args", optim_args], tmp_path, name, ranks=2).wait()

    right = start("right", "rank=4,alpha=0.5")
    for done in right:
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", right[0].stdout)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for done in start("wrong", "rank=4,alhpa=0.5"):
        assert done.returncode == 1
        assert "did you mean 'alpha'" in done.stderr
