"""`ds-fira estimate`: its formulas by hand, its command, its errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_fira.__main__ import main
from ds_fira.optim.presets import ModelSize, preset_mark, transferred_scale, values_of
from ds_fira.tools.dry_run import FlatBuffer, plan_run
from ds_fira.tools.estimate import (
    CARDS,
    Available,
    Setup,
    available_memory,
    card_memory,
    estimate,
    fits,
    load_model,
    require_fit,
)
from ds_fira.tools.models import config_file

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 500,
}
MATRICES = [(64, 64)] * 8 + [(176, 64)] * 4 + [(64, 176)] * 2
REST = 2 * 500 * 64 + 5 * 64
ALL = sum(m * n for m, n in MATRICES) + REST


def small_model() -> torch.nn.Module:
    """A LLaMA of 0.16M weights on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))


def test_stage_0_by_hand() -> None:
    """One GPU, bf16: every category of every method."""
    rank = 16
    found = estimate(small_model(), Setup(zero_stage=0, seq_length=8), rank=rank).methods
    low_rank = sum(rank * min(s) + 2 * rank * max(s) for s in MATRICES)
    adapters = sum(rank * sum(s) for s in MATRICES)
    adamw, galore, lora, fira = (found[name].largest.device for name in ("AdamW", "GaLore", "LoRA", "Fira"))
    for memory in (adamw, galore, fira):
        assert (memory.parameters, memory.gradients, memory.master_weights) == (2 * ALL, 2 * ALL, 4 * ALL)
        assert memory.step_copies == 4 * ALL
    assert (lora.parameters, lora.gradients, lora.master_weights) == (2 * (ALL + adapters), 2 * adapters, 4 * adapters)
    tensors = 2 + 5 + len(MATRICES)
    assert adamw.optimizer_states == 8 * ALL + 4 * tensors
    assert lora.optimizer_states == 8 * adapters + 4 * 2 * len(MATRICES)
    counters = 16 * len(MATRICES) + 8 * (2 + 5)
    assert fira.optimizer_states == 4 * (low_rank + len(MATRICES)) + 8 * REST + counters
    assert fira.optimizer_states - galore.optimizer_states == 4 * len(MATRICES)


def test_stage_2_by_hand() -> None:
    """AdamW on four ranks: an even share, padded; the last rank's gradients are those of whole parameters."""
    setup = Setup(gpus=4, zero_stage=2, reduce_bucket_size=1000, seq_length=8)
    memory = estimate(small_model(), setup, ["AdamW"], rank=16).methods["AdamW"].by_rank
    share = math.ceil(ALL / 8) * 2
    assert [m.device.master_weights for m in memory] == [4 * share] * 4
    assert [m.device.optimizer_states for m in memory] == [8 * share + 4] * 4
    assert [m.device.parameters for m in memory] == [2 * 4 * share] * 4
    assert [m.device.backward_buffers for m in memory] == [2 * 1000] * 4
    assert [m.device.step_copies for m in memory] == [6 * share] * 4
    assert memory[3].device.gradients >= 2 * 500 * 64  # the head lies in the last partition
    assert sum(m.device.gradients for m in memory) > 2 * ALL


def test_gradients_held_are_of_the_parameters_that_touch_a_partition() -> None:
    """Ten elements on two ranks, padded to twelve: the boundary at six cuts the middle parameter."""
    buffer = FlatBuffer.of((4, 4, 2), ranks=2, zero_stage=2)
    assert (buffer.partition_size, buffer.padded) == (6, 12)
    assert [buffer.held(0), buffer.held(1)] == [8, 6]
    assert FlatBuffer.of((4, 4, 2), ranks=2, zero_stage=0).held(0) == 10


@pytest.mark.parametrize("changed", [{}, {"residual": "normalized"}, {"residual": "normalized", "scaling": "matrix"}])
@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_ranks_hold_what_one_process_would(gpus: int, changed: dict[str, str]) -> None:
    """Over all ranks, cut matrices stepped whole: the paper's formula, counters and padding."""
    run = plan_run(small_model(), gpus, 2, rank=16, exact_cuts=True, **changed)
    held = sum(run.state_bytes(rank, torch.float32) for rank in range(gpus))
    formula = 4 * sum(record.state_elements for record in run.records)
    padding = 8 * 2 * gpus * len(run.groups)
    assert formula <= held <= formula + 16 * len(MATRICES) + 8 * gpus * len(run.groups) + padding


def test_offload_leaves_weights_and_buffers_on_the_gpu() -> None:
    setup = Setup(gpus=2, zero_stage=2, offload=True, reduce_bucket_size=1000, seq_length=8)
    memory = estimate(small_model(), setup, ["Fira"], rank=16).methods["Fira"].by_rank[0]
    assert (memory.device.master_weights, memory.device.optimizer_states, memory.device.gradients) == (0, 0, 0)
    assert memory.device.parameters >= 2 * ALL
    assert memory.host.master_weights == memory.host.gradients > 0 < memory.host.optimizer_states


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    available = Available(2 * 10**9)
    method = estimate(small_model(), Setup(seq_length=512), ["Fira"], rank=16).methods["Fira"]
    most = method.largest_batch(available)
    assert most > 1
    assert fits(method.with_batch(most), available)
    assert not fits(method.with_batch(most + 1), available)
    assert method.largest_batch(Available(1000)) == 0


