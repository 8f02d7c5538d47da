"""A folder of images: sub-folders are classes.

    photos/cat/*.jpg  photos/dog/*.jpg                              one folder; val is split off from it
    photos/train/cat/*.jpg  photos/val/cat/*.jpg ...                splits as folders (also valid/, validation/, test/)

A folder counts as a split when it has a split's name and sub-folders of its own, so a class may be called "train".
Images may lie deeper inside a class's folder. Hidden files, and files without an image's suffix, are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from chiasm.data.images import read_image, walk_images
from chiasm.data.source import SPLIT_NAMES, ImageData, Split, as_name
from chiasm.errors import DataError


class FileSplit(Split):
    """Images in files."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.sources = list(paths)
        self.labels = list(labels)

    def read(self, index: int) -> Tensor:
        return read_image(self.sources[index])

    def subset(self, indices: Sequence[int]) -> FileSplit:
        return FileSplit([self.sources[i] for i in indices], [self.labels[i] for i in indices])


def open_folder(root: Path) -> ImageData:
    """A folder as data; see the top of this file.

    Raises:
        DataError: when there are no class folders or no images at all. Empty class folders and the like are
            `problems` of the result.
    """
    folders, stray = _entries(root)
    splits = {name: root / name for name in folders if name.lower() in SPLIT_NAMES and _entries(root / name)[0]}
    if splits:
        return _open_splits(root, splits, ignored=[name for name in folders if name not in splits])
    if not folders:
        seen = f"{len(stray)} files and no sub-folder" if stray else "nothing"
        raise DataError(f"{root}: saw {seen}; expected one sub-folder of images per class, such as {root}/cat.")
    found = _class_files(root, folders)
    return _assemble(root, {"train": (root, found)}, notes=_stray_notes(root, stray))


def _open_splits(root: Path, splits: Mapping[str, Path], ignored: Sequence[str]) -> ImageData:
    found: dict[str, tuple[Path, dict[str, list[str]]]] = {}
    notes = [f"{root / name}: left out, because it is none of the splits {', '.join(splits)}" for name in ignored]
    for name, folder in splits.items():
        split = SPLIT_NAMES[name.lower()]
        if split in found:
            raise DataError(f"{root}: '{found[split][0].name}' and '{name}' both mean {split}; keep one of them.")
        classes, stray = _entries(folder)
        notes += _stray_notes(folder, stray)
        found[split] = (folder, _class_files(folder, classes))
    order = [split for split in ("train", "val", "test") if split in found]
    return _assemble(root, {split: found[split] for split in order}, notes=notes)


def _assemble(root: Path, found: Mapping[str, tuple[Path, dict[str, list[str]]]], notes: Sequence[str]) -> ImageData:
    """Splits from the files per class; labels are the sorted names of all classes that have images anywhere."""
    classes = tuple(sorted({name for _, files in found.values() for name, paths in files.items() if paths}))
    if not classes:
        raise DataError(f"{root}: no image files in its sub-folders; expected one sub-folder of images per class.")
    label_of = {name: label for label, name in enumerate(classes)}
    notes, problems, splits = list(notes), [], {}
    for split, (folder, files) in found.items():
        for name, paths in files.items():
            if not paths:
                problems.append(f"{folder / name}: no images of this class; add some or remove the folder.")
        if split != "train" and "train" in found:
            missing = sorted({c for c, paths in found["train"][1].items() if paths} - {c for c in files if files[c]})
            notes += [
                f"{folder}: no images of class '{name}', which train has" for name in missing if name not in files
            ]
        pairs = [(path, label_of[name]) for name, paths in files.items() for path in paths]
        splits[split] = FileSplit([path for path, _ in pairs], [label for _, label in pairs])
    return ImageData(
        name=as_name(root.resolve()), classes=classes, splits=dict(splits), notes=tuple(notes), problems=tuple(problems)
    )


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the files in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
    return [e.name for e in entries if e.is_dir()], [e.name for e in entries if not e.is_dir()]


def _class_files(folder: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    return {name: list(walk_images(folder / name)) for name in classes}


def _stray_notes(folder: Path, stray: Sequence[str]) -> list[str]:
    return [f"{folder}: {len(stray)} files beside the class folders are left out ({stray[0]} ...)"] if stray else []
