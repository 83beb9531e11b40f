"""What a training leaves behind for others: fp32 weights by DeepSpeed's script, and transformers' own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

import ds_fira
from tests import small_models
from tests.distributed.zero_jobs import config
from tests.integration.model_jobs import batches
from tests.programs import Forked
from tests.ranks import Pools

STEPS = 4
TIED = ("llama_tied", "gpt2")
PARAMS = {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "alpha": 0.5}
CASES = {
    "stage 1": ("llama", 1, {}),
    "stage 2, cut matrices, tied head": ("llama_tied", 2, {}),
    "stage 2, Conv1D, tied head": ("gpt2", 2, {}),
    "stage 2, experts, offload": ("mixtral", 2, {"zero_offload_optimizer": {"device": "cpu"}}),
}


def train_and_save(ranks: Pools, folder: Path, case: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    """What `tests.integration.model_jobs.save` gives on two ranks."""
    kind, stage, extra = case
    ds_config = config(stage, "bf16", PARAMS, train_micro_batch_size_per_gpu=4, **extra)
    arguments = {"kind": kind, "ds_config": ds_config, "steps": STEPS, "folder": str(folder)}
    return ranks.run(2, "save", module="tests.integration.model_jobs", **arguments)


@pytest.fixture(scope="module", params=CASES)
def saved(
    ranks: Pools, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[dict[str, Any]]]:
    """The kind of model, the folder and what the two ranks had in memory when they saved."""
    folder = tmp_path_factory.mktemp("saved")
    return CASES[request.param][0], folder, train_and_save(ranks, folder, CASES[request.param])


def masters(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The fp32 master weights by name, from the partitions and from where the module's parameters really lie."""
    found = {}
    for i, group in enumerate(results[0]["groups"]):
        flat = torch.cat([result["partitions"][i] for result in results])
        for name, shape, offset in group["members"]:
            found[name] = flat[offset : offset + torch.Size(shape).numel()].view(shape)
    return found


# The script is a process of its own, so for two kinds; what it calls is tested for every kind below.
@pytest.mark.parametrize("saved", list(CASES)[:2], indirect=True)
def test_fp32_weights_by_the_script_in_the_checkpoint(saved: tuple[str, Path, list[dict[str, Any]]]) -> None:
    """`python zero_to_fp32.py`: the masters to the bit; transformers loads them and FiraAdam trains on."""
    kind, folder, results = saved
    expected = masters(results)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in expected.values())
    exported = folder / "fp32"
    arguments = [str(folder / "state"), str(exported)]
    if kind not in TIED:  # the script cannot write a weight of two names as safetensors
        arguments.append("--safe_serialization")
    (done,) = Forked(str(folder / "state" / "zero_to_fp32.py"), arguments, folder, "export").wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if kind in TIED:
        weights = torch.load(exported / "pytorch_model.bin", weights_only=True)
    else:
        weights = load_file(exported / "model.safetensors")
    assert weights.keys() == expected.keys() | ({"lm_head.weight"} if kind in TIED else set())
    for name, weight in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight), name

    transformers.AutoConfig.from_pretrained(folder / "model").save_pretrained(exported)
    model = loaded(exported, torch.float32)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    continues(model, results)


def test_fp32_weights_in_memory(saved: tuple[str, Path, list[dict[str, Any]]]) -> None:
    """`get_fp32_state_dict_from_zero_checkpoint` fills a model whose keys are neither more nor fewer."""
    kind, folder, results = saved
    expected = masters(results)
    state_dict = get_fp32_state_dict_from_zero_checkpoint(str(folder / "state"))
    model = getattr(small_models, kind)()
    model.load_state_dict({name: weight.contiguous() for name, weight in state_dict.items()}, strict=True)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_save_pretrained(saved: tuple[str, Path, list[dict[str, Any]]]) -> None:
    """The module's bf16 weights to the bit, the head tied where it was, and training goes on."""
    _, folder, results = saved
    model = loaded(folder / "model", torch.bfloat16)
    named = dict(model.named_parameters())
    assert named.keys() == results[0]["module"].keys()
    for name, weight in named.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, results[0]["module"][name]), name
    continues(loaded(folder / "model", torch.float32), results)


def test_fp32_weights_of_a_running_engine(saved: tuple[str, Path, list[dict[str, Any]]]) -> None:
    """`safe_get_full_fp32_param` gives the masters on every rank, of projected weights too."""
    _, _, results = saved
    expected = masters(results)
    for result in results:
        assert result["safe"].keys() == expected.keys()
        for name, weight in result["safe"].items():
            assert torch.equal(weight, expected[name]), name


def loaded(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A model as transformers loads it, with nothing missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == model.config.tie_word_embeddings
    return model


def continues(model: torch.nn.Module, results: list[dict[str, Any]]) -> None:
    """The model starts at the loss where training ended, and FiraAdam lowers it."""
    tokens = batches(STEPS, 0)[-1]
    optimizer = ds_fira.FiraAdam(ds_fira.param_groups(model.train(), rank=4, alpha=0.5), lr=0.01)
    losses = []
    for _ in range(STEPS):
        loss = small_models.loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(results[0]["loss"], rel=0.01)  # which was computed in bf16
    assert losses[-1] < losses[0]


def test_stage_1_with_fp32_accumulation_has_no_fp32_export(ranks: Pools, tmp_path: Path) -> None:
    """DeepSpeed's BF16_Optimizer saves no stage, which `zero_to_fp32` asks for; docs/configs.md says what to do."""
    case = ("llama", 1, {"data_types": {"grad_accum_dtype": "fp32"}})
    results = train_and_save(ranks, tmp_path, case)
    with pytest.raises(ValueError, match="is not a zero checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "state"))
    expected = masters(results)
    for result in results:
        assert all(torch.equal(weight, expected[name]) for name, weight in result["safe"].items())
    continues(loaded(tmp_path / "model", torch.float32), results)


def test_round_robin_gradients_mislead_readers_of_a_running_engine(ranks: Pools, tmp_path: Path) -> None:
    """Why ds_configs leave it off: the export is right, DeepSpeed's `safe_get_full_fp32_param` is not."""
    results = train_and_save(ranks, tmp_path, ("llama", 2, {"zero_round_robin_gradients": True}))
    expected = masters(results)
    exported = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "state"))
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    assert not all(torch.equal(results[0]["safe"][name], weight) for name, weight in expected.items())
