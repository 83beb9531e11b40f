"""Activations of a decoder-only transformer of the LLaMA family: a formula, so an estimate.

What autograd keeps, in bytes for each token, with e bytes for an element of `dtype`, width h, key and value width k,
intermediate width f, a heads, V words, L layers:

- RMSNorm: its input in fp32, its normalized input and its output as computed, N = (4 + 2 e) h;
- a layer: 2 N, queries, keys, values and the output of attention, e (2 h + 2 k), its softmax sums 4 a, and four
  tensors of the gated MLP, 4 e f. Attention by `scaled_dot_product_attention`, which keeps no scores;
- the loss: logits as computed, and three fp32 copies while its gradient is made, (e + 12) V.

All layers are held where the loss is made. With checkpointing only the input of each is, e h, and one layer is held
while it is computed again. The logits stay until the backward pass is over; it holds 16 h more in the last norm, and
e (2 f + h) more in a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Architectures with RMSNorm before attention and a gated MLP of three projections.
KNOWN = ("llama", "mistral", "qwen2")


def activation_bytes(config: PretrainedConfig | None, tokens: int, element: int, checkpointing: bool) -> int | None:
    """The most bytes of activations that a micro-batch holds at once; linear in the tokens.

    Args:
        config: the transformers config, None for a model without one.
        tokens: sequences times their length.
        element: bytes of an element of weights and activations.
        checkpointing: whether layers are computed again in the backward pass.

    Returns:
        None where the architecture is not one of `KNOWN`.
    """
    if getattr(config, "model_type", None) not in KNOWN:
        return None
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or h // heads
    queries, keys = heads * width, (config.num_key_value_heads or heads) * width
    norm = (4 + 2 * element) * h
    layer = 2 * norm + element * (2 * queries + 2 * keys + 4 * f) + 4 * heads
    logits = element * config.vocab_size
    head = max(norm + 12 * config.vocab_size, norm + 16 * h)
    backward = element * (2 * f + h)
    layers = config.num_hidden_layers
    if checkpointing:
        return tokens * (layers * element * h + logits + max(head, layer + backward))
    return tokens * (layers * layer + logits + max(head, backward))
