"""What DeepSpeed 0.19.8 holds on a GPU and on the host for given param groups: the rules, in bytes.

Read in `runtime/zero/stage_1_and_2.py`, `runtime/bf16_optimizer.py` and `runtime/fp16/unfused_optimizer.py`; with e
bytes for an element of a weight, m for one of a master weight, N ranks, P elements, B the reduce bucket's:

| | stage 0 | stage 1 | stage 2 |
|---|---|---|---|
| parameters | e P | e P, padded | the same |
| gradients | e P | e P until they are reduced | e for the parameters that touch the partition |
| master weights | 4 P in 16 bits, none in fp32 | m P / N | the same |
| in the backward pass | | e B, and the partition's gradients beyond B | e B |
| in the step | 4 P in 16 bits | the largest group's partition again in m, and flattened | the same |

Without DeepSpeed, where every parameter steps as its gradient comes (`ds_fira.step_in_backward`), there are the
weights, the states and the largest parameter's gradient; over replicas two buckets more, each with its copy. None of
these gradients is there at the loss, where activations are at their most. All others are, once gradients accumulate.

With fp32 accumulation stage 1 in bf16 keeps fp32 gradients of the whole model beside those in bf16, stage 2 the
partition's in fp32. With offload the partition's gradients in fp32, the masters and the states lie on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_fira.sharding.mean_buckets import BUCKET_BYTES
from ds_fira.tools.dry_run import FlatBuffer
from ds_fira.tools.estimate.activations import Activations
from ds_fira.tools.estimate.setup import Setup

# Elements in which the engine reduces gradients where ZeRO does not.
ENGINE_BUCKET = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes in one place, on one rank.

    Attributes:
        parameters: weights as the model computes with them.
        gradients: as much of them as is held at once.
        master_weights: the copy that the optimizer steps.
        optimizer_states: the optimizer's.
        backward_buffers: DeepSpeed's, in the backward pass.
        step_copies: DeepSpeed's copies of gradients from the end of the backward pass to the end of the step.
        activations: of one micro-batch at their most, None where the architecture is not known.
        beside_gradients: as many of them as are there while gradients of weights are made.
        gradients_stay: whether gradients are there at the loss: those of the micro-batch before.
    """

    parameters: int = 0
    gradients: int = 0
    master_weights: int = 0
    optimizer_states: int = 0
    backward_buffers: int = 0
    step_copies: int = 0
    activations: int | None = 0
    beside_gradients: int = 0
    gradients_stay: bool = True

    @property
    def held(self) -> int:
        """What is there at the end of every backward pass."""
        return self.parameters + self.gradients + self.master_weights + self.optimizer_states

    @property
    def total(self) -> int:
        """The most at once: activations and the backward's buffers are gone when the step makes its copies."""
        if not self.gradients_stay:
            later = self.gradients + self.backward_buffers + self.beside_gradients
            return self.held - self.gradients + max(self.activations or 0, later)
        return self.held + max(self.backward_buffers + (self.activations or 0), self.step_copies)

    def with_activations(self, activations: Activations) -> Memory:
        """The same with those of another micro-batch."""
        return replace(self, activations=activations.most, beside_gradients=activations.beside_gradients)


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank.

    Attributes:
        device: on the GPU.
        host: on the host, where something is offloaded.
    """

    device: Memory
    host: Memory = Memory()

    @property
    def total(self) -> int:
        """Both places together: what a run on a CPU needs."""
        return self.device.total + self.host.total


def rank_memory(
    buffers: Sequence[FlatBuffer], setup: Setup, dp_rank: int, optimizer_states: int, frozen: int = 0
) -> RankMemory:
    """What a rank holds for an optimizer over given param groups, without activations.

    Args:
        buffers: of every param group.
        setup: of the run.
        dp_rank: the rank.
        optimizer_states: bytes of them on this rank.
        frozen: elements of weights without gradients.
    """
    e, m = setup.weight_bytes, setup.master_dtype.itemsize
    trained = sum(sum(buffer.numels) for buffer in buffers)
    partition = sum(buffer.partition_size for buffer in buffers)
    bucket = setup.reduce_bucket_size * (2 if setup.overlap_comm else 1)
    common = Memory(
        parameters=e * (frozen + sum(buffer.padded for buffer in buffers)),
        master_weights=m * partition if setup.has_masters else 0,
        optimizer_states=optimizer_states,
    )
    if setup.step_in_backward:
        numels = [numel for buffer in buffers for numel in buffer.numels]
        largest = e * max(numels, default=0)
        travelling = 4 * min(e * trained, max(BUCKET_BYTES, largest)) if setup.gpus > 1 else 0
        return RankMemory(replace(common, gradients=largest, backward_buffers=travelling, gradients_stay=False))
    if not setup.sharded:
        copies = 4 * trained if setup.has_masters else e * min(trained, ENGINE_BUCKET)
        return RankMemory(replace(common, gradients=e * trained, step_copies=copies))
    if not setup.offload:
        return RankMemory(_sharded(common, buffers, setup, dp_rank, trained, bucket))
    largest = max((numel for buffer in buffers for numel in buffer.numels), default=0)
    device = Memory(
        parameters=common.parameters,
        gradients=e * trained if setup.zero_stage == 1 else 0,
        backward_buffers=e * (bucket + largest),
    )
    # One buffer stays whole, through which weights go back to the GPU; one is as large as the largest parameter.
    through = e * (partition + largest)
    return RankMemory(device, replace(common, parameters=0, gradients=m * partition, backward_buffers=through))


def _sharded(
    common: Memory, buffers: Sequence[FlatBuffer], setup: Setup, dp_rank: int, trained: int, bucket: int
) -> Memory:
    """ZeRO stages 1 and 2 with everything on the GPU."""
    e, m = setup.weight_bytes, setup.master_dtype.itemsize
    held = sum(buffer.held(dp_rank) for buffer in buffers)
    partition = sum(buffer.partition_size for buffer in buffers)
    largest = max((buffer.partition_size for buffer in buffers), default=0)
    if setup.separate_accumulation:
        if setup.zero_stage == 1 and setup.dtype == "bf16":
            # BF16_Optimizer: its gradients are views of what it reduces, which the engine flattens by buckets.
            padded = sum(buffer.padded for buffer in buffers)
            flattened = min(padded, ENGINE_BUCKET + max(buffer.padded for buffer in buffers))
            copies = 4 * flattened if len(buffers) > 1 else 0
            return replace(common, gradients=e * trained + 4 * padded, step_copies=copies)
        if setup.zero_stage == 1:
            return replace(common, gradients=4 * trained, backward_buffers=4 * (bucket + partition))
        return replace(common, gradients=4 * partition, backward_buffers=e * bucket)
    # Flattened as computed, then in the dtype of the master weights where that is another.
    copies = largest * (e + (m if m != e else 0))
    if setup.zero_stage == 1:
        own = max(0, held - min(setup.reduce_bucket_size, trained))
        return replace(common, gradients=e * trained, backward_buffers=e * (bucket + own), step_copies=copies)
    return replace(common, gradients=e * held, backward_buffers=e * bucket, step_copies=copies)
