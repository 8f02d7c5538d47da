"""chiasm train: images in, a run folder with a trained model out."""

from __future__ import annotations

import os
from typing import Any

from chiasm.config import TrainConfig
from chiasm.engine.checks import check_settings
from chiasm.engine.run import TrainResult, run_training
from chiasm.engine.run_folder import RunFolder, resumed_config
from chiasm.tasks.validation import SCORES


def train(**flags: Any) -> TrainResult:
    """Train a model; the keyword arguments are the fields of `TrainConfig`, over the defaults of `recipe` and `task`.

    Without a task it is what the data is annotated for.

    With `resume` the run goes on from its last complete checkpoint with its own settings; a finished run is left as it
    is and its result returned.

    Raises:
        DataError: for data that cannot be trained on.
        TrainingError: when the loss is not finite or the disk is full; the last complete checkpoint is kept.
        InterruptedRunError: after Ctrl-C or SIGTERM, with everything saved.
        ChiasmError: for settings that contradict each other, this machine or, on resume, the run.
    """
    from rich.console import Console

    from chiasm.engine.interrupt import Interrupt
    from chiasm.engine.state import Stopwatch

    watch = Stopwatch()
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    run = None
    if flags.get("resume") is not None:
        run, saved = RunFolder.open(flags["resume"])
        config = resumed_config(saved, flags)
    else:
        config = TrainConfig.from_flags(**flags)
        if config.task == "auto":
            from chiasm.data.formats import task_of

            config = TrainConfig.from_flags(**(flags | {"task": task_of(str(config.data))}))
    check_settings(config)
    with Interrupt() as interrupt:
        return run_training(config, run, watch=watch, interrupt=interrupt, console=console)


def show(result: TrainResult, config: TrainConfig) -> int:
    """Print what came out; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # of several processes the first one tells
    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    branches = ", ".join(f"{name} alone {value:.1%}" for name, value in result.branches.items())
    best = f"best val {SCORES[result.metric]} {result.score:.1%}"
    console.print(f"{best} (epoch {result.best_epoch} of {result.epochs})", style="bold")
    if branches:
        console.print(branches)
    console.print(f"{result.seconds / 60:.1f} minutes, {result.images_per_second:.0f} images/s")
    of = "" if config.keep == "best" else f" (epoch {result.epochs})"
    console.print(f"model  {result.model}{of}\nnext   chiasm evaluate {result.run}")
    return 0
