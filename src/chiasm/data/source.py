"""One description of data for all verbs: what `open_data` returns, and how a data set is named.

photos/                            folder: class sub-folders, or train/ and val/ with class sub-folders (folder.py)
photos.csv                         columns path,label[,split]                                           (table.py)
scenes[:key=value,...]             built-in generated images, no network                                (scenes.py)
torchvision:NAME[:key=value,...]   a public set through torchvision.datasets                               (hub.py)
hf:NAME                            a data set of the HF hub, or a local folder of one                      (hub.py)

A folder may also hold boxes, masks or class maps; see formats.py for which kinds are known, and annotated.py for what
opening them returns.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from chiasm.errors import DataError, UnknownNameError

TRAIN, VAL, TEST = "train", "val", "test"
TASKS = ("classify", "detect", "instances", "segment")

# Every name that is understood for a split, as a folder or in a column.
SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "test": TEST,
    "testing": TEST,
}

ANNOTATION_FILES = (".json", ".yaml", ".yml")
_ANNOTATIONS = {
    "classify": "expected one sub-folder of images per class",
    "detect": "expected COCO JSON, VOC XML or YOLO txt",
    "instances": "expected masks in COCO JSON or polygons in YOLO txt",
    "segment": "expected folders images and masks",
}


class Split:
    """Labelled images that are read one by one.

    Attributes:
        sources: per image its path, or another name a person can find it by.
        labels: per image the index of its class.
    """

    sources: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int) -> Tensor:
        """Image `index` as (3, H, W) uint8 RGB.

        Raises:
            ImageError: when it cannot be read.
        """
        raise NotImplementedError

    def subset(self, indices: Sequence[int]) -> Split:
        """The images `indices` of this split, as a split."""
        return Subset(self, indices)


class Subset(Split):
    """Some images of another split, in the order given."""

    def __init__(self, whole: Split, indices: Sequence[int]) -> None:
        self.whole = whole
        self.indices = [int(i) for i in indices]
        self.sources = [whole.sources[i] for i in self.indices]
        self.labels = [whole.labels[i] for i in self.indices]

    def read(self, index: int) -> Tensor:
        return self.whole.read(self.indices[index])


class Joined(Split):
    """Several splits one after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = list(splits)
        self.sources = [source for split in self.splits for source in split.sources]
        self.labels = [label for split in self.splits for label in split.labels]

    def read(self, index: int) -> Tensor:
        for split in self.splits:
            if index < len(split):
                return split.read(index)
            index -= len(split)
        raise IndexError(index)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set: its classes and its splits.

    Attributes:
        name: short, fit for a file's name.
        classes: class names in the order of the labels.
        splits: by name; the usual ones are 'train', 'val' and 'test'.
        notes: what a person should know but need not act on.
        problems: what must be mended before training; `open_data` raises the first unless told otherwise.
        task: what the data is for: 'classify', or one of those in annotated.py.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())
    task: str = "classify"

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            DataError: when there is none, naming those there are.
        """
        if name not in self.splits:
            raise DataError(f"{self.name}: no split '{name}'; it has {', '.join(self.splits)}.")
        return self.splits[name]

    def need(self, task: str) -> None:
        """Refuse data that is for another task.

        Raises:
            DataError: saying what it is for, and what was expected.
        """
        if self.task != task:
            raise DataError(f"{self.name}: annotated for '{self.task}', here '{task}' is needed; {_ANNOTATIONS[task]}.")

    def fingerprint(self) -> str:
        """16 hex digits, the same for the same images divided the same way, wherever the folder lies.

        Made of the classes and of the file names and labels of train and val, not of what is in the files.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        for split in (self.splits.get(TRAIN), self.splits.get(VAL)):
            if split is not None:
                digest.update(repr([Path(source).name for source in split.sources]).encode())
                digest.update(repr(list(split.labels)).encode())
        return digest.hexdigest()[:16]


def open_data(
    spec: str,
    *,
    task: str | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    ignore_index: int | None = None,
    strict: bool = True,
) -> ImageData:
    """Open a data set; no image is decoded yet, and nothing is downloaded but what `torchvision:` and `hf:` ask for.

    Where there is a train split but no val split, val is split off from train: `val_fraction` of each class, drawn
    with `seed`. A test split is left alone. Images with objects are divided by the rarest class in each, class maps
    without regard to classes.

    Args:
        spec: see the top of this file.
        task: 'classify', 'detect', 'instances' or 'segment'; None for what the data is annotated for.
        val_fraction: 0..1, without the ends.
        seed: of the split.
        ignore_index: the value of class maps that no class is known of; default: that of a class called unlabelled,
            void or ignore.
        strict: raise the first of the data's problems; `chiasm data` looks at them all instead.

    Returns:
        `AnnotatedData` for every task but 'classify'.

    Raises:
        DataError: a missing path, no images, one class only, an empty class, a class that only val has, data that lacks
            what `task` needs, ...
        UnknownNameError: an unknown kind, name or option, with the nearest that exist.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, such as 0.2.")
    if task is not None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS, f"It is one of {', '.join(TASKS)}.")
    data = _annotated(str(spec), task, ignore_index) or _dispatch(str(spec))
    if VAL not in data.splits and TRAIN in data.splits:
        train, val = hold_out(data.splits[TRAIN], val_fraction, seed)
        others = {name: split for name, split in data.splits.items() if name != TRAIN}
        share = f"{val_fraction:.0%} of {'each class' if data.task == 'classify' else 'the images'}"
        note = f"val was split off from train: {share}, seed {seed}"
        data = replace(data, splits={TRAIN: train, VAL: val, **others}, notes=(*data.notes, note))
    data = replace(data, problems=(*data.problems, *_problems(data)))
    if strict and data.problems:
        raise DataError(data.problems[0])
    return data


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide a split in two, class by class: (the rest, `fraction` of each class).

    A class of two or more images has at least one in each part; a single image stays in the first. Which images are
    held out depends on `seed` and on the class's number of images only.
    """
    labels = np.asarray(split.labels, dtype=np.int64)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[np.random.default_rng([seed % 2**32, len(members)]).permutation(members)[:count]] = True
    return split.subset(np.flatnonzero(~held).tolist()), split.subset(np.flatnonzero(held).tolist())


