"""The folder of a run, which explains itself: settings, metrics, checkpoints, model file, curves, summary."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.config import TrainConfig, read_yaml
from chiasm.errors import ChiasmError, ModelFileError, TrainingError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What may differ on resume: it changes how fast and where, not what comes out.
FREE_ON_RESUME = frozenset(
    {"resume", "data", "workers", "cache", "checkpoint_minutes", "loggers", "accelerator", "devices"}
)


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder, and the files that are text."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @classmethod
    def create(cls, config: TrainConfig, data_name: str) -> RunFolder:
        """Make the folder of a new run: `config.out`, or the next free runs/<data>-<model>-<number>.

        Raises:
            ChiasmError: when the folder holds something already or cannot be made.
        """
        try:
            if config.out is not None:
                run = cls(Path(config.out))
                run._refuse_occupied()
                run.path.mkdir(parents=True, exist_ok=True)
            else:
                run = cls._next_free(re.sub(r"[^\w.]+", "-", f"{data_name}-{config.model}"))
            run.last.parent.mkdir()
            run._write(run.config, config.to_yaml())
        except OSError as error:
            raise ChiasmError(
                f"{error.filename}: cannot make the run folder ({error.strerror}); choose --out."
            ) from error
        return run

    @classmethod
    def open(cls, path: str) -> tuple[RunFolder, TrainConfig]:
        """An existing run with the settings it was started with.

        Raises:
            ModelFileError: when there is no run in `path`.
        """
        run = cls(Path(path))
        if not run.config.is_file():
            raise ModelFileError(f"{path}: not a run folder (no config.yaml there); --resume takes what --out made.")
        # The first runs had no task, since all were of one.
        return run, TrainConfig.from_flags(**({"task": "classify"} | read_yaml(run.config)))

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """metrics.csv, whole: one line per completed epoch."""
        if history:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
            self._write(self.metrics, text.getvalue())

    def write_curves(self, history: list[dict[str, float]]) -> None:
        """curves.png: losses and scores over the epochs, of which there is at least one."""
        from chiasm.report.plots import curves, png

        self._write(self.curves, png(curves(history)))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def told_when_full(self) -> Iterator[None]:
        """Turns a full disk into a `TrainingError` that says how to go on."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise TrainingError(
                f"{error.filename or self.path}: cannot be written ({error.strerror}). Make room, then: "
                f"chiasm train --resume {self.path}"
            ) from error

    def discard_unused(self) -> None:
        """Take away the folder of a run that did not begin, so that its name is free again."""
        if not self.last.exists():
            self.config.unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            for folder in (self.last.parent, self.path):
                with contextlib.suppress(OSError):  # something else lies there: it stays
                    folder.rmdir()

    @staticmethod
    def _write(path: Path, content: str | bytes) -> None:
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _refuse_occupied(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()):
            way_out = f"--resume {self.path} to go on with it, or " if self.config.exists() else ""
            raise ChiasmError(f"{self.path}: holds something already; give {way_out}another --out.")

    @classmethod
    def _next_free(cls, name: str) -> RunFolder:
        number = 1
        while True:
            path = Path("runs") / f"{name}-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return cls(path)


def resumed_config(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on: its own, with what is `given` now (None is not) where that changes no result.

    Raises:
        ChiasmError: for a setting that would change the result.
    """
    own = saved.to_dict()
    given = {name: value for name, value in given.items() if value is not None and (name, value) != ("task", "auto")}
    now = TrainConfig.from_flags(**given).to_dict()
    changed = [name for name in given if name not in FREE_ON_RESUME and now[name] != own[name]]
    if changed:
        name = changed[0]
        why = " (the learning rate is laid out over the whole run)" if name in ("epochs", "max_minutes") else ""
        raise ChiasmError(
            f"{name} is {own[name]} in this run and cannot become {now[name]} on resume{why}; leave it out, or start "
            f"a new run from these weights with --weights."
        )
    return TrainConfig(**own | {name: now[name] for name in given if name in FREE_ON_RESUME})
