"""The state dict of one process, from an optimizer whose states other ranks share."""

from __future__ import annotations

from ds_fira.checkpoint.named_state import StateDict
from ds_fira.optim.formed_states import holds_whole
from ds_fira.optim.registry import fira_of


def whole_state_dict(engine_or_optimizer: object) -> StateDict:
    """The state dict of one process, whatever the ranks that share its states: no tensor of it is cut.

    A collective call under FSDP2. One process, DDP, FSDP2 on any mesh, and a DeepSpeed engine at stage 0 give it and
    load it by `load_state_dict`, and so a run goes from each of them to each other.

    Args:
        engine_or_optimizer: a FiraAdam, or a DeepSpeed engine at stage 0 that trains with one.

    Returns:
        A dict that `torch.save` writes and `torch.load` reads with `weights_only=True`.

    Raises:
        ValueError: it is an engine's at another stage, whose ranks hold shares.
    """
    optimizer = fira_of(engine_or_optimizer)
    if optimizer.attachment.form is None and not holds_whole(optimizer):
        raise ValueError(
            f"ds_fira.whole_state_dict: {optimizer.algorithm.name}'s states are sharded by ZeRO; load the checkpoint "
            "into an engine at stage 0, and ask that."
        )
    result = optimizer.state_dict()

    def whole(value: object) -> object:
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    states = {number: {key: whole(each) for key, each in state.items()} for number, state in result["state"].items()}
    return {**result, "state": states}
