"""What the test processes have imported before they are forked; see `tests.ranks`."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Also what an engine, and a model of transformers, import only when they are built: torch's compiler and the libraries
# behind it, most of the seconds of a start.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import PIL.Image
import torch
import torchdata.stateful_dataloader  # noqa: F401
import transformers.convert_slow_tokenizer
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
from deepspeed.accelerator import get_accelerator
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tests.distributed.zero_jobs  # noqa: F401

# What the first engine, the first plot and the first model saved of a process would find out, in a second or two.
deepspeed.ops.__compatible_ops__.get("async_io")
get_checkpoint_conversion_mapping("llama")
PIL.Image.preinit()

if not torch.cuda.is_available():
    # torch computes in half precision on every CPU; DeepSpeed lets only those with fast instructions for it train.
    type(get_accelerator()).is_fp16_supported = lambda accelerator: True

# Out of sight of the collector, which DeepSpeed and many tests call.
gc.collect()
gc.freeze()
