"""What a benchmark runs: one forward pass or one training step of a model that a person has named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models as vision

from chiasm.errors import ChiasmError, UnknownNameError, first_line
from chiasm.inference import optimize
from chiasm.measure import count_macs, synchronize
from chiasm.model_file import find_file, preprocess_of, resolve_model
from chiasm.models import create_model_with, is_model, set_input_size
from chiasm.models.checkpoints import input_channels
from chiasm.tasks.classify import Classify

_log = logging.getLogger("chiasm.bench")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure.

    Attributes:
        ref: as it was named: a model file, a run folder, an architecture, timm:NAME or torchvision:NAME.
        shape: channels, height and width of the images that it is measured on.
        parameters, macs: what it costs; multiply-accumulates of one image.
    """

    ref: str
    shape: tuple[int, int, int]
    parameters: int
    macs: int


def subject_of(ref: str, size: tuple[int, int] | None) -> Subject:
    """The model of that name at images of `size`, (height, width) in pixels; None for its own.

    Raises:
        UnknownNameError, ModelFileError: where there is none.
        ChiasmError: where it does not take images of that size, or is no classifier.
    """
    model, shape = _build(ref, size)
    try:
        _, macs = count_macs(model, torch.zeros(1, *shape))
    except Exception as error:  # it will have a row that says so
        _log.debug("%s: %s", ref, first_line(error))
        macs = {"": 0}
    return Subject(ref=ref, shape=shape, parameters=sum(p.numel() for p in model.parameters()), macs=macs[""])


def _build(ref: str, size: tuple[int, int] | None, drop_path: float = 0.0) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model of that name in evaluation mode, and the (channels, height, width) that it reads.

    Args:
        ref: as a person gives it.
        size: height and width of its images; None for its own.
        drop_path: stochastic depth, where an architecture of that name takes it.

    Raises:
        UnknownNameError, ModelFileError: where there is none.
        ChiasmError: where it does not take images of that size.
    """
    torch.manual_seed(0)
    optional = {"drop_path_rate": drop_path} if drop_path else {}
    library, _, name = ref.partition(":")
    if library == "torchvision":
        known = vision.list_models(module=vision)
        if name not in known:
            raise UnknownNameError("torchvision model", name, known)
        model = vision.get_model(name, weights=None).eval()
        own = (*vision.get_model_weights(name).DEFAULT.transforms().crop_size * 2,)[:2]
    elif (architecture := _architecture(ref)) is not None:
        model = create_model_with(architecture, optional)[0].eval()
        own = preprocess_of(model).size
    else:
        model, info = resolve_model(ref)
        if info.task != "classify":
            raise ChiasmError(
                f"{ref} is a model for '{info.task}': bench measures classifiers and backbones; give its backbone, "
                f"{info.architecture}."
            )
        own = info.preprocess.size
    if size is not None and size != own:
        set_input_size(model, size)
    return model, (input_channels(model), *(size or own))


def _architecture(ref: str) -> str | None:
    """The architecture that is named, by timm:NAME or as it is; None for what is a file or folder, or torchvision's.

    Raises:
        UnknownNameError, ModelFileError: where there is none.
    """
    library, _, name = ref.partition(":")
    if library == "timm" and name:
        if not timm.is_model(name):
            raise UnknownNameError("timm model", name, timm.list_models())
        return name
    return ref if is_model(ref) and find_file(ref) is None else None


def find(refs: Sequence[str]) -> Callable[[], object]:
    """A work that does nothing, where this process knows all these models.

    Raises:
        ChiasmError: for one that it does not.
    """
    for ref in refs:
        if not ref.startswith("torchvision:") and _architecture(ref) is None:
            resolve_model(ref)
    return _nothing


def _nothing() -> None:
    pass


def work_of(
    ref: str,
    shape: tuple[int, int, int],
    mode: str,
    form: str,
    batch: int,
    layout: str,
    precision: str,
    device: str,
    drop_path: float = 0.0,
) -> Callable[[], object]:
    """What is timed: one forward pass, or one training step, of the model built anew.

    Args:
        ref, shape: see `Subject`.
        mode: 'inference' or 'training'.
        form: 'eager', 'kept' (the same to the model), 'optimized' or 'compiled'.
        batch: images at a time.
        layout: 'channels_last' or 'contiguous', of weights and images.
        precision: '32' or 'bf16'.
        device: as PyTorch calls it.
        drop_path: stochastic depth in training, where an architecture of that name takes it.
    """
    where = torch.device(device)
    half = precision == "bf16"
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = (
        _build(ref, shape[1:], drop_path if mode == "training" else 0.0)[0].to(where).to(memory_format=memory_format)
    )
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(where)
    images = images.contiguous(memory_format=memory_format)
    if mode == "inference":
        if half:
            model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
        if form == "optimized":
            model = optimize(model)
        runner: Any = torch.compile(model) if form == "compiled" else model

        @torch.inference_mode()
        def infer() -> None:
            runner(images)
            synchronize(where)

        return infer

    task: Any = Classify(model.train(), ())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)  # as `chiasm train` does
    targets = torch.zeros(batch, dtype=torch.long, device=where)
    forward = torch.compile(task) if form == "compiled" else task

    def step() -> None:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=half):
            loss = task.loss(forward(images), targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(where)

    return step
