"""What the test processes have imported before they are forked; see `tests.distributed`."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Also what an engine, and a model of transformers, import only when they are built: torch's compiler and the libraries
# behind it, most of the seconds of a start.
import datasets  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.zero_jobs  # noqa: F401

# Out of sight of the collector, which DeepSpeed and many tests call.
gc.collect()
gc.freeze()
