"""What is shown while training: a bar with the time left on a terminal, and a line per epoch everywhere."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from chiasm.engine.module import Training
from chiasm.engine.state import Stopwatch
from chiasm.tasks.validation import SCORES, other_scores, score_of

REFRESH_SECONDS = 0.5


class Show(Callback):
    """Shows the run on `console`, or tells `report` its share and where it is; only the main process does."""

    def __init__(self, console: Console, report: Callable[[float, str], None] | None = None) -> None:
        self.console = console
        self.report = report
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._watch = Stopwatch()
        self._shown = Stopwatch()
        self._before = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        self._watch = Stopwatch()
        self._before = _share(pl_module)
        if trainer.is_global_zero and self.console.is_terminal and self.report is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=1.0, left="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._shows and self._shown.seconds > REFRESH_SECONDS:
            assert isinstance(pl_module, Training)
            state = pl_module.state
            where = f"epoch {state.epoch + 1}, batch {state.batch}/{pl_module.batches}"
            self._update(pl_module, f"{where}, loss {state.epoch_loss / state.batch:.3f}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._shows:
            assert isinstance(pl_module, Training)
            self._update(pl_module, f"epoch {pl_module.state.epoch + 1}, validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        if not trainer.is_global_zero or self.report is not None:
            return
        state, config = pl_module.state, pl_module.config
        row = state.history[-1]
        score, others = score_of(row), [f"{words} {row[name]:.1%}" for name, words in other_scores(row).items()]
        of = "" if config.max_minutes is not None else f"/{config.epochs}"
        line = f"epoch {state.epoch}{of}  loss {row['train_loss']:.3f}  val {SCORES[score]} {row[f'val_{score}']:.1%}"
        line += f" ({', '.join(others)})" if others else ""
        line += f"  lr {row['lr']:.2g}  {_clock(row['seconds'])}"
        line += "  best" if state.best_epoch == state.epoch else ""
        if self._bar is None and not state.finished and (left := self._left(pl_module)):
            line += f"  ({left})"
        self.console.print(line)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @property
    def _shows(self) -> bool:
        return self._bar is not None or self.report is not None

    def _update(self, module: Training, text: str) -> None:
        self._shown = Stopwatch()
        if self.report is not None:
            self.report(_share(module), text)
        if self._bar is not None:
            self._bar.update(self._task, completed=_share(module), description=text, left=self._left(module))

    def _left(self, module: Training) -> str:
        """The time left at this process's speed so far."""
        share = _share(module)
        if share <= self._before:
            return ""
        return f"{_clock(self._watch.seconds * (1 - share) / (share - self._before))} left"

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _share(module: Training) -> float:
    """How much of the run is done, 0..1."""
    if module.config.max_minutes is not None:
        return min(1.0, module.watch.seconds / (module.config.max_minutes * 60))
    return (module.state.epoch + module.state.batch / module.batches) / module.config.epochs


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.1f} s"
