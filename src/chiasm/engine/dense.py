"""The network to train for boxes, masks or maps: a backbone with its weights, and a head made for the data."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.annotated import IGNORE, AnnotatedData
from chiasm.data.source import TRAIN, ImageData
from chiasm.engine.build import build_model, check_size
from chiasm.engine.freeze import freeze
from chiasm.errors import ChiasmError, DataError, ImageError
from chiasm.model_file import ModelInfo, preprocess_of
from chiasm.models import swin
from chiasm.models.detectors import anchors_for
from chiasm.models.heads import ANCHORED, HEADS, with_head

if TYPE_CHECKING:
    from chiasm.tasks.detect import Detect
    from chiasm.tasks.segment import Segment

_COUNTED = 200  # class maps whose pixels are counted for the weights of the classes


def build_dense(config: TrainConfig, data: ImageData, *, load: bool = True) -> tuple[Detect | Segment, ModelInfo, str]:
    """What `config` says, for the classes and objects of `data`.

    Args:
        load: whether to fetch the weights that training starts from; a resumed run has its own.

    Returns:
        The task, what its model file will say of the model, and what was loaded in words ('' for nothing).

    Raises:
        ChiasmError: for a head, an argument or a size that cannot be, or weights that cannot be had.
    """
    from chiasm.tasks.detect import Detect
    from chiasm.tasks.segment import Segment

    assert isinstance(data, AnnotatedData)
    own = dict(config.model_args)
    if config.model in swin.SIZES:
        own.setdefault("out_norms", True)  # as in the authors' detectors (arXiv 2103.14030, section 4.2)
    backbone, model_args, loaded = build_model(replace(config, model_args=own, freeze=[]), 0, load=load)
    # What views do to an image, said for those who do it without us.
    preprocess = replace(preprocess_of(backbone, config.image_size), crop=1.0, interpolation="bilinear")
    name = next(iter(HEADS[config.task])) if config.head == "auto" else config.head
    head = {"name": name, "maps": config.maps, **_for_objects(config, data, name, preprocess), **config.head_args}
    model = with_head(backbone, len(data.classes), task=config.task, architecture=config.model, **head)
    model.to(memory_format=torch.channels_last)
    check_size(model, config.model, preprocess)
    if config.frozen_bn == "yes" or (config.frozen_bn == "auto" and (config.pretrained or config.weights)):
        _freeze_batch_norms(backbone, config)
    if config.freeze:
        freeze(model, config.freeze)
    _freeze_unread(model, preprocess)
    _check_batch(model, config, name)
    info = ModelInfo(
        architecture=config.model,
        model_args=model_args,
        task=config.task,
        head=head,
        labels=data.classes,
        preprocess=preprocess,
    )
    built: Any = model
    if config.task == "segment":
        weights = pixel_weights(data) if config.class_weights == "balanced" else None
        smoothing = config.label_smoothing
        task = Segment(built, data.classes, label_smoothing=smoothing, class_weights=weights, dice=config.dice)
        return task, info, loaded
    return Detect(built, data.classes, masks=config.task == "instances"), info, loaded


def pixel_weights(data: AnnotatedData) -> Tensor:
    """Per class (classes,) 1 / ln(1.02 + its share of the pixels), 1 on average.

    The formula is that of ENet (Paszke et al. 2016, arXiv 1606.02147, section 5.2), milder than the inverse frequency.
    Counted over up to 200 class maps, evenly spaced; a class that none of them shows weighs as much as the rarest.
    """
    split = data.maps(TRAIN)
    counts = torch.zeros(len(data.classes), dtype=torch.float64)
    for index in range(0, len(split), math.ceil(len(split) / _COUNTED)):
        try:
            classes = split.sample(index)[1]
        except ImageError:
            continue
        counts += torch.bincount(classes[classes != IGNORE].long().flatten(), minlength=len(counts))
    if not counts.any():
        raise DataError(f"{data.name}: no training image has a pixel of a known class.")
    counts[counts == 0] = counts[counts > 0].min()
    weights = 1 / (1.02 + counts / counts.sum()).log()
    return (weights / weights.mean()).float()


def _for_objects(config: TrainConfig, data: AnnotatedData, head: str, preprocess: Preprocess) -> dict[str, Any]:
    """What the head takes from the objects: as many detections as an image can need, and anchors of their sizes."""
    if config.task == "segment":
        if config.anchors == "data":
            raise ChiasmError("--anchors data: a segmenter has no anchor boxes; leave it out.")
        return {}
    split = data.objects(TRAIN)
    objects = [split.objects(index) for index in range(len(split))]
    most = max(len(one) for one in objects)
    own: dict[str, Any] = {"detections": max(100, 50 * math.ceil(most * 1.5 / 50))}
    if config.anchors == "data":
        if head not in ANCHORED:
            raise ChiasmError(f"--anchors data: {head} has no anchor boxes; leave it out.")
        sides = [
            (one.boxes[:, 2:] - one.boxes[:, :2]) * min(preprocess.size[0] / one.height, preprocess.size[1] / one.width)
            for one in objects
        ]
        own["anchors"], own["ratios"] = anchors_for(torch.cat(sides))
    return own


def _freeze_batch_norms(backbone: nn.Module, config: TrainConfig) -> None:
    """Batch norms keep their statistics, since batches of a few large images have none worth having; where only parts
    were loaded, theirs."""
    loaded = re.findall(r"(?:^|,)([A-Za-z_]\w*)=", config.weights or "") if config.frozen_bn == "auto" else []
    parts = [getattr(backbone, part) for part in loaded] or [backbone]
    for module in chain.from_iterable(part.modules() for part in parts):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _freeze_unread(model: nn.Module, preprocess: Preprocess) -> None:
    """Freeze what no map depends on, such as a last norm: weights without a gradient would stop several devices."""
    was_training = model.training
    outputs = model.eval()(torch.zeros(1, len(preprocess.mean), *preprocess.size))
    values = outputs.values() if isinstance(outputs, dict) else [outputs]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone.")}
    if named:
        total = torch.stack([value.sum() for value in values]).sum()
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        for parameter, grad in zip(named.values(), grads, strict=True):
            parameter.requires_grad_(grad is not None)
    model.train(was_training)


def _check_batch(model: nn.Module, config: TrainConfig, head: str) -> None:
    pooled = any(isinstance(module, nn.AdaptiveAvgPool2d) for module in getattr(model, "decoder", model).modules())
    if config.task == "segment" and config.batch_size == 1 and pooled:
        raise ChiasmError(
            f"batch_size is 1: {head} norms pooled features over the batch and needs 2 images or more; "
            "give --batch-size 2, or --head fpn or unet."
        )
