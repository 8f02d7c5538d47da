"""Image and mask folders: a class for every pixel.

    root/train/images, root/train/masks and the other layouts of layout.py; root/classes.txt (names.py)
    root/JPEGImages, root/SegmentationClass, root/ImageSets/Segmentation/{train,val}.txt

A mask has its image's name, with any suffix and perhaps _mask, _label, _gt or _L after it. What its pixels mean:

    grey or palette          the number of the class; 255 is ignored
    RGB                      the class with that colour in the file of names
    only 0 and 255           background and object, where two classes are named or none

The ignored classes are those called unlabelled, void or ignore, or `ignore_index`; the others are numbered anew from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from chiasm.data.annotated import IGNORE, AnnotatedData, Finding, MapSplit
from chiasm.data.images import open_image
from chiasm.data.layout import Part, by_stem, find_parts, is_image
from chiasm.data.names import Colour, read_colours
from chiasm.data.source import Split, as_name
from chiasm.errors import DataError, ImageError

FOLDERS = (
    *("masks", "mask", "labels", "label", "semantic", "segmentation", "segmentationclass"),
    *("annotations", "annotation", "gt", "ground_truth", "labelmaps"),
)
_IGNORED = ("unlabelled", "unlabeled", "void", "ignore")
_NONE = 254  # of a value that means no class, before it becomes IGNORE


class MaskReader:
    """What the values of a data set's masks mean.

    Args:
        classes: of each value from 0 its class, `IGNORE`, or nothing beyond the list.
        colours: the values of colours, for RGB masks.
        binary: whether 255 means 1.
    """

    def __init__(self, classes: Sequence[int], colours: Sequence[Colour | None] = (), *, binary: bool = False) -> None:
        self._table = np.full(256, _NONE, dtype=np.uint8)
        self._table[: len(classes)] = classes
        self._table[255] = classes[1] if binary else IGNORE
        known = sorted((_code(colour), value) for value, colour in enumerate(colours) if colour is not None)
        self._codes = np.array([code for code, _ in known], dtype=np.int64)
        self._values = np.array([value for _, value in known], dtype=np.uint8)

    def read(self, path: str) -> tuple[np.ndarray, dict[str, int]]:
        """The mask as classes (H, W) uint8 with `IGNORE`, and the pixels of each value that means no class.

        Raises:
            ImageError: when the file cannot be read, or is coloured and no colours are known.
        """
        pixels = _pixels(path, coloured=len(self._codes) > 0)
        if pixels.ndim == 3:
            codes = pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
            classes = np.where(self._codes[places] == codes, self._table[self._values[places]], _NONE)
            strange = {f"#{code:06x}": count for code, count in _counts(codes[classes == _NONE])}
        else:
            classes = np.where(pixels <= 255, self._table[pixels.clip(max=255)], _NONE)
            strange = {str(value): count for value, count in _counts(pixels[classes == _NONE])}
        classes = classes.astype(np.uint8)
        classes[classes == _NONE] = IGNORE
        return classes, strange


def find_maps(root: Path) -> dict[str, Part]:
    """The folders of images and masks by split; empty when there are none."""
    return find_parts(root, FOLDERS, is_image, beside=False)


def open_maps(parts: dict[str, Part], root: Path, ignore_index: int | None) -> AnnotatedData:
    """Image and mask folders as data. Without a file of names all masks are read once, to see which values occur.

    Raises:
        DataError: more than 254 classes, one class only, or an `ignore_index` that is none of the values.
    """
    findings: list[Finding] = []
    pairs = {split: _pairs(part, findings) for split, part in parts.items()}
    notes: list[str] = []
    if list(pairs) == ["train"] and (listed := _segmentation_sets(root)):
        pairs = {split: {s: pairs["train"][s] for s in stems if s in pairs["train"]} for split, stems in listed.items()}
    named = read_colours(root, *(part.annotations for part in parts.values()))
    names, colours = [name for name, _ in named], [colour for _, colour in named]
    binary = False
    if len(names) in (0, 2):
        values = _values(mask for found in pairs.values() for _, mask in found.values())
        binary = 255 in values and values <= {0, 255} and ignore_index != 255
        if binary:
            names = names or ["background", "object"]
            notes.append(f"{root}: masks of 0 and 255 only; 255 is taken for '{names[1]}'")
        elif not names:
            names = [f"class {i}" for i in range(max(values - {255}, default=-1) + 1)]
            notes.append(f"{root}: no class names; expected classes.txt with one a line")
    if ignore_index is not None and not 0 <= ignore_index <= 255:
        raise DataError(f"ignore_index is {ignore_index}; expected a value of the masks, 0 to 255.")
    ignored = (
        [i for i, name in enumerate(names) if name.lower() in _IGNORED] if ignore_index is None else [ignore_index]
    )
    kept = [i for i in range(len(names)) if i not in ignored]
    notes += [f"'{names[i]}' ({i}) is ignored: no class of its own" for i in ignored if i < len(names)]
    if not kept or len(kept) > 254:
        raise DataError(f"{root}: {len(kept)} classes in its masks; expected 1 to 254.")
    classes = [kept.index(i) if i in kept else IGNORE for i in range(len(names))]
    reader = MaskReader(classes, colours, binary=binary)
    splits: dict[str, Split] = {
        split: MapSplit([image for image, _ in found.values()], [mask for _, mask in found.values()], reader)
        for split, found in pairs.items()
    }
    return AnnotatedData(
        name=as_name(root.resolve()),
        classes=tuple(names[i] for i in kept),
        splits=splits,
        notes=tuple(notes),
        task="segment",
        findings=tuple(findings),
    )


def _pairs(part: Part, findings: list[Finding]) -> dict[str, tuple[str, str]]:
    """(image, mask) by the image's name without suffix."""
    images = by_stem(part.images, is_image, findings)
    masks = by_stem(part.annotations, is_image, findings)
    plain = {re.sub(r"_(masks?|labels?|gt|seg|L)$", "", stem): path for stem, path in masks.items()} | masks
    for stem, path in images.items():
        if stem not in plain:
            what = f"no mask {stem} in {part.annotations}"
            findings.append(Finding(kind="image without a mask", source=path, what=what, done="left out"))
    found = {stem: (path, plain[stem]) for stem, path in images.items() if stem in plain}
    used = {mask for _, mask in found.values()}
    kind = "annotation for an image that is not there"
    for path in masks.values():
        if path not in used:
            what = f"no image of that name in {part.images}"
            findings.append(Finding(kind=kind, source=path, what=what, done="left out"))
    return found


