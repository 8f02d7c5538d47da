"""The task to train and its model: built for the data's classes, weights loaded, parts frozen."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.config import Preprocess, TrainConfig
from chiasm.data import ImageData
from chiasm.data.annotated import AnnotatedData
from chiasm.engine.freeze import freeze
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.model_file import ModelInfo, preprocess_of
from chiasm.models import create_model_with
from chiasm.tasks.classify import Classify


def build_task(config: TrainConfig, data: ImageData, *, load: bool = True) -> tuple[nn.Module, ModelInfo, str]:
    """Build the task that `config` asks for, with the classes of `data`.

    Args:
        load: whether to fetch the weights that training starts from; a resumed run has its own.

    Returns:
        The task, what its model file will say of the model (of the data it says nothing yet), and what was loaded in
        words ('' for nothing).

    Raises:
        ChiasmError: for settings that do not go together, a size that the model cannot take, or weights that cannot be
            had.
    """
    if config.task != "classify":
        from chiasm.engine.dense import build_dense

        assert isinstance(data, AnnotatedData)
        return build_dense(config, data, load=load)
    model, model_args, loaded = build_model(config, len(data.classes), load=load)
    preprocess = preprocess_of(model, config.image_size)
    check_size(model, config.model, preprocess)
    weights = balanced_weights(data) if config.class_weights == "balanced" else None
    task = Classify(model, data.classes, label_smoothing=config.label_smoothing, class_weights=weights)
    info = ModelInfo(
        architecture=config.model, model_args=model_args, task=task.name, labels=data.classes, preprocess=preprocess
    )
    return task, info, loaded


def build_model(config: TrainConfig, classes: int, *, load: bool = True) -> tuple[nn.Module, dict[str, Any], str]:
    """Build `config.model` with `classes` outputs; the weights are a function of `config.seed` or of their source.

    Drop path and image size are passed to architectures that take them and not to the others.

    Args:
        load: whether to fetch the weights that training starts from; a resumed run has its own.

    Returns:
        The model, the arguments that build it again for inference, and what was loaded in words ('' for nothing).

    Raises:
        ChiasmError: for arguments that the architecture does not take, or weights that cannot be had.
    """
    if config.weights and config.pretrained:
        raise ChiasmError("--weights and --pretrained both say what to start from; give one of them.")
    optional: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    if config.image_size is not None:
        optional["img_size"] = config.image_size
    optional = {name: value for name, value in optional.items() if name not in config.model_args}
    weights = {"pretrained": config.pretrained and load, "num_classes": classes}
    try:
        model, optional = create_model_with(config.model, optional, seed=config.seed, **weights, **config.model_args)
    except TypeError as error:
        raise ChiasmError(f"{config.model} cannot be built with {config.model_args}: {error}.") from error
    loaded = f"published weights of {config.model}" if config.pretrained else ""
    if config.weights and load:
        loaded = _load(model, config.weights)
    if config.grad_checkpointing:
        _checkpoint_gradients(model, config.model)
    if config.freeze:
        freeze(model, config.freeze)
    optional.pop("drop_path_rate", None)
    return model.to(memory_format=torch.channels_last), optional | config.model_args, loaded


def _load(model: nn.Module, weights: str) -> str:
    """Load a checkpoint, or of 'conv=FILE,tokens=FILE' each into the part it is for; what was loaded, in words."""
    from chiasm.models.checkpoints import load_weights

    if not re.match(r"[A-Za-z_]\w*=", weights):
        return str(load_weights(model, weights))
    parts = dict(model.named_children())
    reports = []
    for source in re.split(rf",(?=(?:{'|'.join(parts)})=)", weights):
        part, _, path = source.partition("=")
        if part not in parts:
            raise UnknownNameError("part in --weights", part, parts)
        reports.append(f"{part}: {load_weights(parts[part], path)}")
    return "\n".join(reports)


def balanced_weights(data: ImageData) -> Tensor:
    """Per class (classes,) the inverse of its frequency, 1 on average over the training images; 0 without any."""
    counts = torch.bincount(torch.tensor(data.splits["train"].labels), minlength=len(data.classes))
    present = (counts > 0).sum()
    return (counts > 0) * counts.sum() / (present * counts.clamp(min=1))


@torch.no_grad()
def check_size(model: nn.Module, name: str, preprocess: Preprocess) -> None:
    """Run one blank image through `model`, so that a size it cannot take is told before anything else happens.

    Raises:
        ChiasmError: with the architecture's own reason.
    """
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, len(preprocess.mean), *preprocess.size))
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = preprocess.size
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ChiasmError(
            f"{name} cannot take images of {height}x{width} px ({reason}); choose another --image-size."
        ) from error
    finally:
        model.train(was_training)


def _checkpoint_gradients(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ChiasmError(f"{name} cannot recompute its activations; leave out --grad-checkpointing.") from error