def read_options(text: str, defaults: dict[str, Any] | None = None, *, what: str) -> dict[str, Any]:
    """Parse `key=value,key=value`, where values are YAML (numbers, lists in brackets, words).

    Args:
        text: the options; may be empty.
        defaults: the options there are; those given must have the type of their default. None: any option.
        what: whose options they are, for errors.

    Raises:
        DataError, UnknownNameError: not of this form, of another type, or unknown.
    """
    try:
        options = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError as error:
        raise DataError(f"{what}:{text}: expected key=value,key=value after the colon.") from error
    for key, value in options.items():
        if value is None:
            raise DataError(f"{what}:{text}: '{key}' has no value; expected {key}=value.")
        if defaults is not None:
            if key not in defaults:
                raise UnknownNameError(f"option of {what}", str(key), defaults, f"It has {', '.join(defaults)}.")
            if type(value) is not type(defaults[key]):
                raise DataError(f"{what}: {key}={value}; expected {type(defaults[key]).__name__}.")
    return {**(defaults or {}), **options}


def _annotated(spec: str, task: str | None, ignore_index: int | None) -> ImageData | None:
    """The data as boxes, masks or class maps; None when it is classes that are asked for, or found."""
    kind, _, rest = spec.partition(":")
    if kind == "scenes" and task not in (None, "classify"):
        from chiasm.data.scene_objects import open_scene_objects

        return open_scene_objects(rest, task)
    path = Path(spec).expanduser()
    if task == "classify" or not (path.is_dir() or (path.is_file() and path.suffix.lower() in ANNOTATION_FILES)):
        if task not in (None, "classify") and path.exists():
            raise DataError(f"{spec}: not annotated for --task {task}; {_ANNOTATIONS[task]}.")
        if task not in (None, "classify") and kind in ("torchvision", "hf"):
            raise DataError(f"{spec}: has classes only, not what --task {task} needs; {_ANNOTATIONS[task]}.")
        return None
    from chiasm.data.formats import open_annotated

    data = open_annotated(path, task, ignore_index)
    if data is None and task is not None:
        raise DataError(f"{spec}: not annotated for --task {task}; {_ANNOTATIONS[task]}.")
    return data


def _dispatch(spec: str) -> ImageData:
    # Imports are here so that one kind of data does not load the libraries of the others.
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        from chiasm.data.scenes import open_scenes

        return open_scenes(rest)
    if kind == "torchvision" and rest:
        from chiasm.data.hub import open_torchvision

        return open_torchvision(rest)
    if kind == "hf" and rest:
        from chiasm.data.hub import open_hf

        return open_hf(rest)
    path = Path(spec).expanduser()
    if path.is_dir():
        from chiasm.data.folder import open_folder

        return open_folder(path)
    if path.is_file():
        if path.suffix.lower() in (".csv", ".tsv"):
            from chiasm.data.table import open_table

            return open_table(path)
        raise DataError(f"{spec}: expected a folder of images or a CSV with the columns path,label; saw a file.")
    raise _missing(spec, path)


def _missing(spec: str, path: Path) -> DataError:
    kinds = ["scenes", "torchvision:", "hf:"]
    kind, colon, _ = spec.partition(":")
    near = difflib.get_close_matches(kind + colon if colon else kind, kinds, n=1, cutoff=0.75)
    if path.parent.is_dir():
        try:
            siblings = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
        except OSError:
            siblings = []
        near += [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=2)]
    suggestion = f"; did you mean {' or '.join(near)}?" if near else "."
    return DataError(
        f"{spec}: no such folder or file{suggestion} Data is a folder of images, a CSV, "
        "scenes, torchvision:NAME or hf:NAME."
    )


def _problems(data: ImageData) -> Iterator[str]:
    from chiasm.data.annotated import AnnotatedData, annotated_problems

    return annotated_problems(data) if isinstance(data, AnnotatedData) else _class_problems(data)


def _class_problems(data: ImageData) -> Iterator[str]:
    if not data.splits or not any(len(split) for split in data.splits.values()):
        return
    if len(data.classes) < 2:
        yield f"{data.name}: one class only ('{data.classes[0]}'); a classifier needs images of two or more classes."
    if TRAIN not in data.splits:
        return
    trained = set(data.splits[TRAIN].labels)
    for name, split in data.splits.items():
        if strangers := sorted(set(split.labels) - trained):
            names = ", ".join(data.classes[label] for label in strangers)
            yield (
                f"{data.name}: {name} has classes that train has not: {names}; "
                "add training images of them or take them out."
            )


def as_name(text: str | os.PathLike[str]) -> str:
    """A short name for a data set, made of letters, digits, dots, dashes and underscores of any script."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(text).name).strip("-.") or "data"
