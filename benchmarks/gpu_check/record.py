"""What a stage is handed: where it records, how long it has, which sizes it takes."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import default_device, describe

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = 0
# Seconds that a stage leaves of its time, to come to its end before it is stopped.
MARGIN = 4.0
TRACE = "trace.json.gz"
JUNIT = "junit.xml"


@dataclass(frozen=True)
class Sizes:
    """What is measured at a GPU, or rehearsed on a CPU.

    Attributes:
        shapes: (m, n) of a matrix, one for each way it is projected.
        batch: matrices of one shape that are stepped together.
        ranks: of the projection, the one of most interest first.
        model: a LLaMA of the paper whose share of 8 ranks is stepped; None for a small one.
        product: the side of the square products.
        sides: of the decompositions.
        copied: elements of a copy, float32.
        large: the model of the last stage; None for a small one.
    """

    shapes: tuple[tuple[int, int], ...]
    batch: int
    ranks: tuple[int, ...]
    model: str | None
    product: int
    sides: tuple[int, ...]
    copied: int
    large: str | None


FULL = Sizes(
    shapes=((4096, 4096), (4096, 11008), (11008, 4096)),
    batch=4,
    ranks=(256, 1024, 64),
    model="7b",
    product=8192,
    sides=(288, 1056, 4096),
    copied=2**29,
    large="llama_7b",
)
REHEARSAL = Sizes(
    shapes=((48, 48), (32, 80), (80, 32)),
    batch=2,
    ranks=(16, 8),
    model=None,
    product=256,
    sides=(32, 64),
    copied=2**20,
    large=None,
)


def source_digest() -> str:
    """What the code is, also where no git says it: a digest of the library's and the benchmarks' sources."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("ds_fira", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")):
        digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out, marked where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    try:
        said = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"


@functools.cache
def about() -> dict[str, Any]:
    """What stands in every line: device, versions, code, seed."""
    device = default_device()
    found: dict[str, Any] = describe(device)
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["cuda"] = torch.version.cuda
    return {**found, "commit": commit(), "source": source_digest(), "seed": SEED}


class Check:
    """One stage at work.

    Attributes:
        device: the first GPU, or the CPU.
        out: the folder of the results.
        work: a folder for what is not kept.
        rehearsal: whether this is a rehearsal on a CPU.
        sizes: to measure at.
    """

    def __init__(
        self, number: int, name: str, out: Path, work: Path, limit: float, rehearsal: bool, started: float | None = None
    ) -> None:
        self._ends = (time.time() if started is None else started) + limit - MARGIN
        self._label = {"stage": number, "name": name}
        self.out, self.work, self.rehearsal = out, work, rehearsal
        self.sizes = REHEARSAL if rehearsal else FULL
        self.device = default_device()
        self.failures = 0

    def left(self) -> float:
        """Seconds until the stage should be over."""
        return self._ends - time.time()

    def record(self, what: str, value: float | None, unit: str, **facts: Any) -> None:
        """Write one measurement; it is on the disk when this returns.

        Args:
            what: is measured.
            value: None where there is none, with the reason among the facts.
            unit: of the value.
            **facts: sizes and settings that the value belongs to.
        """
        if value is not None and not math.isfinite(value):
            facts, value = {**facts, "reason": f"the value is {value}"}, None
        line = {**self._label, "what": what, "value": value, "unit": unit, **facts}
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({**line, "rehearsal": self.rehearsal, "time": round(time.time(), 3), **about()}))
            file.write("\n")

    def holds(self, what: str, value: float, bound: float, unit: str = "relative", **facts: Any) -> None:
        """Record a value that must not lie above a bound; one that does is a failure of the stage."""
        ok = math.isfinite(value) and abs(value) <= bound
        self.failures += not ok
        self.record(what, value, unit, bound=bound, ok=ok, **facts)

    def fact(self, what: str, true: bool, **facts: Any) -> None:
        """Record what must be true; where it is not, the stage has failed."""
        self.failures += not true
        self.record(what, float(true), "true or not", ok=bool(true), **facts)

    @contextlib.contextmanager
    def attempt(self, what: str, **facts: Any) -> Iterator[None]:
        """Record why a measurement could not be made, and go on with the next; free the memory it held."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            traceback.print_exc(file=sys.stdout)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.record(what, None, "", ok=False, reason=reason, **facts)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def enough(self, what: str, needs: float, **facts: Any) -> bool:
        """Whether so many seconds are left; where not, that is recorded as the reason why there is no figure."""
        if self.left() >= needs:
            return True
        self.record(
            what, None, "", reason=f"no time: {self.left():.0f} s were left of the {needs:.0f} it needs", **facts
        )
        return False
