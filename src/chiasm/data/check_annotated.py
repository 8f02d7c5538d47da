"""What a data set of boxes, masks or class maps looks like from inside, and what is wrong with it, file by file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from chiasm.data.annotated import IGNORE, AnnotatedData, Finding, MapSplit, ObjectSplit, SizeError
from chiasm.data.check import FEW, DataReport, Seen, digest_of, find_duplicates, leak, look_at_all, many, sizes_of, them
from chiasm.data.images import open_image
from chiasm.data.source import TRAIN, Split
from chiasm.errors import ImageError

# COCO's sizes of objects: by area in square pixels, small below the first, large from the second on.
SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}


@dataclass(frozen=True, kw_only=True)
class AnnotatedReport(DataReport):
    """What `chiasm data` found; `counts` are images in which a class occurs.

    Attributes:
        task: 'detect', 'instances' or 'segment'.
        images: per split.
        amounts: per split and class, objects (without crowds), or pixels of class maps.
        boxes: per split, objects by COCO's small, medium and large; empty for class maps.
        crowds: per split, objects that stand for many.
        empty: per split, images without objects, or maps without a class.
        ignored: per split, pixels of class maps without a class.
        findings: what is wrong with annotations, and what was done about each.
    """

    task: str
    images: dict[str, int]
    amounts: dict[str, dict[str, int]]
    boxes: dict[str, dict[str, int]]
    crowds: dict[str, int]
    empty: dict[str, int]
    ignored: dict[str, int]
    findings: list[Finding]


@dataclass(frozen=True)
class _Annotation:
    """One image's annotation as it is counted."""

    amounts: Counter[int] = field(default_factory=Counter)
    crowds: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    ignored: int = 0
    finding: Finding | None = None


def inspect_annotated(data: AnnotatedData, *, workers: int | None = None) -> AnnotatedReport:
    """Decode every image, and every class map, once and report; a progress bar stands on stderr meanwhile.

    Args:
        data: from `open_data(..., strict=False)`.
        workers: threads; default: one per core.
    """
    looked = look_at_all(data, _look, workers)
    seen, annotations = [image for image, _ in looked], [annotation for _, annotation in looked]
    sound = [image for image in seen if not image.reason]
    broken = {image.source: image.reason for image, a in looked if image.reason and a.finding is None}
    findings = [*data.findings, *(a.finding for a in annotations if a.finding)]
    amounts, counts, boxes, crowds, empty, ignored = {}, {}, {}, {}, {}, {}
    for name in data.splits:
        mine = [annotation for image, annotation in looked if image.split == name]
        total = sum((a.amounts for a in mine), Counter())
        present = Counter(label for a in mine for label, amount in a.amounts.items() if amount)
        amounts[name] = {label: total[i] for i, label in enumerate(data.classes)}
        counts[name] = {label: present[i] for i, label in enumerate(data.classes)}
        sizes = sum((a.sizes for a in mine), Counter())
        boxes[name] = {} if data.task == "segment" else {size: sizes[size] for size in SIZES}
        crowds[name] = sum(a.crowds for a in mine)
        whole = [a for image, a in looked if image.split == name and not image.reason]
        empty[name] = sum(not a.amounts.total() and not a.crowds for a in whole)
        ignored[name] = sum(a.ignored for a in mine)
    across, within, conflicts = find_duplicates(sound)
    problems, notes = list(data.problems), list(data.notes)
    if broken:
        problems.append(f"{many(len(broken), 'file')} cannot be read: replace or remove {them(len(broken))}.")
    for (kind, done), count in Counter((finding.kind, finding.done) for finding in findings).items():
        if done == "clipped":
            notes.append(f"{kind} ({count}): {done}")
        else:
            problems.append(f"{kind} ({count}): {done}; mend the annotations to keep {them(count)}.")
    if across:
        problems.append(leak(across))
    if conflicts:
        problems.append(f"{many(len(conflicts), 'image')} with different annotations: keep the right one.")
    if within:
        notes.append(f"{many(len(within), 'image')} more than once with the same annotation: they weigh double")
    return AnnotatedReport(
        name=data.name,
        counts=counts,
        sizes=sizes_of(sound),
        kinds=dict(Counter(image.kind for image in sound).most_common()),
        broken=broken,
        across=across,
        within=within,
        conflicts=conflicts,
        problems=problems,
        notes=notes + _class_notes(counts),
        task=data.task,
        images={name: len(split) for name, split in data.splits.items()},
        amounts=amounts,
        boxes=boxes,
        crowds=crowds,
        empty=empty,
        ignored=ignored,
        findings=findings,
    )