def _segmentation_sets(root: Path) -> dict[str, list[str]]:
    found = {}
    for split in ("train", "val", "test"):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if path.is_file():
            found[split] = path.read_text(encoding="utf-8", errors="replace").split()
    return found


def _pixels(path: str, *, coloured: bool) -> np.ndarray:
    """(H, W) values, or (H, W, 3) colours where `coloured` and the file has them."""
    image, name = open_image(path)
    with image:
        try:
            if image.mode in ("P", "1", "L") and not (coloured and image.mode == "P"):
                return np.array(image, dtype=np.int64)
            if image.mode.startswith("I"):
                return np.array(image).astype(np.int64).clip(min=0)
            pixels = np.array(image.convert("RGB"))
        except Exception as error:  # a damaged file can fail anywhere inside a decoder
            raise ImageError(name, f"broken or cut off {image.format} mask; export it again.") from error
    if coloured:
        return pixels
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0].astype(np.int64)
    raise ImageError(name, "a coloured mask; expected grey values, or lines 'name red green blue' in classes.txt.")


def _values(masks: Iterable[str]) -> set[int]:
    """All values that occur; unreadable files are passed over, `chiasm data` names them."""
    found: set[int] = set()
    for path in masks:
        try:
            found.update(np.unique(_pixels(path, coloured=False)).tolist())
        except ImageError:
            continue
    return found


def _counts(values: np.ndarray) -> list[tuple[int, int]]:
    found, counts = np.unique(values, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def _code(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
