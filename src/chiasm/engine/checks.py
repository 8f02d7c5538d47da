"""What is checked before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.config import TrainConfig
from chiasm.errors import ChiasmError, DataError

if TYPE_CHECKING:
    from chiasm.data import ImageData


# Settings that are for some tasks alone; another task refuses what differs from its own default.
_OBJECTS, _DENSE = ("detect", "instances"), ("detect", "instances", "segment")
_TASKS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("head", "head_args", "maps", "frozen_bn", "scale_jitter", "color_jitter"), _DENSE),
    "anchors": _OBJECTS,
    **dict.fromkeys(("dice", "ignore_index"), ("segment",)),
    **dict.fromkeys(("class_weights", "label_smoothing"), ("classify", "segment")),
    **dict.fromkeys(("mixup", "cutmix", "rand_augment", "random_erasing", "crop_scale", "layer_decay"), ("classify",)),
}


def check_settings(config: TrainConfig) -> None:
    """Raise `ChiasmError` for a setting out of its range, naming the range, or one that is for other tasks."""
    ranges: dict[str, tuple[float, float]] = {
        "epochs": (1, 1e6),
        "batch_size": (1, 1e6),
        "accumulate": (1, 1e6),
        "val_fraction": (0.0, 0.9),
        "label_smoothing": (0.0, 0.99),
        "mix_probability": (0.0, 1.0),
        "mixup": (0.0, 100.0),
        "cutmix": (0.0, 100.0),
        "random_erasing": (0.0, 1.0),
        "crop_scale": (0.001, 1.0),
        "rand_augment": (0, 30),
        "flip": (0.0, 1.0),
        "color_jitter": (0.0, 1.0),
        "dice": (0.0, 1e6),
        "drop_path": (0.0, 0.99),
        "lr": (1e-12, 1e6),
        "min_lr": (0.0, 1e6),
        "warmup_epochs": (0.0, 1e6),
        "weight_decay": (0.0, 1e6),
        "momentum": (0.0, 0.99999),
        "early_stopping": (0, 1e6),
        "num_nodes": (1, 1e6),
        "checkpoint_minutes": (0.0, 1e6),
    }
    optional: dict[str, tuple[float, float]] = {
        "max_minutes": (0.01, 1e6),
        "layer_decay": (0.01, 1.0),
        "clip_grad": (1e-9, 1e9),
        "ema": (0.0, 1.0),
        "image_size": (1, 1e5),
        "ignore_index": (0, 255),
        "workers": (0, 1e4),
    }
    for name, (low, high) in (ranges | optional).items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not low <= value <= high:
            raise ChiasmError(f"{name} is {value}: expected {low:g} to {high:g}.")
    scale = config.scale_jitter
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 100:
        raise ChiasmError(
            f"scale_jitter is {scale}: expected two numbers above 0, the smaller first, such as [0.5, 2]."
        )
    usual = TrainConfig.from_flags(data=config.data or "-", task=config.task, recipe=config.recipe)
    for name, tasks in _TASKS_OF.items():
        if config.task not in tasks and getattr(config, name) != getattr(usual, name):
            raise ChiasmError(
                f"{name} is {getattr(config, name)}: for the tasks {', '.join(tasks)} alone, and this one is "
                f"'{config.task}'; leave it out, or say what to find in the images: --task {tasks[-1]}."
            )


def check_data(data: ImageData) -> None:
    """Raise `DataError` where there is nothing to train on or nothing to validate with."""
    from chiasm.data.annotated import ObjectSplit, has_objects

    for name in ("train", "val"):
        if name not in data.splits or not len(data.splits[name]):
            raise DataError(f"{data.name}: no {name} images; see 'chiasm data' for what is there.")
        split = data.splits[name]
        if isinstance(split, ObjectSplit) and not has_objects(split):
            use = "learned from" if name == "train" else "measured, so no epoch could be chosen"
            raise DataError(f"{data.name}: no {name} image has an object to be {use}; annotate some (crowds are none).")
