"""Activations of a decoder-only transformer of the LLaMA family: a formula, so an estimate.

What transformers' modules leave for the backward pass, in bytes for each token, with e bytes for an element of `dtype`,
width h, key and value width k, intermediate width f, a heads of width d, V words, L layers:

- RMSNorm: its input in float32, its normalized input and its output as computed, and one root in float32,
  N = (4 + 2 e) h + 4. In float32 the input is no copy;
- a layer: 2 N; queries, keys, values and the output of attention, e (2 h + 2 k), with the sums of the softmax, 4 a; and
  four tensors of the gated MLP, 4 e f. Attention by `scaled_dot_product_attention`, which keeps no scores;
- the tables of positions, which all layers share, 2 e d;
- with checkpointing, of a layer its input alone, e h.

These are held where the backward pass begins, with the last norm, N. On top of them come, one after the other:

- at the loss, three float32 tensors of the size of the logits: their logarithmic softmax, its gradient, which is zero
  but for one word of a token, and the gradient of the logits, 12 V. The logits themselves (in 16 bits, and their
  float32 copy) are gone: the softmax keeps neither, and a loop that keeps the loss alone, as the Trainer's, lets the
  model's output go. One that keeps the output, as `outputs = model(...)`, holds e V more;
- in the head, the gradient of the logits as computed and of its input, e (V + h), while the gradient of its weight is
  made, the first of all;
- in the last norm, whose own are then held, four float32 tensors of its width, 16 h;
- in the MLP of a layer, the gradients of its hidden tensors and of its output, e (2 f + h). With checkpointing the
  layer's own are held, which have been computed again; in float32 its input is the first norm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Architectures with RMSNorm before attention and a gated MLP of three projections.
KNOWN = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Activations:
    """The most bytes of activations at once.

    Attributes:
        loss: at the loss, where no weight has its gradient of this backward pass yet.
        beside_gradients: while gradients of weights are made.
    """

    loss: int
    beside_gradients: int

    @property
    def most(self) -> int:
        """At any time."""
        return max(self.loss, self.beside_gradients)

    def times(self, count: int) -> Activations:
        """Multiply by the sequences of a micro-batch."""
        return Activations(count * self.loss, count * self.beside_gradients)


def activations_of(
    config: PretrainedConfig | None, tokens: int, element: int, checkpointing: bool
) -> Activations | None:
    """The most bytes of activations of a micro-batch; linear in the tokens.

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
    norm = (4 + 2 * element) * h + 4
    layer = 2 * norm + element * (2 * queries + 2 * keys + 4 * f) + 4 * heads
    mlp = element * (2 * f + h)
    if checkpointing:
        again = layer - (4 * h if element == 4 else 0)
        held, mlp = config.num_hidden_layers * element * h, mlp + again
    else:
        held = config.num_hidden_layers * layer
    held += 2 * element * width
    head = norm + element * (config.vocab_size + h)
    loss = held + norm + 12 * config.vocab_size
    return Activations(tokens * loss, tokens * (held + max(head, norm + 16 * h, mlp)))
