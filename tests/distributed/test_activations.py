"""Activation checkpointing by transformers and by DeepSpeed's block: the same gradients, less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import ds_fira
from tests.distributed.activation_jobs import BLOCK, PlainNet, language_model
from tests.grids import half
from tests.ranks import Pools

JOBS = "tests.distributed.activation_jobs"


def checkpoints_layers(model: nn.Module) -> bool:
    """Whether transformers' layers are set to recompute."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    ("method", "kind", "dtype"), half(["transformers", "deepspeed"], ["llama", "gpt2", "mixtral"], ["fp32", "bf16"])
)
def test_gradients_equal_to_the_bit(ranks: Pools, kind: str, method: str, dtype: str) -> None:
    """With dropout; Mixtral's auxiliary loss comes from router logits, which hooks take out of the layers."""
    assert ranks.run(1, "differing_gradients", JOBS, kind=kind, method=method, dtype=dtype) == [[]]


@pytest.mark.parametrize("method", ["transformers", "deepspeed"])
def test_frozen_embeddings_cost_no_gradients(ranks: Pools, method: str) -> None:
    """The first layer's input needs no gradient, its weights do."""
    assert ranks.run(1, "differing_gradients", JOBS, kind="llama", method=method, dtype="fp32", frozen="embed") == [[]]


def test_deepspeed_recomputes_under_the_same_autocast(ranks: Pools) -> None:
    found = ranks.run(1, "differing_gradients", JOBS, kind="llama", method="deepspeed", dtype="fp32", autocast=True)
    assert found == [[]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_inputs_that_deepspeed_empties_come_back(ranks: Pools, kind: str) -> None:
    """What `cpu_checkpointing` does on a GPU, run on the CPU: hidden states emptied, nothing that layers share."""
    assert ranks.run(
        1, "differing_gradients", JOBS, kind=kind, method="deepspeed", dtype="fp32", empty_inputs=True
    ) == [[]]


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "fp32"), ("llama", "bf16"), ("gpt2", "bf16")])
def test_training_on_two_ranks_is_equal_to_the_bit(ranks: Pools, kind: str, dtype: str) -> None:
    """FiraAdam under ZeRO-2, whose hooks take the gradients while layers are recomputed; a refresh among the steps."""
    found = ranks.run(2, "differing_weights", JOBS, kind=kind, dtype=dtype)
    assert found == [{"transformers": [], "deepspeed": []}] * 2


def test_plain_modules_name_their_layers(ranks: Pools) -> None:
    """A tensor by keyword, one output in a tuple, an input without gradient; in evaluation a layer runs once."""
    assert ranks.run(1, "plain_module", JOBS) == [{"equal": True, "calls": 2, "calls_in_evaluation": 1}]


def test_peak_memory_falls(ranks: Pools) -> None:
    """Eight layers, 256 tokens, eager attention: what one layer keeps instead of what eight do, and eight inputs."""
    (peaks,) = ranks.run(1, "activation_peaks", JOBS)
    assert peaks["none"] > 4 * peaks["transformers"]
    assert peaks["none"] > 4 * peaks["deepspeed"]


def test_the_method_follows_the_config(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 1}))
    model = language_model("llama")
    assert ds_fira.checkpoint_activations(model, path) == "transformers"
    assert checkpoints_layers(model)
    model = language_model("llama")
    assert ds_fira.checkpoint_activations(model, {}, method="none") == "none"
    assert not checkpoints_layers(model)


def test_early_releases_of_transformers_5() -> None:
    """Before `activation_checkpointing_enable` there was `gradient_checkpointing_enable`, settings first as well."""

    class Early(nn.Module):
        supports_gradient_checkpointing = True

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
            self.settings = gradient_checkpointing_kwargs

    model = Early()
    ds_fira.checkpoint_activations(model)
    assert model.settings == {"use_reentrant": False}


def block(**settings: Any) -> dict[str, Any]:
    return {"activation_checkpointing": settings}


@pytest.mark.parametrize(
    ("ds_config", "keywords", "words"),
    [
        (block(partitioned_activations=True), {}, "partitioned_activations = True is no setting of DeepSpeed"),
        (block(partition_activations=True), {}, "partition_activations = true divides .* set it to false"),
        (block(contiguous_memory_optimization=True), {}, "contiguous_memory_optimization = true .* set it to false"),
        (block(number_checkpoints=4), {}, "number_checkpoints = 4 is read by .* set it to null"),
        (block(number_checkpoints=0), {}, "number_checkpoints = 0 is read by .* set it to null"),
        (block(profile=True), {}, "profile = true ends"),
        (block(synchronize_checkpoint_boundary=True), {}, "synchronize_checkpoint_boundary = true ends"),
        (block(profile="yes"), {}, "profile = 'yes' is neither true nor false"),
        (block(cpu_checkpointing=True), {}, "cpu_checkpointing = true moves nothing"),
        ({"activation_checkpointing": True}, {}, "= True in the DeepSpeed config is no object"),
        (block(), {}, "call ds_fira.init_distributed"),
        (BLOCK, {"method": "transformers"}, "method = 'transformers' would ignore the activation_checkpointing block"),
        (BLOCK, {"method": "none"}, "method = 'none' would ignore"),
        ({}, {"method": "always"}, "method = 'always' is unknown"),
        ("missing.json", {}, "missing.json is not a file"),
        ({}, {"method": "transformers", "layers": []}, "would ignore layers"),
    ],
)
def test_errors_are_one_sentence(ds_config: Any, keywords: dict[str, Any], words: str) -> None:
    model = language_model("llama")
    with pytest.raises(ValueError, match=words) as error:
        ds_fira.checkpoint_activations(model, ds_config, **keywords)
    assert "\n" not in str(error.value)
    assert not checkpoints_layers(model)


def test_a_plain_module_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PlainNet has none of transformers' own; name the submodules"):
        ds_fira.checkpoint_activations(PlainNet())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        ds_fira.checkpoint_activations(PlainNet(), tmp_path / "broken.json")


def test_the_transformers_in_use_have_one_of_the_two_names() -> None:
    model = transformers.PreTrainedModel
    assert hasattr(model, "activation_checkpointing_enable") or hasattr(model, "gradient_checkpointing_enable")
