"""States in two views: what another program knows of them, and a payload with all else, which it carries along.

`ds_fira.engine.deepspeed.save_load.universal_form` says who reads the first view, and where payloads lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.core.algorithms import ADAM_STATES
from ds_fira.core.state import STEP

# The key of a payload.
PAYLOAD = "ds_fira_states"
# In it, the numbers of the tensors whose moments are in the other view.
ELSEWHERE = "moments_elsewhere"
# In it, buffers and frozen weights by name, where no other file of a universal checkpoint has them.
UNTRAINED = "untrained"


def fold(own: StateDict, sizes: Sequence[int], steps: int) -> tuple[dict[int, dict[str, object]], dict[str, object]]:
    """Take a rank's states apart.

    Args:
        own: of the optimizer.
        sizes: elements of every stepped tensor.
        steps: of the run, the same on all ranks.

    Returns:
        By the number of a tensor Adam's states, of its size: its own where it has such, else on the meta device, with
        a shape and no content; and the payload.
    """
    seen: dict[int, dict[str, object]] = {}
    kept: dict[int, dict[str, Tensor]] = {}
    elsewhere = []
    for number, size in enumerate(sizes):
        state = own["state"].get(number)
        empty = torch.empty(size, dtype=torch.float32, device="meta")
        seen[number] = {STEP: steps, **dict.fromkeys(ADAM_STATES, empty)}
        if state is None:
            continue
        if state.keys() == {STEP, *ADAM_STATES}:
            elsewhere.append(number)
            seen[number] |= {key: state[key] for key in ADAM_STATES}
        kept[number] = {key: value for key, value in state.items() if number not in elsewhere or key == STEP}
    return seen, {**own, "state": kept, ELSEWHERE: elsewhere}


def unfold(payload: Mapping[str, object], moments: Mapping[int, Mapping[str, object]]) -> StateDict:
    """The optimizer's state dict of what `fold` has made of it.

    Args:
        payload: of a rank.
        moments: by the number of a tensor, what is not in the payload.
    """
    elsewhere = payload[ELSEWHERE]
    state = {
        number: {**kept, **({key: moments[number][key] for key in ADAM_STATES} if number in elsewhere else {})}
        for number, kept in payload["state"].items()
    }
    return {**{key: value for key, value in payload.items() if key not in (ELSEWHERE, UNTRAINED)}, "state": state}
