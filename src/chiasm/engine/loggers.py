"""Where metrics go besides metrics.csv: TensorBoard, and Weights & Biases where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

from pytorch_lightning.loggers import Logger

from chiasm.config import TrainConfig
from chiasm.engine.run_folder import RunFolder
from chiasm.errors import ChiasmError, UnknownNameError


def make_loggers(config: TrainConfig, run: RunFolder, *, run_id: str, purge_from: int) -> list[Logger]:
    """The loggers of `config`. On resume, what was logged from optimiser step `purge_from` on is made again.

    `run_id` is what the run is known by where many are kept.

    Raises:
        ChiasmError: for Weights & Biases where it is not installed.
    """
    loggers: list[Logger] = []
    for name in config.loggers:
        if name == "tensorboard":
            from pytorch_lightning.loggers import TensorBoardLogger

            loggers.append(
                TensorBoardLogger(save_dir=str(run.path), name="", version="tensorboard", purge_step=purge_from or None)
            )
        elif name == "wandb":
            if find_spec("wandb") is None:
                raise ChiasmError("wandb is not installed; pip install wandb, or leave it out of --loggers.")
            from pytorch_lightning.loggers import WandbLogger

            # The same identifier on resume, so that the run goes on there too.
            loggers.append(
                WandbLogger(project="chiasm", name=run.path.name, id=run_id, resume="allow", save_dir=str(run.path))
            )
        else:
            raise UnknownNameError("logger", name, ["tensorboard", "wandb"])
    return loggers
