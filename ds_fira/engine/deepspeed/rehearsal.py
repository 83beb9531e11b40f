"""An engine that has read its config and been given its module, and goes no further: what a start would refuse.

It starts no process and holds no tensor, so it can be asked on any machine, for any number of ranks. All it says comes
from DeepSpeed's methods and from the checks that a real engine goes through.

Written against DeepSpeed 0.17 to 0.19. What it relies on: `DeepSpeedConfig` sets `world_size` before it settles the
batch in `_configure_train_batch_size`; the methods of an engine that say what its config holds read `_config` alone.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import deepspeed
import hjson
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ValidationError
from torch import nn

from ds_fira.core.algorithms import Algorithm
from ds_fira.engine.deepspeed.attach import make_optimizer
from ds_fira.engine.deepspeed.chosen import checked_params, our_name
from ds_fira.engine.deepspeed.config_keys import NotedConfig
from ds_fira.engine.deepspeed.unsupported import refuse_sharding, unsupported_settings, warn_if_untested
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.registry import TYPES
from ds_fira.optim.settings import refuse_auto
from ds_fira.sharding.projection import is_projected

# Ahead of DeepSpeed's own sentences.
DEEPSPEED = "DeepSpeed: "


class RanksConfig(DeepSpeedConfig):
    """A config as some number of ranks read it, of which none need have started.

    Args:
        content: of the file.
        ranks: data-parallel ranks.

    Raises:
        ValueError: DeepSpeed refuses it; one sentence.
    """

    def __init__(self, content: NotedConfig, ranks: int) -> None:
        sequence_parallel = content.get("sequence_parallel_size", 1)
        self._ranks = ranks // sequence_parallel if isinstance(sequence_parallel, int) else ranks
        try:
            super().__init__(content)
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise ValueError(f"{DEEPSPEED}{error.title}: {where} = {found['input']!r}: {found['msg']}.") from None
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"{DEEPSPEED}{_sentence(error)}") from None

    def _configure_train_batch_size(self) -> None:
        self.world_size = self._ranks
        super()._configure_train_batch_size()


class Rehearsal(DeepSpeedEngine):
    """An engine with a config and a module, which trains nothing.

    Args:
        content: of the config file, without "auto" values.
        module: on any device; of its parameters only shapes and dtypes are read.
        ranks: data-parallel ranks.

    Attributes:
        content: the config, which knows which of its keys were read.
        read: the same as DeepSpeed has read it.
        refusals: every sentence with which a start would end, in the order in which it would.
        said: what it would warn of.
        made: the optimizer, without states; None where it is refused.
        master_dtype: of the weights that it steps.

    Raises:
        ValueError: DeepSpeed cannot read the config, or it names no optimizer of this package; one sentence.
    """

    def __init__(self, content: Mapping[str, object], module: nn.Module, ranks: int) -> None:
        nn.Module.__init__(self)
        self.content = NotedConfig(content)
        self.read = self._config = RanksConfig(self.content, ranks)
        self.client_optimizer = self.client_lr_scheduler = self.mpu = None
        self.module, self.global_rank, self.pipeline_parallelism = module, 0, False
        self.has_moe_layers = any(isinstance(each, MoE) for each in module.modules())
        name = our_name(None, self.optimizer_name())
        if name is None:
            raise ValueError(
                f"optimizer.type = {self.optimizer_name()!r} is no optimizer of ds_fira, and trains without it; set it "
                f"to one of {', '.join(TYPES)}."
            )
        self.algorithm: Algorithm = TYPES[name].algorithm
        self.refusals: list[str] = []
        self.said: list[str] = []
        self.made: LowRankOptimizer | None = None
        self.master_dtype = torch.float32
        with warnings.catch_warnings(record=True) as caught, _first_rank():
            warnings.simplefilter("always")
            self._rehearse(ranks)
        ours = (text for text in (str(each.message) for each in caught) if text.startswith(name))
        self.said = list(dict.fromkeys(ours))

    def _rehearse(self, ranks: int) -> None:
        """Go through the checks of a start, in its order, each whether or not the one before refused."""
        name = self.algorithm.name
        # DeepSpeed's own, without ours around them, which compare ranks.
        own = (
            inspect.unwrap(DeepSpeedEngine._do_sanity_check),
            inspect.unwrap(DeepSpeedEngine._do_optimizer_sanity_check),
        )
        self._try(lambda: own[0](self), DEEPSPEED)
        self._try(lambda: warn_if_untested.__wrapped__(deepspeed.__version__, name))
        self._try(lambda: refuse_auto(self._config._param_dict, name))
        self.refusals += unsupported_settings(self, name)
        self._try(lambda: checked_params(self))
        refuse = getattr(DeepSpeedEngine, "_validate_zero3_moe_compatibility", None)
        if self.zero_optimization_stage() == 3 and refuse is not None:
            self._try(lambda: refuse(self), DEEPSPEED)
        if self.refusals:
            return
        # AutoEP came with 0.19.
        if getattr(getattr(self._config, "expert_parallel_config", None), "enabled", False):
            warnings.warn(
                f"{name}: expert_parallel.enabled = True replaces the model's layers of experts as the engine starts; "
                "what is planned here is the model as it is, all of its experts on every rank.",
                stacklevel=2,
            )
        self._try(lambda: self._make(ranks))
        if self.made is not None:
            self._try(lambda: own[1](self, self.made), DEEPSPEED)
            self._try(self._settle_masters)

    def _make(self, ranks: int) -> None:
        made = make_optimizer(self, self.module.parameters(), ranks)
        stage = self.zero_optimization_stage()
        if stage > 0:
            plain = (not is_projected(tuple(p.shape), group) for group in made.param_groups for p in group["params"])
            refuse_sharding(self.algorithm, any(plain), stage)
        self.made = made

    def _settle_masters(self) -> None:
        """DeepSpeed's own rule for the dtype of master weights under ZeRO."""
        settle = getattr(ZeROOptimizer, "_configure_master_weights", None)
        if self.zero_optimization_stage() == 0 or settle is None:
            return

        def refuse() -> None:
            raise ValueError(
                "DeepSpeed keeps master weights below float32 with offload_optimizer alone, but for "
                "bf16_master_weights_and_grads with bf16_optimizer_states; set these two in the bf16 block, or "
                "offload_optimizer.device = 'cpu', or remove them."
            )

        low, half = self._config.bfloat16_config, self._config.float16_config
        self.master_dtype = settle(
            SimpleNamespace(optimizer=self.made),
            fp16_master_weights_and_gradients=half.fp16_master_weights_and_grads,
            bf16_master_weights_and_gradients=low.bf16_master_weights_and_grads,
            bf16_optimizer_states=low.bf16_optimizer_states,
            offload_enabled=self.zero_use_cpu_optimizer(),
            fp16_offload_validator=refuse,
            bf16_offload_validator=refuse,
        )

    def _try(self, check: Callable[[], object], whose: str = "") -> None:
        try:
            check()
        except (AssertionError, NotImplementedError, ValueError) as error:
            self.refusals.append(whose + _sentence(error))

    def destroy(self) -> None:
        """Nothing is held."""


@contextmanager
def _first_rank() -> Iterator[None]:
    """DeepSpeed's checks ask for this process's rank, to print on the first; without ranks it has no answer."""
    asked = deepspeed.comm.get_rank
    deepspeed.comm.get_rank = lambda group=None: 0
    try:
        yield
    finally:
        deepspeed.comm.get_rank = asked


def read_file(text: str) -> dict[str, object]:
    """The content of a config file, read as DeepSpeed reads it: JSON, or HJSON with comments.

    Raises:
        ValueError: it cannot be read, a key stands in it twice, or it is no object.
    """
    content = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__} where an object belongs")
    return dict(content)


def _sentence(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
