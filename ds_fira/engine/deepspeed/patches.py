"""Every patch of DeepSpeed, in one table.

DeepSpeed looks a JSON type outside its own list up in `torch.optim`, gives it parameters without names, wraps it
without telling it what lies where, and saves and loads checkpoints in its own way. So methods are wrapped, each by a
plain function `f(original, *args, **kwargs)` of the file that its row names. Every such function asks first whether the
engine trains with an optimizer of this package, and otherwise only calls the original.

Rows of one method nest in the order of the table: the first is called last, next to DeepSpeed's own code. So a step
goes through `step` and `_take_model_step` of the engine, then `step` and `_update_scale` of the optimizer wrapper, and
meets: failures of other ranks, the comparison of weights, the monitors, the loss scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import deepspeed
import deepspeed.runtime.engine as deepspeed_engine
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import mixed_precision_linkage, zero_to_fp32

from ds_fira.engine.deepspeed import (
    attach,
    loss_scale,
    monitor,
    moved_states,
    offload,
    param_states,
    peers,
    schedulers,
    stage_norm,
    swapped,
    thawed,
    weight_sync,
)
from ds_fira.engine.deepspeed.save_load import behind, client_state, load, pick, save
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.registry import TYPES, add_types

# What an optimizer of this package may be wrapped in.
WRAPPERS = (*loss_scale.WRAPPERS, BF16_Optimizer)
# On a class or module of DeepSpeed: the rows that are on.
_INSTALLED = "_ds_fira_patches"


@dataclass(frozen=True, slots=True)
class Patch:
    """One method or function of DeepSpeed, and what wraps it.

    Attributes:
        owner: the class or module that has it.
        name: of the method.
        wrapper: called with the original and its arguments.
        optional: whether a supported release of DeepSpeed lacks the method.
    """

    owner: type | ModuleType
    name: str
    wrapper: Callable[..., object]
    optional: bool = False

    @property
    def key(self) -> str:
        """The row's name among those of its owner."""
        return f"{self.name}: {self.wrapper.__module__}.{self.wrapper.__qualname__}"


