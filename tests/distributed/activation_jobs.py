"""What the ranks of a test pool run for activation checkpointing: gradients and trainings with and without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor, nn

import ds_fira
from benchmarks.memory.allocation import peak_bytes
from tests.distributed.zero_jobs import config

BLOCK = {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 64


def language_model(kind: str, layers: int = 2, hidden: int = 32) -> nn.Module:
    """A small model with dropout where its kind has one; the same weights at every call."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    size |= {"num_attention_heads": 4, "attention_dropout": 0.1, **common}
    if kind == "gpt2":
        model_config = transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, n_positions=64, **common)
    elif kind == "mixtral":
        # The auxiliary loss reaches the layers through what hooks take out of them.
        model_config = transformers.MixtralConfig(
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5, **size
        )
    else:
        model_config = transformers.LlamaConfig(**size)
    return transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")


def tokens(sequence: int = 24, seed: int = 1) -> Tensor:
    """A batch of two sequences."""
    return torch.randint(0, VOCABULARY, (2, sequence), generator=torch.Generator().manual_seed(seed))


def checkpointed(model: nn.Module, method: str | None) -> nn.Module:
    """The model with its layers checkpointed by a method; None: the model as it is."""
    if method is not None:
        assert ds_fira.checkpoint_activations(model, BLOCK if method == "deepspeed" else None) == method
    return model


def gradients_of(model: nn.Module, ids: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Gradients by name of one loss; the backward pass is outside of autocast, as in every training."""
    model.train()
    torch.manual_seed(5)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def differing_gradients(
    kind: str, method: str, dtype: str, frozen: str = "", autocast: bool = False, empty_inputs: bool = False
) -> list[str]:
    """Names of parameters whose gradient is not equal to the bit to the one without checkpointing.

    Args:
        kind: of the model.
        method: of checkpointing.
        dtype: of weights and activations.
        frozen: parameters with this in their name get no gradient.
        autocast: run the forward pass under bfloat16 autocast.
        empty_inputs: let DeepSpeed empty the inputs of every layer until the backward pass, as it does with
            `cpu_checkpointing` on a GPU.
    """
    found = []
    for used in (None, method):
        model = checkpointed(language_model(kind).to(DTYPES[dtype]), used)
        for name, param in model.named_parameters():
            param.requires_grad_(not frozen or frozen not in name)
        with host_copies() if empty_inputs else contextlib.nullcontext():
            found.append(gradients_of(model, tokens(), autocast))
    plain, other = found
    assert len(plain) > 10
    return [name for name in plain.keys() | other.keys() if not same(plain.get(name), other.get(name))]


@contextlib.contextmanager
def host_copies() -> Iterator[None]:
    """DeepSpeed's `cpu_checkpointing` with copies to the host that are copies, as they are from a GPU."""
    from deepspeed.runtime.activation_checkpointing import checkpointing

    original = checkpointing.copy_to_device

    def copy(items: tuple[Any, ...], device: Any, criterion_func: Any) -> tuple[Any, ...]:
        return tuple(item.clone().detach() if criterion_func(item) else item for item in items)

    # The first copy goes to the host; the second one, of the same call, to the device, where the tensors are.
    checkpointing.copy_to_device = lambda items, device, criterion_func: (
        copy if isinstance(device, torch.device) else original
    )(items, device, criterion_func)
    deepspeed.checkpointing.configure(None, checkpoint_in_cpu=True)
    try:
        yield
    finally:
        checkpointing.copy_to_device = original
        deepspeed.checkpointing.configure(None)


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether both are there and equal to the bit."""
    return left is not None and right is not None and torch.equal(left, right)


def trained_weights(kind: str, method: str | None, dtype: str, steps: int = 3) -> dict[str, Tensor]:
    """Weights after steps of FiraAdam under ZeRO-2; the batches differ between ranks."""
    params = {"lr": 0.01, "rank": 4, "update_proj_gap": 2, "subspace": "gram"}
    ds_config = config(2, dtype, params) | (BLOCK if method == "deepspeed" else {})
    model = language_model(kind)
    used = ds_fira.checkpoint_activations(model, ds_config, method=method or "none")
    assert used == (method or "none")
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]
    rank = torch.distributed.get_rank()
    for step in range(steps):
        ids = tokens(seed=100 * rank + step)
        torch.manual_seed(10 * rank + step)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    weights = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    engine.destroy()
    return weights


def differing_weights(kind: str, dtype: str) -> dict[str, list[str]]:
    """By method, the names of weights that training with it leaves different from training without."""
    plain = trained_weights(kind, None, dtype)
    start = language_model(kind).to(DTYPES[dtype]).state_dict()
    assert not any(torch.equal(plain[name], start[name]) for name in plain if name.endswith("proj.weight"))
    found = {}
    for method in ("transformers", "deepspeed"):
        other = trained_weights(kind, method, dtype)
        found[method] = [name for name in plain if not torch.equal(plain[name], other[name])]
    return found


class Block(nn.Module):
    """A layer of a plain module: dropout, a tensor by keyword, and a tuple of one as output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, *, scale: Tensor) -> tuple[Tensor]:
        return (hidden + scale * self.narrow(nn.functional.dropout(self.wide(hidden).tanh(), 0.2)),)


class PlainNet(nn.Module):
    """Blocks over an input that needs no gradient; the scale they share needs one."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self.scale.exp()
        for layer in self.layers:
            (hidden,) = layer(hidden, scale=scale)
        return hidden.square().mean()


def plain_module() -> dict[str, Any]:
    """Whether a plain module's gradients are equal, how often a layer ran, and what evaluation does."""
    calls = []
    found = []
    for wrap in (False, True):
        model = PlainNet()
        model.layers[0].wide.register_forward_hook(lambda *_: calls.append(1))
        if wrap:
            for _ in range(2):  # the second call finds them wrapped
                assert ds_fira.checkpoint_activations(model, layers=model.layers) == "deepspeed"
        calls.clear()
        torch.manual_seed(5)
        model(torch.ones(4, 16)).backward()
        found.append({name: param.grad.clone() for name, param in model.named_parameters()})
    in_training = len(calls)
    calls.clear()
    model.eval()
    model(torch.ones(4, 16)).backward()
    return {
        "equal": all(same(found[0][name], found[1][name]) for name in found[0]),
        "calls": in_training,
        "calls_in_evaluation": len(calls),
    }


def activation_peaks(layers: int = 8, sequence: int = 256) -> dict[str, int]:
    """Peak bytes of one forward and backward pass, gradients included, by method."""
    peaks = {}
    for method in ("none", "transformers", "deepspeed"):
        model = language_model("llama", layers=layers, hidden=64)
        checkpointed(model, None if method == "none" else method)
        ids = tokens(sequence)
        gradients_of(model, ids)
        for param in model.parameters():
            param.grad = None
        peaks[method] = peak_bytes(lambda model=model, ids=ids: gradients_of(model, ids), torch.device("cpu"))
    return peaks
