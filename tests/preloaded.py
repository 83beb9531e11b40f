"""What the test processes have imported before they are forked; see `tests.ranks`."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Also what an engine, and a model of transformers, import only when they are built: torch's compiler and the libraries
# behind it, most of the seconds of a start.
import datasets  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.accelerator import get_accelerator

import tests.distributed.zero_jobs  # noqa: F401

if not torch.cuda.is_available():
    # torch computes in half precision on every CPU; DeepSpeed lets only those with fast instructions for it train.
    type(get_accelerator()).is_fp16_supported = lambda accelerator: True

# Out of sight of the collector, which DeepSpeed and many tests call.
gc.collect()
gc.freeze()
