"""One task under training: the step, the validation, and the account of how far the run is.

The randomness of a step (mixing, dropout, drop path) is a function of seed, epoch, batch and process alone, and so is
the learning rate of the step's number. A run that was interrupted therefore has no generator to restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import Optimizer

from chiasm.config import TrainConfig
from chiasm.engine.freeze import frozen_norms
from chiasm.engine.mix import Mix
from chiasm.engine.optimizer import make_optimizer, set_rate
from chiasm.engine.schedule import Schedule
from chiasm.engine.state import RunState, Stopwatch
from chiasm.errors import DataError, TrainingError
from chiasm.tasks.validation import Validation

STATE_KEY = "chiasm"
CHECK_EVERY = 25  # steps between looks at the losses where a look makes the CPU wait for the device
EMA_WARMUP_POWER = 0.75  # timm's value for short runs: the average is over about the last tenth of the steps so far


class Training(pl.LightningModule):
    """What Lightning drives. `state` is shared with the callbacks, which save, show and stop.

    Args:
        task: model, loss and validation, one of those in tasks/.
        config: the settings.
        state: where the run stands; taken over from the checkpoint on resume.
        train_loader: resumable loader of (images (B, C, H, W), targets).
        val_loader: loader of (images, targets, indices (B,)).
        val_images: validation images of this process; those with a higher index are padding and are not counted.
        watch: the wall time of the run.
    """

    def __init__(
        self,
        task: Any,
        config: TrainConfig,
        state: RunState,
        train_loader: Any,
        val_loader: Any,
        val_images: int,
        watch: Stopwatch,
    ) -> None:
        super().__init__()
        self.task = task
        self.ema: ModelEmaV3 | None = None
        if config.ema is not None:
            self.ema = ModelEmaV3(task, decay=config.ema, use_warmup=True, warmup_power=EMA_WARMUP_POWER)
            self.ema.requires_grad_(False)
        self.config = config
        self.state = state
        self.watch = watch
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._val_images = val_images
        self._mix = Mix(config, len(task.labels)) if config.task == "classify" else None
        self._frozen_norms = frozen_norms(task)
        self._losses: list[Tensor] = []  # of the steps not yet checked and summed
        self._validation: Validation = task.validation()
        self._epoch_watch = Stopwatch()
        self._val_watch = Stopwatch()
        self._validation_seconds = 0.0  # of the latest validation with its checkpoint: kept free in a time budget
        self.time_share = 0.0
        self.batches = len(train_loader)
        updates = -(-self.batches // config.accumulate)
        self.schedule = Schedule(
            peak=config.lr,
            final=min(config.min_lr, config.lr),
            warmup=config.warmup_epochs * updates,
            total=None if config.max_minutes is not None else config.epochs * updates,
        )

    @property
    def evaluated(self) -> Any:
        """The weights that are validated and published: the moving average where it is on."""
        return self.ema.module if self.ema is not None else self.task

    # ------------------------------------------------------------------------------------------------------- training

    def train_dataloader(self) -> _Epoch:
        return _Epoch(self._train_loader, self.state.epoch, self.state.batch)

    def val_dataloader(self) -> _Batches:
        return _Batches(self._val_loader)

    def configure_optimizers(self) -> Optimizer:
        return make_optimizer(self.task.model, self.config)

    def on_train_epoch_start(self) -> None:
        self._epoch_watch = Stopwatch(self.state.epoch_seconds)
        for norm in self._frozen_norms:
            norm.eval()

    def training_step(self, batch: tuple[Tensor, Any]) -> Tensor:
        torch.manual_seed(_step_seed(self.config.seed, self.state.epoch, self.state.batch, self.global_rank))
        images, targets = batch if self._mix is None else self._mix(*batch)
        terms = self.task.loss(self.task(images.contiguous(memory_format=torch.channels_last)), targets)
        self.state.batch += 1
        self.state.images += len(images)
        self._losses.append(terms["loss"].detach())
        if self.device.type == "cpu" or len(self._losses) >= CHECK_EVERY:
            self.settle_losses()
        return terms["loss"]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if self.config.max_minutes is not None:
            self.time_share = self._time_share(self.config.max_minutes * 60)
        set_rate(optimizer, self.schedule.rate(self.state.updates, self.time_share))
        optimizer.step(closure=optimizer_closure)
        self.state.updates += 1
        if self.ema is not None:
            self.ema.update(self.task, step=self.state.updates)

    def settle_losses(self) -> None:
        """Add the losses since the last look to the epoch's sum.

        Raises:
            TrainingError: naming the first step whose loss is not a finite number.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).cpu().double().tolist()
        self._losses.clear()
        for index, loss in enumerate(losses):
            if not _is_finite(loss):
                batch = self.state.batch - len(losses) + index + 1
                raise self.diverged(f"the loss is {loss} at batch {batch} of epoch {self.state.epoch + 1}")
            self.state.epoch_loss += loss

    def check_weights(self) -> None:
        """Raise `TrainingError` where a weight or buffer is not finite: such weights must not replace a checkpoint."""
        tensors = [value for value in self.task.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in tensors]).all():
            raise self.diverged(f"the weights are no longer finite in epoch {self.state.epoch + 1}")

    def diverged(self, what: str) -> TrainingError:
        """The error for numbers that are no longer finite, with what to try."""
        rate = self.schedule.rate(max(0, self.state.updates - 1), self.time_share)
        advice = "lower --lr, set --clip-grad 1 or lengthen --warmup-epochs"
        if self.config.precision == "16":
            advice += ", or use --precision bf16 or 32"
        return TrainingError(f"{what} (learning rate {rate:.2g}); what was saved before is kept. To try: {advice}.")

    def _time_share(self, budget: float) -> float:
        """The share of the time budget that is spent, the same in all processes; time to validate is set aside."""
        share = min(1.0, self.watch.seconds / max(1.0, budget - 1.1 * self._validation_seconds))
        if self.trainer.world_size > 1:
            share = float(self.trainer.strategy.reduce(torch.tensor(share, device=self.device), reduce_op="max"))
        return share

    # ----------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._validation = self.evaluated.validation()
        self._val_watch = Stopwatch()

    def validation_step(self, batch: tuple[Tensor, Any, Tensor]) -> None:
        images, targets, indices = batch
        outputs = self.evaluated(images.contiguous(memory_format=torch.channels_last))
        self._validation.add(outputs, targets, indices < self._val_images)

    def on_validation_epoch_end(self) -> None:
        """Close the epoch: its row, the best score, what comes next."""
        self.settle_losses()
        found = self._validation.compute(self._states_of_all_processes())
        if not found:
            raise DataError("none of the val images can be read; see 'chiasm data' for which and why.")
        if not _is_finite(found.get("loss", 0.0)):
            raise self.diverged(f"the validation loss is {found['loss']} after epoch {self.state.epoch + 1}")
        train_loss = torch.tensor(self.state.epoch_loss / max(1, self.state.batch), device=self.device)
        self._validation_seconds = self._val_watch.seconds
        seconds = self._epoch_watch.seconds
        state = self.state
        state.epoch += 1
        state.history.append(
            {
                "epoch": state.epoch,
                "step": state.updates,
                "lr": self.schedule.rate(max(0, state.updates - 1), self.time_share),
                "train_loss": float(self.trainer.strategy.reduce(train_loss, reduce_op="mean")),
                **{f"val_{name}": value for name, value in found.items()},
                "seconds": round(seconds, 3),
            }
        )
        state.train_seconds += seconds - self._validation_seconds
        state.batch, state.epoch_loss, state.epoch_seconds = 0, 0.0, 0.0
        state.stale += 1
        score = found[self._validation.score]
        if score > state.best_score:
            state.best_score, state.best_epoch, state.stale = score, state.epoch, 0
        patience = self.config.early_stopping
        if self.config.max_minutes is not None:
            done = self._time_share(self.config.max_minutes * 60) >= 1
        else:
            done = state.epoch >= self.config.epochs
        state.finished = done or (patience > 0 and state.stale >= patience)
        self.trainer.should_stop = state.finished

    def on_train_epoch_end(self) -> None:
        row = self.state.history[-1]
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.state.updates)

    def _states_of_all_processes(self) -> list[Any]:
        """As objects, since a process none of whose images can be read has nothing to tell."""
        states = [self._validation.state()]
        if self.trainer.world_size > 1:
            states *= self.trainer.world_size
            torch.distributed.all_gather_object(states, states[self.global_rank])
        return states

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle_losses()
        self.state.seconds = self.watch.seconds
        self.state.epoch_seconds = self._epoch_watch.seconds if self.state.batch else 0.0
        checkpoint[STATE_KEY] = self.state.to_dict()
        # Lightning's own account of a half-done epoch repeats or skips batches depending on the hook it was taken in;
        # ours says where to go on, and Lightning is started at the beginning of an epoch that is that much shorter.
        checkpoint.pop("loops", None)
        checkpoint |= {"epoch": self.state.epoch, "global_step": self.state.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        world_size = self.state.world_size
        self.state.restore(checkpoint[STATE_KEY])
        if self.state.world_size != world_size:
            raise TrainingError(
                f"this run was trained by {self.state.world_size} processes and would go on with {world_size}; "
                f"give --devices {self.state.world_size}."
            )
        self.watch = Stopwatch(self.state.seconds + self.watch.seconds)
        done = dict.fromkeys(("ready", "started", "processed", "completed"), self.state.epoch)
        self.trainer.fit_loop.epoch_progress.current.load_state_dict(done)


class _Epoch:
    """The batches of one epoch from `start` on. The reading begins at the first `next`, not at `iter`, since Lightning
    makes iterators that it does not use."""

    def __init__(self, loader: Any, epoch: int, start: int) -> None:
        self.loader, self.epoch, self.start = loader, epoch, start

    def __len__(self) -> int:
        return len(self.loader) - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        self.loader.set_epoch(self.epoch, start=self.start)
        yield from self.loader


class _Batches:
    """A loader as a plain iterable, so that Lightning leaves it as it is."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Any, Tensor]]:
        yield from self.loader


def _step_seed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _is_finite(value: float) -> bool:
    return value - value == 0.0
