"""Transformers models of a few thousand parameters, one for every way in which weights are laid out."""

from __future__ import annotations

import transformers
from torch import Tensor, nn

VOCABULARY = 24
SEQUENCE = 8


def llama(tied: bool = False, layers: int = 2) -> nn.Module:
    """Separate projections, all `nn.Linear`; seven matrices a layer."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=tied,
        )
    )


def llama_tied() -> nn.Module:
    """A head that is the embedding; three layers, so that two ranks cut some matrices."""
    return llama(tied=True, layers=3)


def gpt2() -> nn.Module:
    """`Conv1D`, whose weight is (in, out); fused query, key and value; biases; a tied head; no dropout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=SEQUENCE,
            n_embd=16,
            n_layer=2,
            n_head=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def mixtral() -> nn.Module:
    """Three experts a layer in two 3-D tensors, and a router."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=SEQUENCE,
        )
    )


def gpt_neox() -> nn.Module:
    """Fused query, key and value in `nn.Linear`, biases, and a head named embed_out."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=SEQUENCE,
        )
    )


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss of token ids (batch, sequence)."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss
