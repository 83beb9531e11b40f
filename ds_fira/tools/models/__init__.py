"""The LLaMA models of the paper's Table 5 as transformers config files, known by name.

The 1B row of the paper's table has heads and layers exchanged: the model has 32 heads and 24 layers, as in the released
code of GaLore and Fira (24 heads would not divide its width of 2048).
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# By name, the subspace rank of the paper's Table 2; 7B at the higher of the two ranks that the paper trains it with.
PAPER_RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512, "llama_7b": 1024}
NAMES = tuple(PAPER_RANKS)


def config_file(name: str) -> Path:
    """The transformers config file of one of `NAMES`.

    Raises:
        ValueError: there is no model of this name.
    """
    if name not in NAMES:
        raise ValueError(f"no model is named {name!r}; choose one of {', '.join(NAMES)}, or give a config file.")
    return FOLDER / f"{name}.json"
