"""The model of an estimate: by name, from a config file or from the hub, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ds_fira.tools.models import NAMES, config_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How long the hub may take to answer at all.
HUB_SECONDS = 10.0


def load_model(model: str | Path) -> PreTrainedModel:
    """Build a causal language model on the meta device: shapes, no memory.

    Args:
        model: one of `ds_fira.tools.models.NAMES`, a transformers config file, a folder with a config.json, or a hub
        id.

    Returns:
        The transformers model.

    Raises:
        ValueError: there is no such model, it is no causal language model, or transformers is not installed; one
            sentence.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"--model = {str(model)!r} needs the package transformers ({error}); pip install ds_fira[examples]."
        ) from error
    source = config_file(str(model)) if str(model) in NAMES else Path(model)
    local = source.exists()
    if not local and source.suffix == ".json":
        raise _refusal(model, "is a config file that does not exist")
    try:
        config = AutoConfig.from_pretrained(
            str(source if local else model), local_files_only=local or not _hub_answers(str(model))
        )
    except (OSError, ValueError, KeyError) as error:
        what = "has no config that transformers can read" if local else "is neither a file nor found on the hub"
        raise _refusal(model, what, error) from None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise _refusal(model, "is no causal language model that transformers can build", error) from None


def _hub_answers(name: str) -> bool:
    """Whether the hub can be asked; transformers would try for minutes, and then look into its cache all the same."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return True  # it answers, if only that there is no such model
    except Exception:  # of whichever HTTP library the hub's client uses
        return False
    return True


def _refusal(model: str | Path, what: str, error: Exception | None = None) -> ValueError:
    """One sentence with the model, what is wrong with it, the first line of the error, and the remedy."""
    first_line = str(error or "").strip().partition("\n")[0].rstrip(".")[:160]
    reason = f" ({first_line})" if error else ""
    return ValueError(
        f"--model = {str(model)!r} {what}{reason}; choose one of {', '.join(NAMES)}, or give a config file, a folder "
        "with a config.json or a hub id."
    )
