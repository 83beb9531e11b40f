"""What an engine's run is recorded with beside its csv files, at each start.

Written against DeepSpeed 0.19.8. What it relies on: `DeepSpeedEngine.monitor.csv_monitor` is None without that block in
the config, and has the folder of the csv files as `log_dir`, on rank 0 alone; `_config._param_dict` is the
configuration as it was given.
"""

from __future__ import annotations

import math
from pathlib import Path

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_fira.core.settings import GroupSettings
from ds_fira.engine.deepspeed.description import plain
from ds_fira.observe import run_record
from ds_fira.optim.base import LowRankOptimizer
from ds_fira.optim.settings import settings_of


def record_start(engine: DeepSpeedEngine, event_steps: int) -> None:
    """Write what this start of a run consists of, on rank 0, where the csv monitor is on; sends nothing.

    Args:
        engine: which trains with an optimizer of this package.
        event_steps: optimizer steps from one event to the next.

    Raises:
        OSError: the file cannot be written.
    """
    folder = getattr(engine.monitor.csv_monitor, "log_dir", None)
    if folder is None:
        return
    optimizer: LowRankOptimizer = engine.basic_optimizer
    projected = [group for group in optimizer.param_groups if group.get("rank") is not None]
    # As they act: without a choice, the limiter goes with the residual, and the precision with the device.
    chosen = [{**settings_of(group), **GroupSettings.of(group).chosen} for group in projected]
    # A schedule changes the rate at every step; its values are in a csv file.
    settings = [{name: plain(value) for name, value in group.items() if name != "lr"} for group in chosen]
    run_record.add_start(
        Path(folder),
        run_record.Start(
            step=engine.global_steps,
            samples=engine.global_samples,
            at=run_record.now(),
            optimizer=type(optimizer).__name__,
            settings=run_record.settings_of_all(settings),
            event_steps=event_steps,
            samples_per_step=engine.train_batch_size(),
            ranks=engine.dp_world_size,
            parameters=sum(math.prod(record.shape) for record in optimizer.inventory),
            projected_matrices=sum(record.matrices for record in optimizer.inventory),
            config=run_record.without_secrets(plain(engine._config._param_dict)),
            environment=run_record.environment(engine.device),
        ),
    )
