"""How a model is trained, as far as its memory depends on it: checked in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = ("fp32", "bf16", "none")
# DeepSpeed's default, in elements.
REDUCE_BUCKET_SIZE = 500_000_000


@dataclass(frozen=True)
class Setup:
    """A DeepSpeed configuration and a batch.

    Attributes:
        gpus: data-parallel ranks.
        zero_stage: 0, 1 or 2.
        dtype: of weights and gradients: "fp32", "bf16" (`bf16.enabled`) or "fp16".
        master_weights: "fp32", DeepSpeed's own; "bf16" (`bf16_master_weights_and_grads` with `bf16_optimizer_states`);
            "none", where the optimizer steps weights of `dtype` themselves, without DeepSpeed's 16-bit modes.
        accumulation_dtype: `data_types.grad_accum_dtype`; None for `dtype`.
        offload: `offload_optimizer` to the host.
        reduce_bucket_size: elements of the buffer that ZeRO reduces gradients in.
        overlap_comm: whether there are two of them.
        batch_size: sequences in a micro-batch on each GPU.
        seq_length: tokens in a sequence.
        activation_checkpointing: whether layers are computed again in the backward pass.
        step_in_backward: whether `ds_fira.step_in_backward` steps every parameter as its gradient comes, without an
            engine.

    Raises:
        ValueError: a value is not legal, or DeepSpeed has no such combination; one sentence.
    """

    gpus: int = 1
    zero_stage: int = 2
    dtype: str = "bf16"
    master_weights: str = "fp32"
    accumulation_dtype: str | None = None
    offload: bool = False
    reduce_bucket_size: int = REDUCE_BUCKET_SIZE
    overlap_comm: bool = False
    batch_size: int = 1
    seq_length: int = 1024
    activation_checkpointing: bool = False
    step_in_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "batch_size", "seq_length", "reduce_bucket_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{_option(name)} = {value!r} is not legal; give a whole number of at least 1.")
        if self.zero_stage == 3:
            raise ValueError("--zero-stage = 3 is not estimated yet, though FiraAdam trains at it; choose 0, 1 or 2.")
        for name, legal in {"zero_stage": (0, 1, 2), "dtype": DTYPES, "master_weights": MASTERS}.items():
            if (value := getattr(self, name)) not in legal:
                *first, last = map(str, legal)
                raise ValueError(f"{_option(name)} = {value!r} is not legal; choose {', '.join(first)} or {last}.")
        if self.accumulation_dtype not in (None, self.dtype, "fp32"):
            raise ValueError(
                f"--accumulation-dtype = {self.accumulation_dtype!r} does not go with --dtype = {self.dtype!r}; "
                f"choose fp32, or leave it out for {self.dtype}."
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.step_in_backward and (self.zero_stage > 0 or self.has_masters or self.dtype == "fp16"):
            raise ValueError(
                "--step-in-backward steps the weights themselves, in fp32 or bf16 and without DeepSpeed; use "
                "--zero-stage 0 with --master-weights none, and no --dtype fp16."
            )
        if self.master_weights == "none" and self.zero_stage > 0:
            raise ValueError(
                f"--master-weights = 'none' does not go with --zero-stage = {self.zero_stage}, where DeepSpeed always "
                "keeps master weights; use --zero-stage 0, or --master-weights bf16."
            )
        if self.master_weights == "bf16" and (self.dtype != "bf16" or self.zero_stage == 0):
            raise ValueError(
                "--master-weights = 'bf16' needs --dtype bf16 and --zero-stage 1 or 2, as DeepSpeed does; change "
                "these, or use --master-weights fp32."
            )
        if self.master_weights == "bf16" and self.offload:
            raise ValueError("--master-weights = 'bf16' is not estimated with --offload; leave one of them out.")
        if self.offload and self.zero_stage == 0:
            raise ValueError("--offload needs ZeRO; use --zero-stage 1 or 2, or remove --offload.")
        if self.separate_accumulation and self.zero_stage == 0:
            raise ValueError(
                "--accumulation-dtype = 'fp32' does not go with --zero-stage = 0 in DeepSpeed; use --zero-stage 1 or 2."
            )
        if self.separate_accumulation and (self.master_weights == "bf16" or self.offload):
            other = "--offload" if self.offload else "--master-weights = 'bf16'"
            raise ValueError(f"--accumulation-dtype = 'fp32' is not estimated with {other}; leave one of them out.")

    @property
    def sharded(self) -> bool:
        """Whether ZeRO partitions optimizer states and master weights."""
        return self.zero_stage > 0

    @property
    def separate_accumulation(self) -> bool:
        """Whether gradients are summed in a higher precision than they are computed in."""
        return self.accumulation_dtype not in (None, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of weights and of gradients as computed."""
        return DTYPES[self.dtype].itemsize

    @property
    def has_masters(self) -> bool:
        """Whether master weights are a copy of their own: at stages 1 and 2 always, fp32 or not."""
        return self.sharded or (self.dtype != "fp32" and self.master_weights != "none")

    @property
    def master_dtype(self) -> torch.dtype:
        """The dtype of the weights that the optimizer steps."""
        return DTYPES[self.dtype if self.master_weights == "none" else self.master_weights]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
