"""What a data set looks like from inside: every image is decoded once, and what is wrong with the set is said.

Two images are duplicates when their decoded pixels are equal (SHA-256 of size and pixels), whatever the files' names,
formats and metadata.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from chiasm.data.folder import FileSplit
from chiasm.data.images import open_image, to_rgb
from chiasm.data.machine import cores
from chiasm.data.source import TRAIN, ImageData, Split
from chiasm.errors import ImageError

T = TypeVar("T")

# From here on a note is made: the largest class is this many times the smallest; a class has fewer training images.
_IMBALANCE, FEW = 10, 10


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Width and height in pixels of the smallest, the median and the largest image by area."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `chiasm data` found.

    Attributes:
        name: of the data set.
        counts: images per split and class, readable or not.
        sizes: of the readable images; None when there is none.
        kinds: how many images are of each kind, such as 'JPEG RGB' or 'PNG RGBA'.
        broken: per unreadable image its source and the reason.
        across: groups of equal images that lie in more than one split.
        within: groups of equal images of one class in one split.
        conflicts: groups of equal images with different labels.
        problems: what must be mended before training, and how; one line each.
        notes: what is worth knowing; one line each.
        sheet: the contact sheet's file, or None.
    """

    name: str
    counts: dict[str, dict[str, int]]
    sizes: Sizes | None
    kinds: dict[str, int]
    broken: dict[str, str]
    across: list[list[str]]
    within: list[list[str]]
    conflicts: list[list[str]]
    problems: list[str]
    notes: list[str]
    sheet: str | None = field(default=None)

    @property
    def ok(self) -> bool:
        """Whether training can start as it is."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class Seen:
    """One image, as far as it matters here."""

    split: str
    source: str
    label: int
    width: int = 0
    height: int = 0
    kind: str = ""
    digest: bytes = b""
    reason: str = ""


def inspect_data(data: ImageData, *, workers: int | None = None) -> DataReport:
    """Decode every image once and report; a progress bar with the time left stands on stderr meanwhile.

    Args:
        data: from `open_data(..., strict=False)`.
        workers: threads; default: one per core.
    """
    return _report(data, look_at_all(data, _look, workers))


def look_at_all(data: ImageData, look: Callable[[tuple[str, Split, int]], T], workers: int | None) -> list[T]:
    """What `look` says of (split's name, split, index) of every image, in threads, with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    jobs = [(name, split, i) for name, split in data.splits.items() for i in range(len(split))]
    count = max(cores() if workers is None else workers, 1)
    chunk = 16 * count
    console = Console(stderr=True)
    starts = range(0, len(jobs), chunk)
    seen: list[T] = []
    with ThreadPoolExecutor(count) as pool:
        for start in track(starts, "checking", console=console, transient=True, disable=not console.is_terminal):
            seen += pool.map(look, jobs[start : start + chunk])
    return seen


def _look(job: tuple[str, Split, int]) -> Seen:
    name, split, index = job
    source, label = split.sources[index], split.labels[index]
    try:
        kind, image = _read(split, index)
    except ImageError as error:
        return Seen(name, source, label, reason=error.reason)
    height, width = image.shape[-2:]
    return Seen(name, source, label, width, height, kind, digest_of(image))


def digest_of(image: Tensor) -> bytes:
    """What equal images have in common: SHA-256 of the size and the pixels of (3, H, W) uint8."""
    digest = hashlib.sha256(f"{image.shape[-1]}x{image.shape[-2]}".encode())
    digest.update(image.numpy().data)
    return digest.digest()


def _read(split: Split, index: int) -> tuple[str, Tensor]:
    if not isinstance(split, FileSplit):
        return "RGB", split.read(index)
    image, name = open_image(split.sources[index])
    with image:
        return f"{image.format} {image.mode}", to_rgb(image, name)


def _report(data: ImageData, seen: Sequence[Seen]) -> DataReport:
    sound = [image for image in seen if not image.reason]
    broken = {image.source: image.reason for image in seen if image.reason}
    counts = {
        name: {label: Counter(split.labels)[i] for i, label in enumerate(data.classes)}
        for name, split in data.splits.items()
    }
    across, within, conflicts = find_duplicates(sound)
    problems, notes = list(data.problems), list(data.notes)
    if broken:
        problems.append(f"{many(len(broken), 'file')} cannot be read: replace or remove {them(len(broken))}.")
    if across:
        problems.append(leak(across))
    if conflicts:
        problems.append(
            f"{many(len(conflicts), 'image')} with different labels in different places: keep the right one."
        )
    if within:
        notes.append(f"{many(len(within), 'image')} more than once in the same class: they weigh double")
    notes += _balance_notes(data, counts)
    return DataReport(
        name=data.name,
        counts=counts,
        sizes=sizes_of(sound),
        kinds=dict(Counter(image.kind for image in sound).most_common()),
        broken=broken,
        across=across,
        within=within,
        conflicts=conflicts,
        problems=problems,
        notes=notes,
    )


def leak(across: Sequence[Sequence[str]]) -> str:
    """What is to be mended where the same images are in several splits."""
    return (
        f"{many(len(across), 'image')} in more than one split: validation would measure memory; "
        "remove the copies from one side."
    )


def find_duplicates(sound: Sequence[Seen]) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Groups of equal images: in several splits; in one split and class; with different labels (also counted above)."""
    groups: dict[bytes, list[Seen]] = defaultdict(list)
    for image in sound:
        groups[image.digest].append(image)
    across, within, conflicts = [], [], []
    for group in groups.values():
        if len(group) < 2:
            continue
        sources = [image.source for image in group]
        several_splits = len({image.split for image in group}) > 1
        several_labels = len({image.label for image in group}) > 1
        if several_splits:
            across.append(sources)
        if several_labels:
            conflicts.append(sources)
        if not several_splits and not several_labels:
            within.append(sources)
    return across, within, conflicts


def sizes_of(sound: Sequence[Seen]) -> Sizes | None:
    """Of readable images; None when there is none."""
    if not sound:
        return None
    by_area = sorted((image.width * image.height, image.width, image.height) for image in sound)
    smallest, median, largest = (by_area[i][1:] for i in (0, len(by_area) // 2, -1))
    return Sizes(smallest=smallest, median=median, largest=largest)


def _balance_notes(data: ImageData, counts: dict[str, dict[str, int]]) -> list[str]:
    if TRAIN not in counts:
        return []
    train = {name: count for name, count in counts[TRAIN].items() if count}
    if not train:
        return []
    least, most = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
    notes = []
    if train[most] >= _IMBALANCE * train[least]:
        notes.append(
            f"'{most}' has {train[most]} training images and '{least}' {train[least]}; "
            "consider --class-weights balanced"
        )
    if few := [name for name, count in train.items() if count < FEW]:
        notes.append(f"fewer than {FEW} training images: {', '.join(few[:10])}{' ...' if len(few) > 10 else ''}")
    for split, of_class in counts.items():
        missing = [name for name in train if not of_class[name]]
        if missing and split != TRAIN:
            notes.append(f"{split} has no image of {', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''}")
    return notes


def many(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def them(count: int) -> str:
    """It or them."""
    return "it" if count == 1 else "them"
