"""The DeepSpeed versions that the tests run with: ds_fira reads private attributes, which may change between them."""

from __future__ import annotations

import functools
import warnings

from packaging.version import Version

# Releases of three minors; 0.18.8 and 0.18.9 fail in a step of stage 2 under torch 2.13, with torch's AdamW too.
# `bash launch/test_versions.sh` runs with each.
TESTED = ("0.17.6", "0.18.4", "0.19.8")


def is_tested(deepspeed: str) -> bool:
    """Whether a DeepSpeed version is of a minor release that is tested, and no newer than the one tested."""
    version = Version(deepspeed)
    return any(version.release[:2] == Version(tested).release[:2] and version <= Version(tested) for tested in TESTED)


@functools.cache
def warn_if_untested(deepspeed: str) -> None:
    """Warn, once, of a DeepSpeed version that is not tested."""
    if not is_tested(deepspeed):
        warnings.warn(
            f"FiraAdam: DeepSpeed {deepspeed} is not among the tested versions {', '.join(TESTED)}, whose internals "
            'ds_fira reads; if something is off, use one of them: pip install "deepspeed==' + TESTED[-1] + '".',
            stacklevel=2,
        )
