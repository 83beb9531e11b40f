"""Models and optimizers of the compared methods."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import nn

import ds_fira
from examples.reproduction.lib.spec import Run, Size

# What the paper pre-trains Fira and GaLore with below 1B (Appendix A.2); the rest is the released code's default.
ALPHA = 0.25
ADAM_EPS = 1e-8
# LoRA and ReLoRA as GaLore's authors ran them (arXiv 2403.03507, Appendix): the paper takes its baselines from there.
LORA_ALPHA, LORA_DROPOUT = 32, 0.05
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def build_model(run: Run, size: Size) -> transformers.PreTrainedModel:
    """A model with fresh weights, from torch's current generator."""
    shared: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.seq_length,
        "use_cache": False,
    }
    if run.architecture == "llama":
        config = transformers.LlamaConfig(intermediate_size=size.intermediate, **shared)
    elif run.architecture == "gpt_neox":
        config = transformers.GPTNeoXConfig(intermediate_size=4 * size.hidden, **shared)
    else:
        config = transformers.OPTConfig(
            ffn_dim=4 * size.hidden, word_embed_proj_dim=size.hidden, dropout=0.0, pad_token_id=None, **shared
        )
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, size.dtype), attn_implementation=attention
    )


def fira_settings(run: Run, size: Size) -> dict[str, Any]:
    """The settings of a Fira or GaLore run: the size's and the paper's, then the run's own."""
    return {"rank": size.rank, "update_proj_gap": size.gap, "alpha": ALPHA, **dict(run.settings)}


def build_optimizer(run: Run, size: Size, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run over the model's trainable parameters."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    if run.method in ("Fira", "GaLore"):
        kind = ds_fira.FiraAdam if run.method == "Fira" else ds_fira.GaLoreAdam
        return kind(model, lr=run.lr, record_scaling_factors=run.record, **fira_settings(run, size))
    if run.record:
        # At full rank ours is Adam, and can record; with torch's eps.
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        settings = {"eps": ADAM_EPS, "rank": max(max(param.shape) for param in trainable), **dict(run.settings)}
        return ds_fira.FiraAdam(named, lr=run.lr, record_scaling_factors=run.record, **settings)
    return torch.optim.Adam(trainable, lr=run.lr, **dict(run.settings))


def add_adapters(run: Run, size: Size, model: nn.Module) -> nn.Module:
    """LoRA on every linear layer but the head; embeddings, norms and head are trained whole, as pre-training needs.

    Returns:
        The wrapped model.
    """
    rank = dict(run.settings).get("rank", size.rank)
    config = peft.LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=LINEAR[run.architecture]
    )
    wrapped = peft.get_peft_model(model, config)
    for name, param in wrapped.named_parameters():
        if "base_layer" not in name:
            param.requires_grad_(True)
    return wrapped


def merge_adapters(model: nn.Module) -> None:
    """ReLoRA's restart: every adapter's product goes into its frozen weight, and the adapter starts anew at zero."""
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
            layer.merged_adapters.clear()
            layer.reset_lora_parameters("default", init_lora_weights=True)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors of all adapters."""
    return [param for name, param in model.named_parameters() if "lora_" in name]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of the optimizer's state, step counts left out."""
    tensors: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                collect(inner)

    collect(list(optimizer.state.values()))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
