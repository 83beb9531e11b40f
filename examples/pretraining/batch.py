"""How a batch is made up of processes, micro-batches and accumulation, settled before DeepSpeed asserts on it."""

from __future__ import annotations

from typing import Any

TOTAL, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def settle_batch(config: dict[str, Any], world_size: int, micro: int | None = None, total: int | None = None) -> None:
    """Fill in all three of DeepSpeed's batch sizes, in sequences: total = micro x accumulation x processes.

    Args:
        config: a DeepSpeed configuration; its batch keys are completed in place.
        world_size: data-parallel processes.
        micro: sequences per process and pass, instead of the config's. A total that the config sets stays, and the
            accumulation follows; where it sets none, the accumulation stays.
        total: sequences per optimizer step over all processes, instead of the config's.

    Raises:
        ValueError: no batch size is set, they contradict each other, or the processes do not divide the total.
    """
    accumulation = config.get(ACCUMULATION)
    if total is not None or (micro is not None and TOTAL in config):
        accumulation = None
    micro = micro if micro is not None else config.get(MICRO)
    total = total if total is not None else config.get(TOTAL)
    if micro is None and total is None:
        raise ValueError("the DeepSpeed config sets no batch size: pass --batch-size")
    for name, value in ((MICRO, micro), (TOTAL, total), (ACCUMULATION, accumulation)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} = {value!r} is no number of sequences: give a whole number of at least 1")
    if total is None:
        total = micro * (accumulation or 1) * world_size
    if total % world_size:
        raise ValueError(
            f"a batch of {total} sequences ({TOTAL}) does not divide by {world_size} processes: start a number of "
            f"processes that divides it, or pass --total-batch-size {-(-total // world_size) * world_size}"
        )
    each = total // world_size
    if micro is None:
        micro = max(1, each // (accumulation or 1))
    if micro * (accumulation or max(1, each // micro)) != each:
        fitting = max(size for size in range(1, min(micro, each) + 1) if each % size == 0)
        raise ValueError(
            f"{total} sequences on {world_size} processes are {each} each, which micro-batches of {micro}"
            + (f" times {accumulation} accumulation steps do not make" if accumulation else " do not divide")
            + f": pass --batch-size {fitting}"
            + (f" and remove {ACCUMULATION}" if accumulation else "")
        )
    config.update({TOTAL: total, MICRO: micro, ACCUMULATION: each // micro})
