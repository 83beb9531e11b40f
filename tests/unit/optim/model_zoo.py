"""Small models with a layer of each kind, and the names of what is projected in them."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

RANK = 3


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 12))
        self.gate_bias = nn.Parameter(torch.zeros(2, 12))


class Zoo(nn.Module):
    """One layer of each kind that matters here."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 8)
        self.embed_positions = nn.Embedding(8, 8)
        self.q_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.experts = Experts()
        self.table = nn.Parameter(torch.randn(4, 8))
        self.lm_head = nn.Linear(8, 30, bias=False)


def llama(tied=False):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def names_of(model):
    return {id(p): name for name, p in model.named_parameters()}


def projected_names(model, groups):
    names = names_of(model)
    return {names[id(p)] for group in groups if "rank" in group for p in group["params"]}


def decay_of(model, groups):
    names = names_of(model)
    return {names[id(p)]: group.get("weight_decay") for group in groups for p in group["params"]}


LLAMA_LINEAR = {
    f"model.layers.{i}.{name}.weight"
    for i in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}


GPT2_LINEAR = {f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


MIXTRAL_LINEAR = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
}


EXPECTED = {
    "zoo": (Zoo, {"q_proj.weight", "experts.up_proj", "experts.down_proj"}),
    "llama": (llama, LLAMA_LINEAR),
    "llama_tied_head": (lambda: llama(tied=True), LLAMA_LINEAR),
    "gpt2_conv1d_tied_head": (gpt2, GPT2_LINEAR),
    "mixtral_experts": (mixtral, MIXTRAL_LINEAR),
}