def test_a_model_too_large_for_the_memory_is_refused() -> None:
    """What the pre-training script asks: with the GPU's memory, with the host's, and on a CPU, where they are one."""
    method = estimate("llama_60m", Setup(offload=True, seq_length=256), ["Fira"], rank=128).methods["Fira"]
    device, host = method.largest.device.total, method.largest.host.total
    require_fit(method, Available(2 * device, 2 * host))
    require_fit(method, Available(2 * (device + host), shared=True))
    for available in (
        Available(device, 2 * host),
        Available(2 * device, host - 1),
        Available(device + host, shared=True),
    ):
        with pytest.raises(ValueError, match=r"GiB .* use a smaller model"):
            require_fit(method, available)


def test_available_memory_is_shared_by_local_processes() -> None:
    one, four = available_memory(1), available_memory(4)
    assert four.host == pytest.approx(one.host / 4, rel=0.2)
    assert one.shared == (not torch.cuda.is_available())


def test_cards_and_sizes() -> None:
    assert card_memory("a100-40") == CARDS["a100-40"] * 2**30
    assert card_memory("RTX 4090") == card_memory("4090") == CARDS["rtx4090"] * 2**30
    assert card_memory("12.5") == 12.5 * 2**30


def test_models_by_name_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_file("llama_60m").read_text())
    sizes = {
        sum(p.numel() for p in load_model(m).parameters()) for m in ("llama_60m", tmp_path, tmp_path / "config.json")
    }
    assert sizes == {58_073_600}


def test_other_architectures_are_estimated_without_activations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """GPT-2: Conv1D weights and a tied head."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}))
    assert main(["estimate", "--model", str(tmp_path), "--rank", "8", "--gpu-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "8 projected matrices" in text
    assert "Activations are left out" in text
    assert "'gpt2'" in text


LEGAL = ["--model", "llama_60m", "--rank", "128"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "8"], "--model is missing"),
        (["--model", "llama_60m"], "--rank is missing"),
        (["--model", "llama_2b", "--rank", "8"], "--model = 'llama_2b'.* choose one of llama_60m"),
        (["--model", "no/such.json", "--rank", "8"], "config file that does not exist"),
        (["--model", "llama_60m", "--rank", "4096"], "--rank = 4096 is larger .* 512"),
        (["--model", "llama_60m", "--rank", "0"], "rank = 0 is not legal"),
        ([*LEGAL, "--gpu-memory", "h1000"], "--gpu-memory = 'h1000'.*did you mean 'h100'"),
        ([*LEGAL, "--gpu-memory", "-3"], "--gpu-memory = '-3'"),
        ([*LEGAL, "--gpus", "0"], "--gpus = 0 "),
        ([*LEGAL, "--batch-size", "0"], "--batch-size = 0 "),
        ([*LEGAL, "--zero-stage", "3"], "--zero-stage = 3 .* choose 0, 1 or 2"),
        ([*LEGAL, "--zero-stage", "7"], "--zero-stage = 7 "),
        ([*LEGAL, "--offload", "--zero-stage", "0"], "--offload needs ZeRO"),
        ([*LEGAL, "--master-weights", "none"], "--master-weights = 'none'"),
        ([*LEGAL, "--master-weights", "bf16", "--dtype", "fp16"], "--master-weights = 'bf16' needs"),
        ([*LEGAL, "--accumulation-dtype", "fp32", "--zero-stage", "0"], "--accumulation-dtype = 'fp32'"),
        ([*LEGAL, "--target-modules", "nothing"], "target_modules = .'nothing'. match no linear module"),
        ([*LEGAL, "--json", "/dev/null/x.json"], "--json = '/dev/null/x.json' cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["estimate", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert error.startswith("ds-fira estimate: ")
    assert re.search(words, error), error


def test_what_a_preset_gives_is_said_beside_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a model of the paper, by the command; and where a run names it, with what the run sets instead."""
    written = tmp_path / "estimate.json"
    main(["estimate", "--model", "llama_130m", "--rank", "128", "--methods", "Fira", "--json", str(written)])
    given = preset_mark("recommended", [(f"{layer}.weight", (768, 768), 128) for layer in range(12)])
    size = {"width": 768, "depth": 12, "rank": 128}
    step = given["lr"] * given["alpha"] * given["residual_scale"]
    assert re.search(
        rf"^- preset recommended: lr {given['lr']:.3g}, .*residual_scale {given['residual_scale']:.3g}, "
        rf"residual_warmup {given['residual_warmup']} \(width 768, depth 12, rank 128\): "
        rf"outside the subspace an element steps by {step:.3g}$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert json.loads(written.read_text())["presets"] == {"recommended": {**values_of(given), **size}}
    found = estimate(small_model(), methods=["Fira"], rank=16, preset="recommended", lr=0.5)
    scale = transferred_scale(ModelSize(width=64, depth=2, rank=16))
    assert (
        found.presets["recommended"].items()
        >= {"lr": 0.5, "residual_scale": scale, "width": 64, "depth": 2, "rank": 16}.items()
    )
    (values,) = estimate(small_model(), methods=["Fira"], rank=16).presets.values()
    explicit = {name: value for name, value in values.items() if name not in size}
    plain = estimate(small_model(), methods=["Fira"], rank=16, **explicit)
    assert found.methods["Fira"].by_rank == plain.methods["Fira"].by_rank
    assert estimate(small_model(), methods=["AdamW"], rank=16).presets == {}
    assert estimate(small_model(), methods=["Fira"], optimizer="FiraRMSProp", rank=16).presets == {}