def _look(job: tuple[str, Split, int]) -> tuple[Seen, _Annotation]:
    name, split, index = job
    source = split.sources[index]
    strange: dict[str, int] = {}
    classes: np.ndarray | None = None
    annotation = _Annotation() if isinstance(split, MapSplit) else _count(cast(ObjectSplit, split), index)
    try:
        if isinstance(split, MapSplit):
            classes, strange = split.reader.read(split.masks[index])
            image = split.check(index, split.read(index), classes)
        else:
            image = split.read(index)
        kind = _kind(source)
    except SizeError as error:
        finding = Finding(
            kind="image and annotation differ in size", source=error.path, what=error.reason, done="left out"
        )
        return Seen(name, source, 0, reason=error.reason), _Annotation(finding=finding)
    except ImageError as error:
        return Seen(name, error.path, 0, reason=error.reason), annotation
    if classes is not None:
        values = np.bincount(classes.ravel(), minlength=256)
        amounts = Counter({int(label): int(values[label]) for label in np.flatnonzero(values) if label != IGNORE})
        annotation = _Annotation(
            amounts, ignored=int(values[IGNORE]), finding=_strange(cast(MapSplit, split), index, strange)
        )
        said = classes.tobytes()
    else:
        objects = cast(ObjectSplit, split).objects(index)
        said = objects.boxes.numpy().tobytes() + objects.labels.numpy().tobytes()
    height, width = image.shape[-2:]
    told = int.from_bytes(hashlib.sha256(said).digest()[:8], "big")
    return Seen(name, source, told, width, height, kind, digest_of(image)), annotation


def _kind(source: str) -> str:
    if not os.path.isfile(source):
        return "RGB"  # generated
    image, _ = open_image(source)
    with image:
        return f"{image.format} {image.mode}"


def _count(split: ObjectSplit, index: int) -> _Annotation:
    objects = split.objects(index)
    alone = ~objects.crowd
    sizes = Counter(next(s for s, top in SIZES.items() if area < top) for area in objects.areas[alone].tolist())
    return _Annotation(Counter(objects.labels[alone].tolist()), int(objects.crowd.sum()), sizes)


def _strange(split: MapSplit, index: int, strange: dict[str, int]) -> Finding | None:
    if not strange:
        return None
    told = ", ".join(f"{value} in {many(count, 'pixel')}" for value, count in list(strange.items())[:5])
    more = f" and {len(strange) - 5} more values" if len(strange) > 5 else ""
    return Finding(kind="value that is no class", source=split.masks[index], what=told + more, done="ignored")


def _class_notes(counts: dict[str, dict[str, int]]) -> list[str]:
    if TRAIN not in counts:
        return []
    notes = []
    train = {name: count for name, count in counts[TRAIN].items() if count}
    if few := [name for name, count in train.items() if count < FEW]:
        notes.append(f"in fewer than {FEW} training images: {_listed(few)}")
    if never := [name for name in counts[TRAIN] if not any(of_class[name] for of_class in counts.values())]:
        notes.append(f"in no image: {_listed(never)}")
    for split, of_class in counts.items():
        if only := [name for name, count in of_class.items() if count and name not in train]:
            notes.append(f"{split} has classes that train has not, which cannot be learnt: {_listed(only)}")
        if missing := [name for name in train if not of_class[name]]:
            notes.append(f"{split} has no image of {_listed(missing)}")
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
