"""Fira for DeepSpeed: full-rank training with low-rank optimizer states, sharded by ZeRO.

Importing this package registers `FiraAdam`, `GaLoreAdam` and `FiraRMSProp` with DeepSpeed, so that
`"optimizer": {"type": "FiraAdam"}` works in a DeepSpeed config.
"""

import ds_fira.command_output  # noqa: F401

# isort: split
from ds_fira.activations import checkpoint_activations
from ds_fira.fira_adam import FiraAdam
from ds_fira.foreign import load_released_state
from ds_fira.galore_adam import GaLoreAdam
from ds_fira.groups import param_groups
from ds_fira.memory import state_bytes
from ds_fira.plug_and_play import FiraRMSProp, plug
from ds_fira.released import read_released_state
from ds_fira.report import memory_report, metrics
from ds_fira.rules import Rule
from ds_fira.runtime import init_distributed, shutdown
from ds_fira.scaling_report import read_scaling_factors, scaling_factors, write_scaling_factors
from ds_fira.termination import Termination
from ds_fira.version import __version__
from ds_fira.zero import register
from ds_fira.zero_agree import DeviatingRank
from ds_fira.zero_monitor import register_watch
from ds_fira.zero_peers import register_agreement
from ds_fira.zero_resume import register_resume
from ds_fira.zero_sync import register_sync

register()
register_watch()
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
