"""Fira for DeepSpeed: full-rank training with low-rank optimizer states, sharded by ZeRO.

Importing this package registers `FiraAdam`, `GaLoreAdam` and `FiraRMSProp` with DeepSpeed, so that
`"optimizer": {"type": "FiraAdam"}` works in a DeepSpeed config.
"""

import ds_fira.runtime.command_output  # noqa: F401

# isort: split
from ds_fira.checkpoint.released_files import read_released_state
from ds_fira.core.rules import Rule
from ds_fira.engine.deepspeed.agreement import DeviatingRank
from ds_fira.engine.deepspeed.attach import register
from ds_fira.engine.deepspeed.monitor import register_monitor_hook
from ds_fira.engine.deepspeed.peers import register_agreement
from ds_fira.engine.deepspeed.released import load_released_state
from ds_fira.engine.deepspeed.report import memory_report, metrics
from ds_fira.engine.deepspeed.save_load.client_state import register_resume
from ds_fira.engine.deepspeed.scaling_report import read_scaling_factors, scaling_factors, write_scaling_factors
from ds_fira.engine.deepspeed.weight_sync import register_sync
from ds_fira.optim.fira_adam import FiraAdam, GaLoreAdam
from ds_fira.optim.param_groups import param_groups
from ds_fira.optim.plug import FiraRMSProp, plug
from ds_fira.optim.state_size import state_bytes
from ds_fira.runtime.activation_checkpointing import checkpoint_activations
from ds_fira.runtime.process import init_distributed, shutdown
from ds_fira.runtime.termination import Termination
from ds_fira.version import __version__

register()
register_monitor_hook()
register_sync()
register_resume()
register_agreement()

__all__ = [
    "DeviatingRank",
    "FiraAdam",
    "FiraRMSProp",
    "GaLoreAdam",
    "Rule",
    "Termination",
    "__version__",
    "checkpoint_activations",
    "init_distributed",
    "load_released_state",
    "memory_report",
    "metrics",
    "param_groups",
    "plug",
    "read_released_state",
    "read_scaling_factors",
    "register",
    "scaling_factors",
    "shutdown",
    "state_bytes",
    "write_scaling_factors",
]