# Above each row: what it is for; what it relies on in DeepSpeed.
PATCHES = (
    # --- An engine is built.
    # An error before any engine is begun ends every rank; scripts call it as deepspeed.initialize.
    Patch(deepspeed, "initialize", peers.agree_on_failed_start),
    # The ranks agree on what they build, or all hear why one failed; all of this part is called from it.
    Patch(DeepSpeedEngine, "__init__", peers.build_among_peers),
    # Refuses unsupported settings, then compares config, model and parameters over the ranks; called with the config in
    # _config, before the first collective.
    Patch(DeepSpeedEngine, "_do_sanity_check", attach.check_config),
    Patch(DeepSpeedEngine, "_do_sanity_check", peers.agree_on_config),
    # Makes the optimizer with the names of its parameters; called for a JSON type, with the parameters.
    Patch(DeepSpeedEngine, "_configure_basic_optimizer", attach.build_optimizer),
    # Compares the optimizer over the ranks; called with it before it is wrapped.
    Patch(DeepSpeedEngine, "_do_optimizer_sanity_check", peers.agree_on_optimizer),
    # Lets masters of 16 bits be offloaded; asks for DeepSpeedCPUAdam, by keywords. From 0.18 on.
    Patch(ZeROOptimizer, "_configure_master_weights", offload.choose_master_dtype, optional=True),
    # One optimizer steps what is offloaded and what is not: takes it and the ratio; deals the sub-groups out.
    Patch(DeepSpeedZeroOptimizer_Stage3, "__init__", offload.build),
    Patch(DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", offload.deal_out),
    # Tells the optimizer what lies where, and every rank of an error before that; sets basic_optimizer and its wrapper
    # optimizer.
    Patch(DeepSpeedEngine, "_configure_optimizer", attach.attach_built),
    Patch(DeepSpeedEngine, "_configure_optimizer", peers.agree_on_refusal),
    # Schedulers count the groups that the user gave: called once the wrapper is there; asked by DeepSpeed's schedulers.
    Patch(DeepSpeedEngine, "_configure_lr_scheduler", schedulers.schedule_user_groups),
    Patch(lr_schedules, "get_torch_optimizer", schedulers.optimizer_to_schedule),
    # So does who reads or sets a rate by hand, and get_lr and get_mom; DeepSpeed reads its own groups elsewhere.
    *(Patch(wrapper, "param_groups", schedulers.param_groups_of) for wrapper in WRAPPERS),
    # Lets a process that loses another one say so; called once, after the optimizer is there.
    Patch(DeepSpeedEngine, "_configure_checkpointing", save.explain_lost_contact),
    # --- It trains.
    # Raises what another rank has published.
    Patch(DeepSpeedEngine, "forward", peers.call_among_peers),
    # Multiplies the loss by the scale of stage 0; DeepSpeed returns the loss as it is where it does not. From 0.18 on.
    Patch(DeepSpeedEngine, "scale", loss_scale.scale_loss, optional=True),
    # The same; then adds up the micro-batch's share of the loss, which is returned; then as forward.
    Patch(DeepSpeedEngine, "backward", loss_scale.scale_backward),
    Patch(DeepSpeedEngine, "backward", monitor.add_loss),
    Patch(DeepSpeedEngine, "backward", peers.call_among_peers),
    # Lets the loss scale grow after the step; step calls _update_scale before it divides the gradients by the scale.
    *(Patch(wrapper, "_update_scale", loss_scale.put_off_growth) for wrapper in loss_scale.WRAPPERS),
    *(Patch(wrapper, "step", loss_scale.grow_after_step) for wrapper in loss_scale.WRAPPERS),
    # Sums the squares of a gradient over the stages of a pipeline once, not once a group.
    Patch(DeepSpeedZeroOptimizer, "scaled_global_norm", stage_norm.norm_over_stages),
    # Refuses to leave out what has been thawed, writes events, then compares the weights; makes the optimizer step on
    # every rank, counts global_steps and global_samples.
    Patch(DeepSpeedEngine, "_take_model_step", thawed.refuse_thawed),
    Patch(DeepSpeedEngine, "_take_model_step", monitor.report_step),
    Patch(DeepSpeedEngine, "_take_model_step", weight_sync.check_after_step),
    # Tells the others of an error, and raises theirs; global_steps counts the steps before.
    Patch(DeepSpeedEngine, "step", peers.step_among_peers),
    # Raises what went wrong in a save from behind, before anything is stepped; called on all ranks alike.
    Patch(DeepSpeedEngine, "step", behind.hear_before_step),
    # The same of a pipeline, which steps in it; called on all ranks alike.
    Patch(PipelineEngine, "train_batch", peers.step_among_peers),
    Patch(PipelineEngine, "train_batch", behind.hear_before_step),
    # --- A script reads and sets states by deepspeed.utils.safe_get_* and safe_set_*.
    # Of stages 1 and 2: become methods of every parameter, whose optimizer is noted.
    Patch(mixed_precision_linkage, "get_full_hp_param", param_states.get_full),
    Patch(mixed_precision_linkage, "set_full_hp_param", param_states.set_full),
    # Of stage 3: take the key of a state last, or leave it out for the weights.
    *(Patch(DeepSpeedZeroOptimizer_Stage3, name, wrapper) for name, wrapper in param_states.OF_STAGE_3.items()),
    # --- Its states leave the GPU for a while.
    # Of stage 3: asks for the optimizer's class, notes in offloaded_states what it has moved.
    Patch(DeepSpeedZeroOptimizer_Stage3, "offload_states", moved_states.offload_stage_3, optional=True),
    Patch(stage3, "reload_adam_states", moved_states.reload, optional=True),
    Patch(DeepSpeedZeroOptimizer_Stage3, "get_hp_param_device", moved_states.state_device, optional=True),
    # Of stages 1 and 2: would put the host's numbers on the GPU. From 0.18 on.
    Patch(stage_1_and_2, "offload_optimizer_states", moved_states.offload, optional=True),
    Patch(stage_1_and_2, "reload_optimizer_states", moved_states.reload, optional=True),
    # --- Its states and weights lie on a disk.
    # Of states only those that it brings back as they were; gradients where a disk can read them to. From 0.19 on.
    Patch(OptimizerSwapper, "_get_state_tensors", swapped.states_to_swap, optional=True),
    Patch(OptimizerSwapper, "_swap_out_gradients", swapped.swap_aligned_gradients, optional=True),
    # Read and set what is there, and know nothing of files.
    *(Patch(DeepSpeedZeroOptimizer_Stage3, name, swapped.call_mapped) for name in param_states.OF_STAGE_3),
    # --- It saves and loads.
    # Survives a crash, with generators, counters and records; writes through checkpoint_engine.save and
    # _copy_recovery_script, and client_state beside the weights.
    Patch(DeepSpeedEngine, "save_checkpoint", save.save_whole),
    # Hide files that are not the checkpoint's; loading finds its files through these.
    Patch(DeepSpeedEngine, "_get_all_ckpt_names", pick.find_listed),
    Patch(zero_to_fp32, "get_checkpoint_files", pick.find_listed),
    # Takes weights alone at stage 3 from the tag that is loaded; takes the tag after the folder, else reads latest.
    Patch(deepspeed_engine, "get_fp32_state_dict_from_zero_checkpoint", pick.consolidate_tag),
    # Skips states that the row below has loaded, runs no code of a file; returns whether it has loaded.
    Patch(DeepSpeedEngine, "_load_zero_checkpoint", load.load_zero_states),
    # Loads what other ranks, stages and dtypes saved, runs no code of a file; takes all but folder and tag by keyword.
    Patch(DeepSpeedEngine, "_load_checkpoint", load.load_states),
    # Takes the newest complete checkpoint, then generators, counters and records; returns path and client state.
    Patch(DeepSpeedEngine, "load_checkpoint", save.load_whole),
    Patch(DeepSpeedEngine, "load_checkpoint", client_state.load_with_resume_state),
    # Gives the folder of checkpoints back.
    Patch(DeepSpeedEngine, "destroy", save.release_folder),
    # Find in memory what the engine has in files.
    Patch(DeepSpeedEngine, "save_checkpoint", swapped.call_mapped),
    Patch(DeepSpeedEngine, "load_checkpoint", swapped.call_mapped),
    # Both wait for a save from behind.
    Patch(DeepSpeedEngine, "load_checkpoint", behind.wait_before),
    Patch(DeepSpeedEngine, "destroy", behind.wait_before),
)

# Replaced on one object for the length of one call, and put back then: whose, what, by which file.
TEMPORARY = (
    ("TorchCheckpointEngine", "save", "save_load.capture"),  # takes what is to be written
    ("TorchCheckpointEngine", "makedirs", "save_load.capture"),  # none: the folder is made later
    ("an engine, not its class", "save_non_zero_checkpoint", "save_load.capture"),  # true: every rank has a part
    ("DeepSpeedEngine", "_copy_recovery_script", "save_load.capture"),  # into the staging folder, later
    ("DeepSpeedEngine", "_checkpoint_tag_validation", "save_load.capture"),  # none: the ranks agree on it later
    ("deepspeed.runtime.engine", "dist", "save_load.capture"),  # without barriers
    ("DeepSpeedEngine", "_get_all_ckpt_names", "save_load.load"),  # one model file for every rank
    ("DeepSpeedEngine", "load_module_state_dict", "save_load.load"),  # weights that other ranks saved
    ("DeepSpeedEngine", "_get_all_ckpt_names", "save_load.for_others"),  # likewise, of another optimizer
    ("DeepSpeedEngine", "load_module_state_dict", "save_load.for_others"),  # likewise
    ("DeepSpeedEngine", "load_universal_checkpoint", "save_load.universal"),  # false: it is loaded here
    ("DeepSpeedEngine", "load_universal_checkpoint", "save_load.for_others"),  # likewise, of another optimizer
    ("deepspeed.comm", "get_rank", "rehearsal"),  # 0, where no rank has started
    ("torch", "load", "checkpoint.safe_load"),  # runs no code of a file that DeepSpeed reads
)


def register(*types: type[LowRankOptimizer]) -> None:
    """Make `"type": "FiraAdam"` a DeepSpeed optimizer; called by `import ds_fira`, and again without effect.

    Args:
        *types: further optimizers of this package's kind, each by its class's name.
    """
    add_types(*types)
    ZERO_SUPPORTED_OPTIMIZERS.extend(kind for kind in TYPES.values() if kind not in ZERO_SUPPORTED_OPTIMIZERS)
    for patch in PATCHES:
        install(patch)


def is_installed(patch: Patch) -> bool:
    """Whether a method is wrapped by this package, whoever else has wrapped it before or since."""
    return patch.key in vars(patch.owner).get(_INSTALLED, ())


def install(patch: Patch) -> None:
    """Wrap a method, or what reads a property, once."""
    if is_installed(patch) or (patch.optional and not hasattr(patch.owner, patch.name)):
        return
    found = getattr(patch.owner, patch.name)
    original = found.fget if isinstance(found, property) else found

    @functools.wraps(original)
    def patched(*args: object, **kwargs: object) -> object:
        return patch.wrapper(original, *args, **kwargs)

    setattr(patch.owner, patch.name, found.getter(patched) if isinstance(found, property) else patched)
    setattr(patch.owner, _INSTALLED, (*vars(patch.owner).get(_INSTALLED, ()), patch.key))
