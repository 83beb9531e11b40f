"""Activations by formula are what torch allocates in a forward and backward pass of transformers' models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from benchmarks.memory.allocation import peak_bytes
from ds_fira.tools.estimate import Setup, estimate
from ds_fira.tools.estimate.activations import Activations, activations_of

SMALL = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_hidden_layers": 2}
BOUND = 0.01
CPU = torch.device("cpu")


def small_model(vocabulary: int, dtype: torch.dtype, checkpointing: bool, **changed: int) -> torch.nn.Module:
    config = LlamaConfig(**{**SMALL, **changed}, vocab_size=vocabulary, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def measured(model: torch.nn.Module, ids: torch.Tensor, keeps_output: bool = False) -> int:
    """The most bytes that torch allocates beyond weights and gradients, which are there already."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)

    def passes() -> None:
        output = model(input_ids=ids, labels=ids)
        loss = output.loss
        if not keeps_output:
            del output
        loss.backward()

    return peak_bytes(passes, CPU)


def by_formula(config: PretrainedConfig, tokens: int, dtype: torch.dtype, checkpointing: bool) -> Activations:
    return activations_of(config, tokens, dtype.itemsize, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_forward_and_backward_pass(dtype: torch.dtype, checkpointing: bool) -> None:
    """Where layers rule, where the logits do, and with twice the tokens, in one sequence or two."""
    for vocabulary, shape in ((200, (1, 256)), (2000, (1, 128)), (2000, (2, 128)), (4000, (1, 256))):
        model = small_model(vocabulary, dtype, checkpointing)
        found = by_formula(model.config, shape[0] * shape[1], dtype, checkpointing)
        assert found.most == pytest.approx(measured(model, torch.randint(vocabulary, shape)), rel=BOUND)
        assert (found.most == found.loss) == (vocabulary > 200 or not checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_and_values_of_fewer_heads(checkpointing: bool) -> None:
    model = small_model(200, torch.bfloat16, checkpointing, num_key_value_heads=2)
    own = by_formula(model.config, 256, torch.bfloat16, checkpointing)
    assert own.most == pytest.approx(measured(model, torch.randint(200, (1, 256))), rel=BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_loop_that_keeps_the_output_holds_the_logits(dtype: torch.dtype) -> None:
    model = small_model(2000, dtype, True)
    own = by_formula(model.config, 128, dtype, True)
    logits = 128 * 2000 * dtype.itemsize
    assert own.loss + logits == pytest.approx(measured(model, torch.randint(2000, (1, 128)), True), rel=BOUND)


@pytest.mark.parametrize("tokens", [256, 16], ids=["the loss rules", "the gradient of the head rules"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_that_are_freed_as_they_come(tokens: int, checkpointing: bool) -> None:
    """Activations, and the largest gradient beside those of its time: there is none at the loss.

    In float32, where products of matrices on a CPU have no scratch memory.
    """
    model = small_model(4000, torch.float32, checkpointing)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    ids = torch.randint(4000, (1, tokens))
    setup = Setup(
        zero_stage=0,
        dtype="fp32",
        master_weights="none",
        step_in_backward=True,
        seq_length=tokens,
        activation_checkpointing=checkpointing,
    )
    memory = estimate(model, setup, ["Fira"], rank=16).methods["Fira"].largest.device
    live = peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward(), CPU)
    assert memory.total - memory.parameters - memory.optimizer_states == pytest.approx(live, rel=BOUND)
    assert (memory.total == memory.held - memory.gradients + memory.activations) == (tokens == 256)
