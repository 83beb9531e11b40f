"""Ulysses on real ranks: every rank has a part of each sequence, and all heads cross between them in the attention."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, distributed, nn

from tests.compatibility.option_jobs import STEPS, measure
from tests.distributed.zero_jobs import build

HEADS, WIDTH, LENGTH = 2, 8, 6


class Attention(nn.Module):
    """Softmax attention; (batch, sequence, heads, width of a head) in and out."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).contiguous()


class AttentionNet(nn.Module):
    """One attention layer between an embedding and a head; with a group, every rank takes its part of the sequence."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)
        self.attention = DistributedAttention(Attention(), group, 2, 1) if group is not None else Attention()
        self.group = group
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.watched = group is not None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.watched:
            self.seen.append((tokens, {name: p.detach().float().clone() for name, p in self.named_parameters()}))
        if self.group is not None:
            tokens = tokens.chunk(distributed.get_world_size(self.group), dim=1)[distributed.get_rank(self.group)]
        hidden = self.embedding(tokens)
        heads = [linear(hidden).unflatten(-1, (HEADS, -1)).contiguous() for linear in self.projections]
        context = self.attention(*heads, 0) if self.group is not None else self.attention(*heads)
        logits = self.lm_head(hidden + self.output(context.flatten(-2)))
        return 20 * nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def ulysses(ds_config: dict[str, Any]) -> dict[str, Any]:
    """`measure` with one sequence over all ranks, against one process that has whole sequences."""
    engine = None
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(distributed.get_world_size())
    try:
        torch.manual_seed(0)
        model = AttentionNet(parallel_state_sp.get_sequence_parallel_group())
        generator = torch.Generator().manual_seed(1)
        tokens = [torch.randint(0, 11, (2, LENGTH), generator=generator) for _ in range(STEPS)]
        ds_config = {**ds_config, "train_micro_batch_size_per_gpu": 2}
        engine = build(ds_config, [], model=model, mpu=parallel_state_sp)
        assert engine.sequence_parallel_size == distributed.get_world_size()
        return measure(engine, model, tokens, 1, ds_config["gradient_clipping"], make=AttentionNet)
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "refused_by": ""}
    finally:
        if engine is not None:
            engine.destroy()
        from deepspeed.utils import groups

        groups.mpu = None
