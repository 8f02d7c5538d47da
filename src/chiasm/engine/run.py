"""One run, from its settings to its model file: what `chiasm train` does once and `chiasm compare` many times."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.config import TrainConfig
from chiasm.engine.checks import check_data
from chiasm.engine.run_folder import RunFolder
from chiasm.errors import ChiasmError, DataError, InterruptedRunError, TrainingError
from chiasm.tasks.validation import score_of

if TYPE_CHECKING:
    from rich.console import Console

    from chiasm.data import ImageData
    from chiasm.engine.interrupt import Interrupt
    from chiasm.engine.state import RunState, Stopwatch

# Lightning starts the further processes of one machine by running the same command again; this tells them the folder.
SHARED_RUN = "CHIASM_RUN_FOLDER"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Attributes:
        run: the run folder.
        model: the model file of the best epoch, or with `keep='last'` of the last.
        score: the best validation score, 0..1.
        metric: which score that is, a name of tasks/validation.py: 'top1' for classification.
        branches: each branch's own top-1 in that epoch, by name; empty for a one-branch model and for other tasks.
        best_epoch: the epoch it was reached after, from 1.
        epochs: epochs trained.
        seconds: wall time over all sessions of the run.
        images_per_second: training speed, validation left out.
    """

    run: str
    model: str
    score: float
    metric: str
    branches: dict[str, float] = field(default_factory=dict)
    best_epoch: int
    epochs: int
    seconds: float
    images_per_second: float


def run_training(
    config: TrainConfig,
    run: RunFolder | None = None,
    *,
    watch: Stopwatch,
    interrupt: Interrupt,
    console: Console,
    report: Callable[[float, str], None] | None = None,
) -> TrainResult:
    """Train as `config` says, or go on with `run`.

    Args:
        config: the settings, checked; `task` is not 'auto'.
        run: an existing run to go on with from its last complete checkpoint; a finished one is left as it is.
        watch: running since the work began.
        interrupt: entered; it ends the run after Ctrl-C or SIGTERM.
        console: where the run is shown.
        report: told now and then which share of the run is done, 0..1, and where it is; then nothing is shown of it.

    Raises:
        DataError, TrainingError, InterruptedRunError, ChiasmError: as `chiasm.train`.
    """
    from pytorch_lightning.utilities import rank_zero_only

    from chiasm.data import open_data
    from chiasm.engine.build import build_task
    from chiasm.engine.checkpoints import STATE_KEY, read_checkpoint
    from chiasm.engine.fit import fit
    from chiasm.engine.state import RunState

    first = getattr(rank_zero_only, "rank", 0) == 0
    console.quiet |= not first
    new = run is None
    resume = run is not None and run.last.exists()
    state = RunState()
    if run is not None and resume:
        checkpoint = read_checkpoint(run.last)
        state.restore(checkpoint[STATE_KEY])
        del checkpoint
        if state.finished and run.summary.exists():
            console.print(f"{run.path} is finished: {state.epoch} epochs, nothing left to do.")
            return _result(run, state)
    assert config.data is not None
    data = open_data(
        config.data,
        task=config.task,
        val_fraction=config.val_fraction,
        seed=config.seed,
        ignore_index=config.ignore_index,
    )
    data.need(config.task)
    check_data(data)
    seen = data.fingerprint()
    if resume and state.data != seen:
        raise DataError(f"{config.data}: not the images this run was started on; put them back or start a new run.")
    task, info, loaded = build_task(config, data, load=not resume)
    if loaded:
        console.print(loaded)
    info = replace(info, data=config.data, seed=config.seed, val_fraction=config.val_fraction, fingerprint=seen)
    if run is None:
        run = _shared_run(config, data.name, first)
    state.data = seen
    train_images, val_images = len(data.splits["train"]), len(data.splits["val"])
    parameters = sum(value.numel() for value in task.parameters())
    height, width = info.preprocess.size
    begin = f"going on after epoch {state.epoch}, batch {state.batch}" if resume else "from the start"
    console.print(
        f"{config.model} ({parameters / 1e6:.1f}M parameters, {height}x{width} px) on {data.name}: "
        f"{train_images} training and {val_images} validation images, {len(data.classes)} classes; "
        f"{begin}, in {run.path}"
    )
    interrupt.hint = f"to go on: chiasm train --resume {run.path}"
    if not state.finished:
        try:
            fit(
                task,
                data,
                info,
                config,
                run,
                state,
                resume=resume,
                watch=watch,
                interrupt=interrupt,
                console=console,
                report=report,
            )
        except ChiasmError as error:
            # What failed in training can be resumed; what was asked wrongly leaves the name free.
            if new and first and not isinstance(error, (TrainingError, InterruptedRunError)):
                run.discard_unused()
            raise
        finally:
            os.environ.pop(SHARED_RUN, None)
    if first:
        _finish(run, config, state, parameters, data)
    return _result(run, state)


def _shared_run(config: TrainConfig, data_name: str, first: bool) -> RunFolder:
    """The folder of a new run: the first process makes it, the others are told."""
    if config.out is None and (config.num_nodes > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        raise ChiasmError("give --out: processes started by torchrun or on several machines need one run folder.")
    if not first:
        return RunFolder(Path(config.out or os.environ[SHARED_RUN]))
    run = RunFolder.create(config, data_name)
    os.environ[SHARED_RUN] = str(run.path)
    return run


def _finish(run: RunFolder, config: TrainConfig, state: RunState, parameters: int, data: ImageData) -> None:
    from chiasm.engine.summary import summarize

    with run.told_when_full():
        run.write_metrics(state.history)
        run.write_curves(state.history)
        run.write_summary(summarize(config, state, parameters, data))


def _result(run: RunFolder, state: RunState) -> TrainResult:
    best = state.best_row
    return TrainResult(
        run=str(run.path),
        model=str(run.model),
        score=state.best_score,
        metric=score_of(best),
        branches={name[9:]: value for name, value in best.items() if name.startswith("val_top1_")},
        best_epoch=state.best_epoch,
        epochs=state.epoch,
        seconds=state.seconds,
        images_per_second=state.images * state.world_size / max(1e-9, state.train_seconds),
    )
