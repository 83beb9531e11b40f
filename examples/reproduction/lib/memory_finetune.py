"""The memory column of Table 3: adapters and optimizer states of LLaMA 7B at rank 32, on the meta device."""

from __future__ import annotations

from typing import Any

import peft
import torch

from ds_fira.optim.state_size import state_bytes
from ds_fira.tools.dry_run import plan_run
from ds_fira.tools.estimate.methods import lora_numel
from ds_fira.tools.estimate.paper import BYTES
from ds_fira.tools.models import config_file
from examples.reproduction.lib.memory_measure import add_lora, build

MODEL = "llama_7b"
RANK = 32
# The figures of Table 3, "G"; weights of the pre-trained model are left out (Appendix A.8).
PUBLISHED = {"Fira": 0.26, "GaLore": 0.26, "LoRA": 0.35, "Prefix": 0.05}
# "Where" in Table 6, and every linear layer of a block.
TABLE_6 = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The paper gives no length of the prefix.
VIRTUAL_TOKENS = 30
NOMINAL = 7e9


def table_3() -> list[dict[str, Any]]:
    """Every cell that can be computed; Series and Parallel need bottleneck sizes, which the paper does not give.

    Returns:
        `method`, `published`, and `readings`: by their names, bytes.
    """
    run = {
        modules: plan_run(build(config_file(MODEL), "meta"), 1, 0, **_settings(modules)) for modules in (TABLE_6, EVERY)
    }
    names = {TABLE_6: "modules of Table 6", EVERY: "all seven linear layers of a block"}
    fira, galore, lora = {}, {}, {}
    for modules, name in names.items():
        records = [record for record in run[modules].records if record.rank is not None]
        elements = sum(record.state_elements for record in records)
        fira[name] = BYTES * elements
        galore[name] = BYTES * (elements - sum(record.matrices for record in records))
        # An adapter is weights and two moments.
        lora[name] = 3 * BYTES * sum(lora_numel(record.shape, RANK) for record in records)
    total, adapters, held = _lora()
    assert adapters * 3 * BYTES == lora[names[TABLE_6]], (adapters, lora)
    share = round(adapters / total, 4)
    lora[f"modules of Table 6, {share:.2%} of 7e9 weights"] = round(3 * BYTES * share * NOMINAL)
    fira_held = sum(
        group.state_bytes(0, torch.bfloat16, sharded=False) for group in run[TABLE_6].groups if group.layout is not None
    )
    readings = {"Fira": fira, "GaLore": galore, "LoRA": lora, "Prefix": {f"{VIRTUAL_TOKENS} virtual tokens": _prefix()}}
    measured = {"Fira": fira_held, "LoRA": held}
    return [
        {"method": method, "published": figure, "readings": readings[method], "measured": measured.get(method)}
        for method, figure in PUBLISHED.items()
    ]


def _settings(modules: tuple[str, ...]) -> dict[str, Any]:
    return {"rank": RANK, "target_modules": list(modules), "state_dtype": "bfloat16"}


def _lora() -> tuple[int, int, int]:
    """Weights of the model, those of peft's adapters, and bytes of adapters with AdamW's states after a step."""
    model = build(config_file(MODEL), "meta")
    total = sum(param.numel() for param in model.parameters())
    model = add_lora(model, RANK, TABLE_6, train_rest=False)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    for param in trained:
        param.grad = torch.empty_like(param)
    optimizer.step()
    count = sum(param.numel() for param in trained)
    return total, count, BYTES * count + state_bytes(optimizer)


def _prefix() -> int:
    """Bytes of peft's prefix with two moments, all in bfloat16."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    model = peft.get_peft_model(build(config_file(MODEL), "meta"), config)
    return 3 * BYTES * model.get_nb_trainable_parameters()[0]
