"""Fira for DeepSpeed: full-rank training with low-rank optimizer states, sharded by ZeRO.

Importing this package registers `FiraAdam`, `GaLoreAdam`, `ApolloAdam` and `FiraRMSProp` with DeepSpeed, so that
`"optimizer": {"type": "FiraAdam"}` works in a DeepSpeed config. Without DeepSpeed the optimizers work by themselves.
"""

from ds_fira.checkpoint.released_files import read_released_state
from ds_fira.core.rules import Rule
from ds_fira.engine.backward_steps import step_in_backward
from ds_fira.engine.doors import add_doors
from ds_fira.optim.fira_adam import ApolloAdam, FiraAdam, GaLoreAdam
from ds_fira.optim.low_rank_state import LowRankState, low_rank_state, set_low_rank_state
from ds_fira.optim.param_groups import param_groups
from ds_fira.optim.plug import FiraRMSProp, plug
from ds_fira.optim.report import memory_report, metrics, read_scaling_factors, scaling_factors, write_scaling_factors
from ds_fira.optim.state_size import state_bytes
from ds_fira.optim.whole_state import whole_state_dict
from ds_fira.runtime import import_deepspeed
from ds_fira.runtime.termination import Termination
from ds_fira.version import __version__

add_doors()
if import_deepspeed():
    from ds_fira.engine.deepspeed.agreement import DeviatingRank
    from ds_fira.engine.deepspeed.patches import register
    from ds_fira.engine.deepspeed.released import load_released_state
    from ds_fira.runtime.activation_checkpointing import checkpoint_activations
    from ds_fira.runtime.process import init_distributed, shutdown

    register()

__all__ = [
    "ApolloAdam",
    "DeviatingRank",
    "FiraAdam",
    "FiraRMSProp",
    "GaLoreAdam",
    "LowRankState",
    "Rule",
    "Termination",
    "__version__",
    "checkpoint_activations",
    "init_distributed",
    "load_released_state",
    "low_rank_state",
    "memory_report",
    "metrics",
    "param_groups",
    "plug",
    "read_released_state",
    "read_scaling_factors",
    "register",
    "scaling_factors",
    "set_low_rank_state",
    "shutdown",
    "state_bytes",
    "step_in_backward",
    "whole_state_dict",
    "write_scaling_factors",
]


def __getattr__(name: str) -> object:
    """A name that is not there: where it is one of this package, DeepSpeed is missing."""
    if name in __all__:
        raise ImportError(f"ds_fira.{name} needs DeepSpeed, which is not installed: pip install deepspeed.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
