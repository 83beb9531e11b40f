"""What a training would run with here: versions, devices, the backend of its collectives, and whether kernels run."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from ds_fira.core import kernels
from ds_fira.engine.deepspeed.unsupported import is_tested
from ds_fira.runtime.process import backends, engine_backend
from ds_fira.tools.estimate.cards import GIB, available_memory
from ds_fira.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "triton")


@dataclass(frozen=True)
class Surroundings:
    """This machine and its packages.

    Attributes:
        versions: of Python, of ds_fira and of `PACKAGES`; None of what is not installed.
        tested: whether the tests of ds_fira run with this minor release of DeepSpeed.
        devices: one line each.
        backend: of the collectives of an engine.
        backends: those that torch was built with.
    """

    versions: dict[str, str | None]
    tested: bool
    devices: tuple[str, ...]
    backend: str
    backends: tuple[str, ...]


@dataclass(frozen=True)
class KernelUse:
    """Whether the Triton kernels would compute the steps on this machine's first device.

    Attributes:
        on: whether they would.
        reason: why.
    """

    on: bool
    reason: str


def surroundings() -> Surroundings:
    """Look around."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "ds_fira": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    tested = versions["deepspeed"] is not None and is_tested(versions["deepspeed"])
    return Surroundings(versions, tested, tuple(_devices()), engine_backend(), backends())


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        free = available_memory(1).host / GIB
        return [f"CPU, {len(os.sched_getaffinity(0))} cores, {free:.1f} GiB free; torch finds no GPU"]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / GIB:.1f} GiB, capability {capability}"
        )
    return found


def kernel_use(setting: kernels.Choice) -> KernelUse:
    """Whether the kernels would run here, found by a launch where there is a GPU.

    Args:
        setting: `kernels` of the optimizer's settings.

    Raises:
        ValueError: DS_FIRA_KERNELS in the environment is not legal.
    """
    if kernels.chosen(setting) == "off":
        where = "kernels = 'off' in the config" if setting == "off" else f"{kernels.VARIABLE} = 0 in the environment"
        return KernelUse(False, where)
    fault = kernels.fault(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    if fault is None:
        return KernelUse(True, "a launch ran")
    return KernelUse(False, fault.reason if fault.known else fault.advice)
