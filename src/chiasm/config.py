"""The settings of every verb, one dataclass each. The command's flags, the YAML keys and the Python keyword arguments
are these fields: there is no second place where a setting or its default is written.

Torch is not imported here, so `chiasm --help` is instant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import yaml

from chiasm.errors import ChiasmError, UnknownNameError

T = TypeVar("T")


def _flag(default: Any, help: str) -> Any:
    """A field with its default and the sentence that `--help` shows."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    """A field without a default."""
    return field(metadata={"help": help})


def _positional(help: str, default: Any = MISSING) -> Any:
    """A field that stands first on the command line, without a flag."""
    metadata = {"help": help, "positional": True}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def default_of(item: Field) -> Any:
    """The default of a dataclass field, or `MISSING`."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def _convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as the kind of its field. A path is a text, one item a list of one, and YAML's '1e-3', a text to YAML,
    a number."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        if str(value) not in options:
            raise UnknownNameError(name, str(value), options, f"It is one of {', '.join(options)}.")
        return str(value)
    if origin is UnionType:
        return (
            None if value is None else _convert(name, value, next(kind for kind in options if kind is not type(None)))
        )
    if origin is list:
        return [_convert(name, item, options[0]) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, os.PathLike, int)):
        return str(value)
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = kind(float(value))
            if number == float(value):
                return number
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    raise ChiasmError(f"{name} is {value!r}: expected {expected.get(kind, 'key: value pairs')}.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all settings share: strict keys, YAML in and out."""

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Build from keyword arguments.

        Raises:
            UnknownNameError: for a flag or a choice that does not exist, with the nearest that does.
            ChiasmError: for a required flag that is missing, or a value of another kind.
        """
        names = [f.name for f in fields(cls)]
        for name in flags:
            if name not in names:
                raise UnknownNameError("option", name, names)
        for f in fields(cls):
            if f.name not in flags and default_of(f) is MISSING:
                raise ChiasmError(f"'{f.name}' is needed: {f.metadata['help']}")
        kinds = get_type_hints(cls)
        return cls(**{name: _convert(name, value, kinds[name]) for name, value in flags.items()})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_yaml(self, without: Sequence[str] = ()) -> str:
        """Every setting; those in `without` as null, which reads back as not given."""
        values = self.to_dict() | dict.fromkeys(without)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an RGB image becomes the network's input; it travels inside the model file.

    The image is resized so that the `size / crop` box is covered, centre-cropped to `size` (height, width), scaled to
    0..1 and normalised with `mean` and `std` (one value per input channel).
    """

    size: tuple[int, int]
    crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


# --------------------------------------------------------------------------------------------------------------- train

_DATA = "image folder, CSV, scenes[:key=value,...], torchvision:NAME or hf:NAME (see docs/data.md)"
_ANNOTATED = "COCO, VOC, YOLO, or folders of images and masks"
_IGNORE_INDEX = "value of masks without a class; default: of a class unlabelled, void, ignore"
RecipeName = Literal["scratch", "finetune", "quick"]
TaskName = Literal["auto", "classify", "detect", "instances", "segment"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Train a model on your images: classes, boxes, masks or class maps; the run folder holds all that comes of it."""

    data: str | None = _positional(f"{_DATA}; or {_ANNOTATED}; not needed with --resume", None)
    task: TaskName = _flag("auto", "what to find in an image; auto: what the data is annotated for")
    model: str = _flag("conformer_nano_patch16_128", "architecture's name (chiasm models), ours or timm's")
    recipe: RecipeName = _flag("scratch", "defaults by purpose: scratch, finetune or quick")
    out: str | None = _flag(None, "run folder; default runs/<data>-<model>-<number>")
    resume: str | None = _flag(None, "run folder to continue from its last complete checkpoint")
    weights: str | None = _flag(None, "checkpoint to start from: a path or URL, any dialect; of a part: conv=FILE")
    pretrained: bool = _flag(False, "start from the weights published for this architecture")
    model_args: dict[str, Any] = _flag({}, "further arguments of the architecture, as YAML: '{coupling: none}'")

    # data
    image_size: int | None = _flag(
        None, "side of the square training image in pixels; default: the model's own, 512 for boxes, masks and maps"
    )
    val_fraction: float = _flag(0.2, "share held out, per class and seeded, where the data has no val split")
    ignore_index: int | None = _flag(None, _IGNORE_INDEX)
    workers: int | None = _flag(None, "processes that read images; default: from the machine")
    cache: bool = _flag(True, "keep decoded images in memory when they fit in a quarter of it")

    # detection and segmentation
    head: Literal["auto", "faster_rcnn", "mask_rcnn", "fcos", "upernet", "fpn", "deeplabv3plus", "unet"] = _flag(
        "auto", "what reads the backbone's maps; auto: the usual one of the task"
    )
    head_args: dict[str, Any] = _flag({}, "further arguments of the head, as YAML: '{channels: 128}'")
    maps: Literal["auto", "conv", "tokens", "both"] = _flag(
        "auto", "of a backbone of two branches: which branch's maps the head reads"
    )
    anchors: Literal["default", "data"] = _flag("default", "sizes of the anchor boxes: usual, or from the data's boxes")
    frozen_bn: Literal["auto", "yes", "no"] = _flag(
        "auto", "batch norms keep their statistics; auto: where the weights were loaded"
    )
    scale_jitter: list[float] = _flag([0.5, 2.0], "least and most random size of an image, over the size that fits")
    color_jitter: float = _flag(
        0.2, "random change of brightness, contrast and saturation, 0..1; hues by a tenth of it"
    )
    dice: float = _flag(1.0, "of class maps: weight of the Dice loss beside cross-entropy")

    # schedule
    epochs: int = _flag(100, "passes over the training images")
    max_minutes: float | None = _flag(None, "stop after this wall time; the schedule then follows time, not epochs")
    batch_size: int = _flag(64, "images per step and device")
    accumulate: int = _flag(1, "steps whose gradients are added up before an update")
    optimizer: Literal["adamw", "sgd", "lamb", "lion", "adam", "rmsprop"] = _flag("adamw", "optimiser")
    lr: float = _flag(1e-3, "peak learning rate")
    min_lr: float = _flag(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: float = _flag(5.0, "epochs of linear warm-up, at most a fifth of the run")
    weight_decay: float = _flag(0.05, "weight decay; none on biases, norms and class tokens")
    momentum: float = _flag(0.9, "momentum of SGD and RMSprop, beta1 of the others")
    layer_decay: float | None = _flag(None, "factor on the learning rate per layer from the head down, e.g. 0.75")
    clip_grad: float | None = _flag(1.0, "gradient norm at most this")
    lr_scale: dict[str, Any] = _flag({}, "learning rates of parts over --lr, by prefix, as YAML: '{conv: 0.1}'")
    freeze: list[str] = _flag([], "prefixes of parameters that stay as they are; 'backbone' means all but the heads")

    # regularisation
    label_smoothing: float = _flag(0.1, "share of the target given to all classes alike")
    mixup: float = _flag(0.8, "mixup alpha; 0 is off")
    cutmix: float = _flag(1.0, "cutmix alpha; 0 is off")
    mix_probability: float = _flag(1.0, "share of batches that are mixed")
    rand_augment: int = _flag(9, "RandAugment magnitude 0..30, two operations; 0 is off")
    random_erasing: float = _flag(0.25, "probability of erasing a rectangle")
    crop_scale: float = _flag(0.08, "smallest share of the image's area that a random crop keeps; 1 is off")
    flip: float = _flag(0.5, "probability of a horizontal flip")
    drop_path: float = _flag(0.1, "stochastic depth at the last block")
    ema: float | None = _flag(
        None, "decay of the weights' moving average, e.g. 0.999; evaluated and saved in their place"
    )
    class_weights: Literal["none", "balanced"] = _flag("none", "weigh the loss by inverse class frequency")
    early_stopping: int = _flag(0, "stop after this many epochs without a better val score; 0 is off")

    # machine
    seed: int = _flag(0, "seed of weights, order and augmentation")
    accelerator: str = _flag("auto", "auto, cpu, gpu, mps ... (Lightning's names)")
    devices: str = _flag("auto", "number of devices, or a list such as 0,1")
    num_nodes: int = _flag(1, "machines, started with torchrun or SLURM")
    strategy: str = _flag("auto", "auto, ddp or ddp_find_unused_parameters_true")
    precision: Literal["auto", "32", "bf16", "16"] = _flag(
        "auto", "auto: bf16 where GPU or processor compute in it, else 32 bits"
    )
    compile: bool = _flag(False, "torch.compile the model")
    grad_checkpointing: bool = _flag(False, "recompute activations: less memory, more time")
    keep: Literal["best", "last"] = _flag(
        "best", "epoch whose weights become the model: best val score, or last, chosen by nothing"
    )
    checkpoint_minutes: float = _flag(5.0, "save a checkpoint at each epoch's end and at least this often")
    loggers: list[Literal["tensorboard", "wandb"]] = _flag(["tensorboard"], "where metrics go besides metrics.csv")

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Build from keyword arguments over the defaults of `recipe` (`RECIPES`), and over those what `TASK_DEFAULTS`
        says of it for `task`."""
        name = flags.get("recipe", "scratch")
        if name not in RECIPES:
            raise UnknownNameError("recipe", str(name), RECIPES)
        if flags.get("data") is None and flags.get("resume") is None:
            raise ChiasmError(f"what to train on? Give an {_DATA}, or --resume RUN.")
        of_task = TASK_DEFAULTS.get(str(flags.get("task")), {}).get(name, {})
        given = {key: value for key, value in flags.items() if key != "image_size" or value is not None}
        return super().from_flags(**(RECIPES[name] | of_task | given))


_DENSE: dict[str, Any] = {
    "image_size": 512,
    "epochs": 50,
    "batch_size": 8,
    "lr": 3e-4,
    "warmup_epochs": 1.0,
    "drop_path": 0.1,
    "layer_decay": None,
    # What one label per image is for.
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rand_augment": 0,
    "random_erasing": 0.0,
    "crop_scale": 1.0,
}
_DENSE_RECIPES: dict[str, dict[str, Any]] = {
    "scratch": _DENSE,
    # The head is new, the backbone is not: it learns at a tenth of the rate.
    "finetune": {**_DENSE, "epochs": 25, "lr_scale": {"backbone": 0.1}},
    "quick": {**_DENSE, "epochs": 12, "lr": 6e-4},
}
# By task and recipe; classification has the recipes as they are.
TASK_DEFAULTS = {"detect": _DENSE_RECIPES, "instances": _DENSE_RECIPES, "segment": _DENSE_RECIPES}

RECIPES: dict[str, dict[str, Any]] = {
    # From random weights, after the Conformer authors' recipe (arXiv 2105.03889, section 4.1), shortened
    # from 300 epochs of batch 1024 to 100 of batch 64: the defaults above.
    "scratch": {},
    # From pretrained weights: short, a lower rate towards the input, little mixing.
    "finetune": {
        "epochs": 30,
        "lr": 2e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 3.0,
        "layer_decay": 0.75,
        "mixup": 0.0,
        "cutmix": 0.5,
        "mix_probability": 0.5,
        "crop_scale": 0.3,
        "random_erasing": 0.1,
    },
    # From random weights within minutes on a laptop: too few steps for strong augmentation to pay.
    "quick": {
        "epochs": 20,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "rand_augment": 0,
        "random_erasing": 0.0,
        "crop_scale": 0.35,
        "drop_path": 0.0,
    },
}


# --------------------------------------------------------------------------------------------------------- other verbs


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Find out which of several networks, coupled or alone, is worth its cost on your images."""

    models: list[str] = _flag([], "candidates: NAME or NAME,key=value ... with settings of its own; as=LABEL names it")
    data: str = _required(f"{_DATA}")
    seeds: int = _flag(3, "how often each is trained: seeds 0, 1, 2 ...")
    budget: str = _flag("20ep", "what each run may spend on training: 20ep (epochs), 10m, 1.5h, or 300tf (TFLOP)")
    match: Literal["none", "params", "macs"] = _flag(
        "none", "also the single networks, widened to the parameters or MACs of the dearest coupled one"
    )
    recipe: RecipeName = _flag("quick", "defaults of train by purpose: scratch, finetune or quick")
    image_size: int | None = _flag(None, "side of the square image in pixels; default: each model's own")
    precision: Literal["auto", "32", "bf16", "16"] = _flag("auto", "as in train")
    train_args: dict[str, Any] = _flag({}, "further settings of train for all candidates, as YAML: '{lr: 0.001}'")
    accelerator: str = _flag("auto", "auto, cpu, gpu, mps ... (Lightning's names)")
    out: str | None = _flag(None, "folder of the study; default runs/compare-<data>. One that is there goes on")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Measure a trained model on annotated images: table, JSON and a self-contained HTML report."""

    model: str = _positional("model file, run folder or architecture's name")
    data: str | None = _positional("data as for train; default: what the run was trained on", None)
    split: str = _flag("val", "split to measure; 'all' for every image")
    val_fraction: float = _flag(0.2, "as in train, where the data has no val split")
    seed: int = _flag(0, "as in train: seed of the split")
    ignore_index: int | None = _flag(None, "as in train, of class maps; default: the run's own on its data")
    branches: Literal["both", "conv", "tokens"] = _flag(
        "both", "of a coupled model: which branches answer; one alone is faster, without what the other gave it"
    )
    image_size: int | None = _flag(None, "side in pixels; default: the model's own")
    zoom: float = _flag(1.0, "over 1: windows that overlap, of an image this much larger (segmenters)")
    batch_size: int | None = _flag(None, "images at a time; default: 64 for classifiers, else 8")
    workers: int | None = _flag(None, "processes that read images; default: from the machine")
    device: str = _flag("auto", "auto, cpu, cuda, mps")
    out: str | None = _flag(None, "folder for report.html and metrics.json; default: evaluation/ beside the model")
    gallery: int = _flag(24, "pictures in each gallery of the report; 0 keeps photographs out of it, to pass it on")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    """Classes, objects or class maps of images and videos: files, folders, globs, or '-' for paths on stdin."""

    model: str = _positional("model file, run folder or architecture's name")
    images: list[str] = _positional("images or videos: files, folders, globs, or - to read paths from stdin")
    format: Literal["table", "jsonl", "csv", "coco"] = _flag("table", "table, jsonl, csv, or coco (detectors)")
    out: str | None = _flag(None, "write to this file instead of the terminal")
    draw: str | None = _flag(None, "folder for pictures, and videos, with the result drawn on them")
    masks: str | None = _flag(
        None, "folder for PNGs: class maps of a segmenter, numbered objects of a detector with masks"
    )
    top: int = _flag(3, "classes listed per image (classifiers)")
    threshold: float = _flag(0.5, "least score of an object, 0 to 1 (detectors; none is below 0.05)")
    zoom: float = _flag(1.0, "over 1: windows that overlap, of an image this much larger (segmenters)")
    every: int = _flag(1, "of a video: each n-th frame")
    branches: Literal["both", "conv", "tokens"] = _flag(
        "both", "of a coupled model: which branches answer; one alone is faster, without what the other gave it"
    )
    image_size: int | None = _flag(None, "side in pixels; default: the model's own")
    batch_size: int | None = _flag(None, "images at a time; default: 32, of detectors and segmenters 4")
    workers: int | None = _flag(None, "processes that read images; default: from the machine")
    device: str = _flag("auto", "auto, cpu, cuda, mps")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Config):
    """See what each branch looked at: heat maps, feature maps, how far each branch sees; as pictures and a page."""

    model: str = _positional("model file, run folder or architecture's name")
    images: list[str] = _positional("images: files, folders, globs; not needed with --evaluate", [])
    out: str = _flag("explained", "folder for index.html, the pictures and the raw maps")
    label: str | None = _flag(None, "class that is explained; default: of each image what the model says")
    top: int = _flag(3, "objects (detectors) or classes (segmenters) explained per image")
    beside: list[str] = _flag([], "further models, for the figure of all images and all branches side by side")
    image_size: int | None = _flag(None, "side in pixels; default: the model's own")
    level: int | None = _flag(
        None, "of a classifier: which feature map Grad-CAM reads, -1 for the deepest, -2 ...; default: the usual"
    )
    measures: bool = _flag(True, "measure how far attention and features reach, and how alike the branches are")
    evaluate: str | None = _flag(None, "data as for evaluate: are the maps right? Deletion, insertion, localisation")
    split: str = _flag("val", "split of --evaluate")
    limit: int = _flag(200, "images of --evaluate at most, drawn evenly")
    device: str = _flag("auto", "auto, cpu, cuda, mps")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Serve models over HTTP: a page to drop images on, and an API that answers many at once in batches."""

    models: list[str] = _positional("model files or run folders, or NAME=PATH; the first answers where none is named")
    host: str = _flag("127.0.0.1", "address to listen at; others than this machine's own need a key")
    port: int = _flag(8000, "port to listen at; 0 takes any that is free")
    api_key: str | None = _flag(None, "key that requests must show; better in the variable CHIASM_API_KEY")
    cors: list[str] = _flag([], "origins whose pages may read the answers, such as https://example.org")
    batch: int = _flag(16, "images that go through the model at a time, at most")
    wait_ms: float = _flag(5.0, "how long an idle model waits for images that are being decoded, in milliseconds")
    queue: int = _flag(256, "images that may wait; more are told to come again (429)")
    max_mb: float = _flag(20.0, "megabytes of an image as it is sent; a request of several may have four times that")
    max_megapixels: float = _flag(50.0, "megapixels of an image, read from its header")
    timeout: float = _flag(30.0, "seconds in which an image is answered or given up (504)")
    threshold: float = _flag(0.5, "least score of an object where a request names none (detectors)")
    image_size: int | None = _flag(None, "side in pixels; default: the model's own")
    quiet: bool = _flag(False, "no line on stderr for each request")
    device: str = _flag("auto", "auto, cpu, cuda, mps")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Check a data set before training: counts, sizes, broken files, duplicates; with a contact sheet."""

    data: str = _positional(f"{_DATA}; or {_ANNOTATED}")
    task: TaskName = _flag("auto", "what the data is for; auto: what it is annotated for")
    ignore_index: int | None = _flag(None, _IGNORE_INDEX)
    val_fraction: float = _flag(0.2, "share held out, per class and seeded, where the data has no val split")
    seed: int = _flag(0, "seed of the split and of the contact sheet")
    sheet: str | None = _flag("contact-sheet.png", "where the contact sheet goes; 'none' for no picture")
    format: Literal["table", "json"] = _flag("table", "what is printed")
    workers: int | None = _flag(None, "processes that read images; default: from the machine")


@dataclass(frozen=True, kw_only=True)
class DescribeConfig(Config):
    """Show a model stage by stage: shapes of map and tokens, parameters, MACs, and what goes in and out."""

    model: str = _positional("model file, run folder or architecture's name")
    image_size: list[int] = _flag([], "side, or height and width, in pixels; default: the model's own")
    in_chans: int = _flag(3, "input channels (architecture's name only)")
    num_classes: int | None = _flag(None, "classes (architecture's name only)")
    model_args: dict[str, Any] = _flag({}, "further arguments of the architecture, as YAML")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Config):
    """List the architectures."""

    pattern: str = _positional("part of a name, or a glob such as 'resnet*'", "")
    all: bool = _flag(False, "also timm's own")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """Identify a checkpoint: whose names, which architecture, the fate of every key; convert it to a model file."""

    file: str = _positional("checkpoint: a path or URL, any published dialect")
    model: str | None = _flag(None, "architecture's name, where the file does not tell it")
    model_args: dict[str, Any] = _flag({}, "further arguments of the architecture, as YAML; with --model")
    out: str | None = _flag(None, "write this model file, such as model.safetensors")
    labels: str | None = _flag(None, "text file with one class name per line, for --out; default: class 0, class 1 ...")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """Measure models side by side: inference, training step and memory, beside the machine's own limit."""

    models: list[str] = _positional("model files, run folders, architectures' names, timm:NAME, torchvision:NAME")
    peer: str | None = _flag(None, "which of them the others are compared with; default: the first")
    batch: list[str] = _flag(["1", "8"], "images at a time; 'max' for as many as fill the GPU")
    image_size: list[int] = _flag([], "side, or height and width, in pixels; default: each model's own")
    seconds: float = _flag(120.0, "time for the rounds of all comparisons; each has at least five")
    rounds: int | None = _flag(None, "rounds of each comparison, in place of a time")
    train: bool = _flag(True, "measure the training step too")
    compile: bool = _flag(False, "measure torch.compile too")
    memory: bool = _flag(True, "measure the peak memory too")
    apart: bool = _flag(True, "on a CPU, a process for each network, as in use")
    drop_path: float = _flag(TrainConfig.drop_path, "stochastic depth in training, where a named architecture takes it")
    precision: Literal["32", "bf16"] = _flag("32", "32 or bf16")
    threads: int | None = _flag(None, "threads on the CPU; default: PyTorch's own choice")
    device: str = _flag("auto", "auto, cpu, cuda, mps")
    out: str | None = _flag("bench", "folder for bench.md, bench.json and bench.svg; null for none")
    format: Literal["table", "json"] = _flag("table", "what is printed")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Train a small Conformer on the built-in images (about two minutes on two cores) and show what came out."""

    out: str = _flag("demo-run", "folder for the run, the picture and the report")
    minutes: float = _flag(1.5, "training time")
    seed: int = _flag(0, "seed")


def height_and_width(image_size: list[int]) -> tuple[int, int] | None:
    """The setting `image_size`: one side or both in pixels; None where it was not given.

    Raises:
        ChiasmError: for more than two numbers, or one below 1.
    """
    if not image_size:
        return None
    if len(image_size) > 2 or min(image_size) < 1:
        raise ChiasmError(
            f"--image-size {image_size}: expected a side, or height and width, in pixels, such as [224, 320]."
        )
    return image_size[0], image_size[-1]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        ChiasmError: when the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ChiasmError(f"{path}: cannot read these settings ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ChiasmError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ChiasmError(f"{path}: expected 'key: value' lines, saw {type(content).__name__}.")
    return content
