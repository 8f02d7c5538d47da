"""Where images and their annotations lie in a folder, whatever the tool that put them there.

    root/train/images  root/train/ANNOTATIONS      root/images/train  root/ANNOTATIONS/train
    root/train/*       (both in one folder)        root/images        root/ANNOTATIONS         root/* (both)

ANNOTATIONS is one of the names that a format is known to use. Names are read without regard to case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.data.annotated import Finding
from chiasm.data.images import SUFFIXES
from chiasm.data.source import SPLIT_NAMES
from chiasm.errors import DataError

IMAGE_FOLDERS = ("images", "jpegimages", "image", "imgs", "img")


@dataclass(frozen=True)
class Part:
    """One split's folders; they may be the same."""

    images: Path
    annotations: Path


def find_parts(
    root: Path, folders: Sequence[str], is_annotation: Callable[[str], bool], *, beside: bool
) -> dict[str, Part]:
    """The folders of images and annotations by split, 'train' where the data is not divided; {} when there are none.

    Args:
        folders: names of annotation folders, in lower case, best first.
        is_annotation: whether a file's name is that of an annotation.
        beside: whether annotations may lie beside the images, with the same stems.

    Raises:
        DataError: when two folders mean the same split.
    """

    def pair(folder: Path) -> Part | None:
        below = _folders(folder)
        images = next((below[name] for name in IMAGE_FOLDERS if name in below), None)
        for name in folders:
            if images and name in below and _has(below[name], is_annotation) and _has(images, is_image):
                return Part(images, below[name])
        if beside and {Path(n).stem for n in files(folder) if is_image(n)} & {
            Path(n).stem for n in files(folder) if is_annotation(n)
        }:
            return Part(folder, folder)
        return None

    found = {name: part for name, folder in _splits(root).items() if (part := pair(folder))}
    if found:
        return found
    below = _folders(root)
    images = next((_splits(below[name]) for name in IMAGE_FOLDERS if name in below), {})
    for name in folders:
        annotations = _splits(below[name]) if name in below else {}
        found = {
            split: Part(images[split], annotations[split])
            for split in images
            if split in annotations and _has(annotations[split], is_annotation)
        }
        if found:
            return found
    whole = pair(root)
    return {"train": whole} if whole else {}


def by_stem(folder: Path, wanted: Callable[[str], bool], findings: list[Finding]) -> dict[str, str]:
    """The wanted files of a folder by their names without suffix, sorted; of two with one name the first is taken."""
    found: dict[str, str] = {}
    for name in files(folder):
        if not wanted(name):
            continue
        stem = Path(name).stem
        if stem in found:
            what = f"the same name as {Path(found[stem]).name}"
            findings.append(
                Finding(kind="two files of one name", source=str(folder / name), what=what, done="left out")
            )
        else:
            found[stem] = str(folder / name)
    return found


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def files(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted, hidden ones left out; empty when there is no such folder."""
    try:
        with os.scandir(folder) as listing:
            return sorted(entry.name for entry in listing if entry.is_file() and not entry.name.startswith("."))
    except OSError:
        return []


def _folders(folder: Path) -> dict[str, Path]:
    """The sub-folders by their names in lower case."""
    try:
        with os.scandir(folder) as listing:
            return {entry.name.lower(): Path(entry.path) for entry in listing if entry.is_dir()}
    except OSError:
        return {}


def _splits(folder: Path) -> dict[str, Path]:
    """The sub-folders that are splits, by split, train first."""
    found: dict[str, Path] = {}
    for name, path in sorted(_folders(folder).items()):
        if (split := SPLIT_NAMES.get(name)) is None:
            continue
        if split in found:
            raise DataError(f"{folder}: '{found[split].name}' and '{path.name}' both mean {split}; keep one of them.")
        found[split] = path
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _has(folder: Path, wanted: Callable[[str], bool]) -> bool:
    return any(wanted(name) for name in files(folder))
