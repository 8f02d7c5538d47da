"""chiasm describe: a model stage by stage, and what goes in and comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.models import FeatureInfo
from torch import Tensor, nn

from chiasm.config import DescribeConfig, Preprocess, height_and_width
from chiasm.errors import ChiasmError
from chiasm.measure import count_macs
from chiasm.model_file import resolve_model
from chiasm.models import set_input_size
from chiasm.models.checkpoints import input_channels


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a model.

    Attributes:
        name: of the module, as in the state dict.
        map: (C, H, W) of the feature map that it gives, whichever way the model lays it out; None for none.
        tokens: (N, D) of the tokens that it gives, class token included; None for none.
        vector: length of the vector that it gives (pooled features, logits); None for none.
        parameters: weights in it.
        macs: multiply-accumulates in it for one image: convolutions, matrix products and attention.
    """

    name: str
    map: tuple[int, int, int] | None
    tokens: tuple[int, int] | None
    vector: int | None
    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Input:
    """What goes in: float32 (B, channels, height, width), RGB in this order, normalised.

    Attributes:
        shape: (channels, height, width) of this description.
        mean, std: per channel, of values 0..1.
        range: smallest and largest value that a pixel has after that.
        crop, interpolation: as in `chiasm.config.Preprocess`.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, float]
    crop: float
    interpolation: str
    dtype: str = "float32"
    order: str = "RGB"


@dataclass(frozen=True, kw_only=True)
class Level:
    """A feature map that `features_only=True` gives: (B, channels, ceil(H / stride), ceil(W / stride))."""

    name: str
    channels: int
    stride: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model stage by stage.

    Attributes:
        architecture: its name.
        trained: False for random weights.
        task: what it is for.
        labels: the class names in the order of the logits.
        input: what goes in.
        outputs: shape, without the batch, of what comes out: 'output' of `model(x)`, and each branch's logits of
            `forward_branches` by name; of a detector the levels of its pyramid by name.
        levels: what `features_only=True` gives.
        stages: in the order of the forward pass; their parameters and MACs add up to the totals.
        parameters: weights in all.
        macs: multiply-accumulates in all, for one image.
    """

    architecture: str
    trained: bool
    task: str
    labels: tuple[str, ...]
    input: Input
    outputs: dict[str, tuple[int, ...]]
    levels: tuple[Level, ...]
    stages: tuple[Stage, ...]
    parameters: int
    macs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(**flags: Any) -> Description:
    """Describe a model file, a run folder or an architecture; the flags are the fields of `DescribeConfig`.

    Raises:
        ChiasmError: for a model that cannot be had, or an image size that it does not take.
    """
    config = DescribeConfig.from_flags(**flags)
    model, info = resolve_model(
        config.model,
        in_chans=None if config.in_chans == 3 else config.in_chans,
        num_classes=config.num_classes,
        **config.model_args,
    )
    size = height_and_width(config.image_size) or info.preprocess.size
    if size != info.preprocess.size:
        set_input_size(getattr(model, "backbone", model), size)
    image = torch.zeros(1, input_channels(model), *size)
    try:
        outputs, stages, macs = _run(model, image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChiasmError(f"{info.architecture} does not take images of {size[0]}x{size[1]} px ({reason}).") from error
    return Description(
        architecture=info.architecture,
        trained=info.trained,
        task=info.task,
        labels=info.labels,
        input=_input(info.preprocess, image),
        outputs=outputs,
        levels=tuple(_levels(model, size)),
        stages=stages,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs,
    )


def show(result: Description, config: DescribeConfig) -> int:
    """Print a description as a table, or as JSON."""
    if config.format == "json":
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        return 0
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 120)
    weights = "" if result.trained else ", random weights"
    console.print(f"[bold]{result.architecture}[/bold]{weights}\n", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for title in ("map C x H x W", "tokens N x D", "vector", "parameters", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in result.stages:
        vector = "" if stage.vector is None else str(stage.vector)
        cells = (_times(stage.map), _times(stage.tokens), vector, f"{stage.parameters:,}", _millions(stage.macs))
        table.add_row(stage.name, *cells)
    table.add_row("total", "", "", "", f"{result.parameters:,}", _millions(result.macs), style="bold")
    console.print(table)
    for line in _in_and_out(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _in_and_out(result: Description) -> Iterator[str]:
    given = result.input
    height, width = given.shape[1:]
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (given.mean, given.std))
    yield f"\nin   {given.dtype} (B, {', '.join(map(str, given.shape))}), {given.order}, pixels 0..1 less mean ({mean})"
    yield f"     over std ({std}): values {given.range[0]:.2f} to {given.range[1]:.2f}"
    if result.task == "classify":
        yield (
            f"     from an image: {given.interpolation} resize to cover {_side(height, given.crop)}x"
            f"{_side(width, given.crop)}, centre crop {height}x{width}"
        )
    else:
        yield f"     from an image: the whole of it, as large as fits, in the middle of {height}x{width}"
    known = ", ".join(result.labels[:5]) + (", ..." if len(result.labels) > 5 else "")
    if "output" not in result.outputs:
        for name, own in result.outputs.items():
            yield f"out  (B, {', '.join(map(str, own))}): level '{name}' of the pyramid"
        yield f"     classes: {known}; what the heads cost depends on how much there is to see and is not counted"
        return
    shape = ", ".join(map(str, result.outputs["output"]))
    branches = [name for name in result.outputs if name != "output"]
    if not result.labels:
        yield f"out  (B, {shape}): features, as there is no classifier"
    else:
        mean_of = f", the mean of the branches {' and '.join(branches)}" if len(branches) > 1 else ""
        where = " of every pixel" if result.task == "segment" else ""
        yield f"out  (B, {shape}): logits{where}{mean_of}; softmax gives the probability of each class"
        for name in branches:
            yield f"     forward_branches(x)['{name}']: (B, {', '.join(map(str, result.outputs[name]))}) logits"
        yield f"     classes: {known}"
    if result.levels:
        yield "features_only=True gives"
    for level in result.levels:
        yield f"     (B, {', '.join(map(str, level.shape))})  stride {level.stride}, behind {level.name}"


# ------------------------------------------------------------------------------------------------------------ measuring


def _run(model: nn.Module, image: Tensor) -> tuple[dict[str, tuple[int, ...]], tuple[Stage, ...], int]:
    """The shapes of the outputs, the stages, and the MACs in all, of one forward pass."""
    parts = dict(_parts(model))
    shapes: dict[str, dict[str, Any]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        shapes[name] = _shapes(output, image)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in parts.items()]
    try:
        output, macs_of = count_macs(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    answers = output if isinstance(output, dict) else {"output": output}
    outputs = {name: tuple(answer.shape[1:]) for name, answer in answers.items() if answer is not image}
    branches = getattr(model, "forward_branches", None)
    if branches is not None and model.num_classes:
        with torch.no_grad():
            outputs |= {name: tuple(logits.shape[1:]) for name, logits in branches(image).items()}

    total = macs_of[""]
    stages, counted_parameters, counted_macs = [], 0, 0
    for name, shape in shapes.items():  # in the order in which they were first done
        parameters = sum(p.numel() for p in parts[name].parameters())
        macs = macs_of.get(name, 0)
        if parameters or macs:
            stages.append(Stage(name=name, parameters=parameters, macs=macs, **shape))
            counted_parameters, counted_macs = counted_parameters + parameters, counted_macs + macs
    all_parameters = sum(p.numel() for p in model.parameters())
    if (all_parameters, total) != (counted_parameters, counted_macs):  # class tokens, position embeddings, functions
        rest = {"parameters": all_parameters - counted_parameters, "macs": total - counted_macs}
        stages.append(Stage(name="(outside of these)", map=None, tokens=None, vector=None, **rest))
    return outputs, tuple(stages), total


def _parts(model: nn.Module, levels: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The modules that make the rows: the children, and in their place those of containers, of what holds feature
    levels and of networks within a network."""
    levels = [*levels, *(level["module"] for level in _feature_info(model))]
    for name, child in model.named_children():
        inside = [level.removeprefix(f"{name}.") for level in levels if level.startswith(f"{name}.")]
        if inside or isinstance(child, nn.ModuleList | nn.ModuleDict) or _feature_info(child):
            yield from ((f"{name}.{inner}", module) for inner, module in _parts(child, inside))
        else:
            yield name, child


def _shapes(output: Any, image: Tensor) -> dict[str, Any]:
    """The shapes of the map, the tokens and the vector in what a module gave, each the first of its kind."""
    shapes: dict[str, Any] = {"map": None, "tokens": None, "vector": None}
    kinds = {4: "map", 3: "tokens", 2: "vector"}
    for tensor in _tensors(output):
        kind = kinds.get(tensor.ndim)
        if kind is None or shapes[kind] is not None:
            continue
        shape = tuple(tensor.shape[1:])
        shapes[kind] = _channels_first(shape, image) if kind == "map" else shape if kind == "tokens" else shape[0]
    return shapes


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def _channels_first(shape: tuple[int, ...], image: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of a map that may be laid out (H, W, C): H to W is as in the image."""
    aspect = math.log(image.shape[-2] / image.shape[-1])
    first, last = (abs(math.log(h / w) - aspect) for h, w in (shape[1:], shape[:2]))
    return (shape[2], shape[0], shape[1]) if last < first else (shape[0], shape[1], shape[2])


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    return info.get_dicts() if isinstance(info, FeatureInfo) else list(info)


def _levels(model: nn.Module, size: tuple[int, int]) -> Iterator[Level]:
    for level in _feature_info(model):
        stride, channels = int(level["reduction"]), int(level["num_chs"])
        shape = (channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        yield Level(name=level["module"], channels=channels, stride=stride, shape=shape)


def _input(stated: Preprocess, image: Tensor) -> Input:
    bounds = [(limit - m) / s for m, s in zip(stated.mean, stated.std, strict=True) for limit in (0, 1)]
    channels, height, width = image.shape[1:]
    return Input(
        shape=(channels, height, width),
        mean=stated.mean,
        std=stated.std,
        range=(min(bounds), max(bounds)),
        crop=stated.crop,
        interpolation=stated.interpolation,
    )


def _side(side: int, crop: float) -> int:
    return math.floor(side / crop)


def _times(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else " x ".join(map(str, shape))


def _millions(macs: int) -> str:
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"
