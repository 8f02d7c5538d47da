"""Lightning's Trainer put together and run, quietly, with its failures told in our words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from chiasm.config import TrainConfig
from chiasm.data import ImageData
from chiasm.data.loader import eval_loader, train_loader
from chiasm.data.samples import eval_samples, train_samples
from chiasm.engine.checkpoints import AtomicCheckpointIO, Checkpoints
from chiasm.engine.interrupt import Interrupt
from chiasm.engine.loggers import make_loggers
from chiasm.engine.module import Training
from chiasm.engine.progress import Show
from chiasm.engine.run_folder import RunFolder
from chiasm.engine.shards import own_padded_share, own_share
from chiasm.engine.state import RunState, Stopwatch
from chiasm.errors import ChiasmError, DataError, TrainingError
from chiasm.model_file import ModelInfo

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


def fit(
    task: Any,
    data: ImageData,
    info: ModelInfo,
    config: TrainConfig,
    run: RunFolder,
    state: RunState,
    *,
    resume: bool,
    watch: Stopwatch,
    interrupt: Interrupt,
    console: Console,
    report: Callable[[float, str], None] | None = None,
) -> None:
    """Train `task` to the end of its schedule, or on from `run.last` with `resume`; `state` tells how it went.

    What is shown is written to `console`; with `report` that is told instead, which share is done and where it is.

    Raises:
        TrainingError: when the loss is not finite or the disk is full; the last complete checkpoint is kept.
        InterruptedRunError: after a signal, with everything saved.
        DataError: when a process has less than one batch of images.
        ChiasmError: for devices or a precision that this machine does not have.
    """
    with _quiet():
        state.precision = state.precision or _precision(config)  # a resumed run computes as it began
        trainer = _make_trainer(
            config,
            precision=state.precision,
            logger=make_loggers(config, run, run_id=state.id, purge_from=state.updates + 1 if resume else 0),
            callbacks=[
                Show(console, report),
                Checkpoints(run, info, config, interrupt),
            ],
            default_root_dir=str(run.path),
        )
        state.world_size = trainer.world_size
        train, val = data.splits["train"], data.splits["val"]
        val_images = len(val)
        if trainer.world_size > 1:
            train = own_share(train, trainer.global_rank, trainer.world_size)
            val, val_images = own_padded_share(val, trainer.global_rank, trainer.world_size)
        if len(train) < config.batch_size:
            each = f" for each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
            raise DataError(
                f"{data.name}: {len(train)} training images{each} do not fill one batch of {config.batch_size}; "
                f"give --batch-size {max(1, len(train))} or less."
            )
        module = Training(
            task,
            config,
            state,
            train_loader(
                train_samples(train, config, info.preprocess),
                batch_size=config.batch_size,
                seed=config.seed,
                workers=config.workers,
                cache=config.cache,
            ),
            eval_loader(
                eval_samples(val, config.task, info.preprocess),
                batch_size=config.batch_size,
                workers=config.workers,
                cache=config.cache,
            ),
            val_images,
            watch,
        )
        if config.compile:
            task.compile()
        try:
            with run.told_when_full():
                trainer.fit(module, ckpt_path=str(run.last) if resume else None, weights_only=True)
        except ChiasmError:
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                raise TrainingError(
                    f"batches of {config.batch_size} do not fit into the memory of {module.device}; give a smaller "
                    "--batch-size with --accumulate to make up for it, --grad-checkpointing, or a smaller --image-size."
                ) from error
            # A signal to the whole process group also ends the workers that read images: then that is what fails.
            if interrupt.received is None:
                raise
            raise interrupt.error(f"to go on from the last checkpoint: chiasm train --resume {run.path}") from error
        finally:
            interrupt.patient = False


def _make_trainer(config: TrainConfig, **parts: Any) -> pl.Trainer:
    if config.strategy not in STRATEGIES:
        raise ChiasmError(f"strategy '{config.strategy}': expected one of {', '.join(STRATEGIES)}.")
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=int(config.devices) if str(config.devices).isdigit() else config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            max_epochs=-1 if config.max_minutes is not None else config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_grad,
            plugins=[AtomicCheckpointIO()],
            # Each epoch asks the module for its batches anew, since a resumed one has fewer.
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **parts,
        )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise ChiasmError(f"this machine cannot train so: {' '.join(str(error).split())}") from error


def _precision(config: TrainConfig) -> str:
    on_cpu = config.accelerator == "cpu" or not _has_accelerator()
    if config.precision == "16" and on_cpu:
        raise ChiasmError("precision 16 needs a GPU; use --precision bf16 or 32 on a CPU.")
    auto = "bf16-mixed" if (_cpu_has_bf16() if on_cpu else _gpu_has_bf16()) else "32-true"
    return {"auto": auto, "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision]


def _cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16 (AVX512-BF16 or AMX), which about halves the time of a step."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU it is a plain RuntimeError, known by its words.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's announcements and advice off; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in (r"pytorch_lightning\..*", r"lightning_fabric\..*"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
