"""Memory of training before it begins: per GPU, for AdamW, GaLore, LoRA and Fira under ZeRO 0, 1 and 2.

from ds_fira.tools.estimate import Setup, available_memory, estimate, require_fit

found = estimate("llama_1b", Setup(gpus=8, zero_stage=2), rank=512)
require_fit(found.methods["Fira"], available_memory())
"""

from ds_fira.tools.estimate.cards import CARDS, Available, available_memory, card_memory
from ds_fira.tools.estimate.compute import Estimate, MethodEstimate, estimate, fits, require_fit
from ds_fira.tools.estimate.memory import Memory, RankMemory
from ds_fira.tools.estimate.methods import METHODS
from ds_fira.tools.estimate.model import load_model
from ds_fira.tools.estimate.setup import Setup

__all__ = [
    "CARDS",
    "METHODS",
    "Available",
    "Estimate",
    "Memory",
    "MethodEstimate",
    "RankMemory",
    "Setup",
    "available_memory",
    "card_memory",
    "estimate",
    "fits",
    "load_model",
    "require_fit",
]
