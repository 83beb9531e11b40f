"""What people copy from `examples/`: its shape, and the short scripts and the notebook run as they stand.

The Trainer's, accelerate's and the pre-training example have tests of their own.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from examples.pretraining.tokenization import train_tokenizer
from tests.integration.hf_jobs import EXAMPLES, ROOT, write_inputs
from tests.programs import Forked, run_code

MOST_FILES, LONGEST = 8, 150
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def top_level() -> list[Path]:
    """The files that a visitor of the folder sees."""
    return sorted(path for path in EXAMPLES.iterdir() if path.is_file())


def ended_well(done: subprocess.CompletedProcess[str]) -> str:
    """What a program printed, after it ended well."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(said: str) -> list[float]:
    """Those of lines such as `step 20: loss 2.5`."""
    return [float(value) for value in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE)]


def test_the_folder_is_short_and_each_file_opens_with_its_command() -> None:
    assert len(top_level()) <= MOST_FILES
    for path in top_level():
        if path.suffix == ".py":
            text = path.read_text()
            assert len(text.splitlines()) < LONGEST, path.name
            shows, _, commands = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
            assert shows.endswith((".", ":")), path.name
            assert f"examples/{path.name}" in commands, path.name


def test_each_example_is_tested() -> None:
    """By a test that names it."""
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "integration").glob("*.py"))
    for path in top_level():
        assert re.search(rf"\b{path.stem}\b", tests), path.name


def test_plain_pytorch(tmp_path: Path) -> None:
    small = ["--steps", "40", "--width", "32", "--length", "32", "--rank", "8", "--batch-size", "8"]
    script = str(EXAMPLES / "pytorch_train.py")
    said = ended_well(Forked(script, small, tmp_path).wait()[0])
    first, last = losses(said)
    assert last < first < 5.6  # log(256) is 5.55
    held, of_adamw = (int(value.replace(",", "")) for value in re.findall(r"([\d,]{4,})(?: bytes|;)", said))
    assert held < of_adamw
    (done,) = Forked(script, [*small, "--text", "none.txt"], tmp_path, "wrong").wait()
    assert done.returncode == 2
    assert done.stderr.endswith("--text none.txt is no file of more than 32 bytes; give another\n")


def test_own_rule_on_two_ranks(tmp_path: Path) -> None:
    script = str(EXAMPLES / "own_rule.py")
    said = [ended_well(done) for done in Forked(script, ["--steps", "60"], tmp_path, ranks=2).wait()]
    found = losses(said[0])
    assert len(found) == 3
    assert found[-1] < found[0]
    assert "2 projected matrices, 4 bases computed" in said[0]
    assert "loss" not in said[1]


@pytest.mark.full
def test_own_rule_names_a_wrong_setting_on_every_rank(tmp_path: Path) -> None:
    wrong = Forked(str(EXAMPLES / "own_rule.py"), ["--rank", "0"], tmp_path, ranks=2).wait()
    assert [done.returncode for done in wrong] == [2, 2]
    assert all("own_rule.py: error: FiraLion" in done.stderr and "rank = 0" in done.stderr for done in wrong)


@pytest.mark.full
def test_trl_sft(tmp_path: Path) -> None:
    """On two ranks, a small model and prompts with completions: the adapters' factors are projected, and it learns."""
    pytest.importorskip("trl", reason="pip install trl")
    write_inputs(tmp_path)
    tokenizer = train_tokenizer((tmp_path / "text.txt").read_text().split("\n\n"), 300)
    config = AutoConfig.from_pretrained(tmp_path / "model.json")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the matrix {number} is", "completion": " projected by its basis"} for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": "model",
        "data": "rows.jsonl",
        "output_dir": "sft",
        "lora_rank": 8,
        "rank": 4,
        "max_length": 32,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    options = [item for name, value in settings.items() for item in (f"--{name}", str(value))]
    script = str(EXAMPLES / "trl_sft.py")
    said = ended_well(Forked(script, options, tmp_path, ranks=2).wait()[0])
    first, last = map(float, re.findall(r"loss ([\d.]+) to ([\d.]+);", said)[0])
    assert last < first
    assert "20 factors projected" in said  # q, k, v, up, down of two layers, two factors each
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    wrong = Forked(script, [*options, "--rank", "8"], tmp_path, "wrong").wait()[0]
    assert wrong.returncode == 2
    assert "--rank 8 is not below --lora_rank 8" in wrong.stderr


def code_cells() -> list[str]:
    """The code of the notebook."""
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_the_notebook_is_clean_and_its_cells_run(tmp_path: Path) -> None:
    """No outputs in the repository; as one script, with few steps."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs"), "clear the outputs before a commit"
        assert cell.get("execution_count") is None
    code = "\n".join(code_cells())
    assert code.count("STEPS = 150") == 1
    small = code.replace("STEPS = 150", "STEPS = 3").replace("LENGTH, BATCH = 128, 16", "LENGTH, BATCH = 32, 2")
    said = ended_well(run_code(small, [], tmp_path, {"MPLBACKEND": "agg"}))
    held = [int(value.replace(",", "")) for value in re.findall(r"([\d,]+) bytes of state", said)]
    assert held[1] < held[0]


@pytest.mark.full
def test_the_notebook_teaches_what_it_says(tmp_path: Path) -> None:
    """As it stands, in a Jupyter kernel where there is one: both optimizers learn, from the same start."""
    try:
        import nbclient
        import nbformat
    except ImportError:
        said = ended_well(run_code("\n".join(code_cells()), [], tmp_path, {"MPLBACKEND": "agg"}))
    else:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        said = "".join(output.get("text", "") for output in outputs)
    (first, adamw), (same, fira) = (map(float, each) for each in re.findall(r"loss ([\d.]+) to ([\d.]+)", said))
    assert first == same
    assert max(adamw, fira) < 0.6 * first


def test_commands_in_a_new_interpreter_name_what_is_missing(tmp_path: Path) -> None:
    """Trl is an optional package: without it the script says what to install."""
    blocked = "import runpy, sys; sys.modules['trl'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_code(blocked, [str(EXAMPLES / "trl_sft.py")], tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"trl_sft\.py: error: .*trl.* is missing: pip install trl peft datasets\n", done.stderr)
