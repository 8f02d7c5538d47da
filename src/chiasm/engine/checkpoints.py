"""Checkpoints that are either complete or not there: written beside, synced, then renamed over the old one."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from chiasm.config import TrainConfig
from chiasm.engine.interrupt import Interrupt
from chiasm.engine.module import STATE_KEY, Training
from chiasm.engine.run_folder import RunFolder
from chiasm.engine.state import Stopwatch
from chiasm.errors import CheckpointError, ModelFileError, TrainingError
from chiasm.model_file import ModelInfo, save_model


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoint files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; what was there before stays until the new file is complete on disk.

        Raises:
            TrainingError: when it cannot be written, a full disk above all. The previous file is intact.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            _sync_folder(target.parent)
        # PyTorch's zip writer turns some failed writes into RuntimeError.
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            kept = "the previous checkpoint is intact" if target.exists() else "there is no earlier checkpoint"
            raise _no_room(
                f"{target}: cannot write the checkpoint ({_reason(error)}); {kept}.", target.parent.parent
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of ours, read without running code from it.

    Raises:
        CheckpointError: when the file is not there, is damaged, or is no checkpoint of a run.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there, so there is nothing to resume; start the run anew.") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({_reason(error)}).") from error
    if not isinstance(checkpoint, dict) or STATE_KEY not in checkpoint:
        raise CheckpointError(f"{path}: not a checkpoint of a chiasm run.")
    return checkpoint


class Checkpoints(Checkpoint):
    """Saves after each epoch, every `minutes` within one, and when a signal asks to stop; stops there too.

    The best epoch's checkpoint and the model file (of that epoch, or with `keep='last'` of each) are written first and
    `last.ckpt` becomes a second name of the same file, so a kill at any moment leaves a `last.ckpt` from which the rest
    is made again.
    """

    def __init__(self, run: RunFolder, info: ModelInfo, config: TrainConfig, interrupt: Interrupt) -> None:
        self.run = run
        self.info = info
        self.config = config
        self.interrupt = interrupt
        self._since_save = Stopwatch()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since_save = Stopwatch()
        self.interrupt.rearm()
        self.interrupt.patient = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Training)
        if pl_module.time_share >= 1:
            trainer.should_stop = True
        if trainer.should_stop or trainer.is_last_batch:
            return  # validation follows, and the epoch's checkpoint
        if pl_module.state.batch % self.config.accumulate:
            return  # gradients that are only half added up are in no checkpoint
        stop, due = _any_process(
            trainer,
            pl_module,
            self.interrupt.received is not None,
            self._since_save.seconds > self.config.checkpoint_minutes * 60,
        )
        if stop or due:
            pl_module.check_weights()
            self._save(trainer, self.run.last)
        if stop:
            self._stop(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        pl_module.check_weights()
        state = pl_module.state
        best = state.best_epoch == state.epoch
        if trainer.is_global_zero and (best or self.config.keep == "last"):
            try:
                save_model(self.run.model, pl_module.evaluated.model, self.info)
            except ModelFileError as error:
                raise _no_room(str(error), self.run.path) from error
        if best:
            self._save(trainer, self.run.best)
            if trainer.is_global_zero:
                _same_file(self.run.best, self.run.last)
        else:
            self._save(trainer, self.run.last)
        if trainer.is_global_zero:
            self.run.write_metrics(state.history)
        (stop,) = _any_process(trainer, pl_module, self.interrupt.received is not None)
        if stop and not state.finished:
            self._stop(pl_module)

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self._since_save = Stopwatch()

    def _stop(self, module: Training) -> None:
        state = module.state
        raise self.interrupt.error(
            f"all is saved up to epoch {state.epoch + 1}, batch {state.batch}. "
            f"To go on: chiasm train --resume {self.run.path}"
        )


def _any_process(trainer: pl.Trainer, module: pl.LightningModule, *flags: bool) -> list[bool]:
    """Each flag, true in all processes where it is true in one, so that they save and stop together."""
    if trainer.world_size == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.float32, device=module.device)
    return [bool(value) for value in trainer.strategy.reduce(values, reduce_op="max")]


def _reason(error: Exception) -> str:
    """In a few words of one line."""
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)


def _no_room(what: str, run: Path) -> TrainingError:
    return TrainingError(f"{what} Make room, then: chiasm train --resume {run}")


def _same_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, at once; a copy where the file system has no hard links."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
