"""COCO JSON: boxes, and masks as polygons or run lengths.

    root/annotations/instances_train.json, instances_val.json   images in root/images/train, root/train, root/images
    root/train/_annotations.coco.json                           images beside it
    some.json                                                   images beside it or in one of the folders above

A file's split is told by its name, else by its folder's, else it is train. Category ids may have gaps and may differ
between files; classes go by name, in the order of the ids of the first file.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chiasm.data.annotated import AnnotatedData, Finding, Gatherer, Objects, ObjectSplit, is_number
from chiasm.data.images import image_size
from chiasm.data.layout import files
from chiasm.data.source import SPLIT_NAMES, Split, as_name
from chiasm.errors import DataError, ImageError

_EXPECTED = "expected COCO's lists images, annotations and categories"
_MASK = rb'"segmentation"\s*:\s*(?:\[\s*[^\]\s]|\{\s*")'


def find_coco(root: Path) -> dict[str, Path]:
    """The COCO files of a folder by split; empty when there are none.

    Raises:
        DataError: when two of them mean the same split.
    """
    below = [root / "annotations", root, *(root / name for name in sorted(SPLIT_NAMES))]
    found = [folder / name for folder in below for name in files(folder) if name.lower().endswith(".json")]
    found = [path for path in found if path.parent.name == "annotations" or _is_coco(path)]
    # COCO publishes captions, keypoints and image lists beside the instances.
    found = [path for path in found if path.name.startswith("instances")] or found
    splits: dict[str, Path] = {}
    for path in found:
        split = split_of(path)
        if split in splits:
            raise DataError(f"{path}: means {split}, and so does {splits[split].name}; give one of the files itself.")
        splits[split] = path
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def open_coco(parts: dict[str, Path], root: Path, task: str | None) -> AnnotatedData:
    """COCO files as data.

    Args:
        parts: the file of each split.
        root: the folder of the data set, for its name and its images.
        task: 'detect', 'instances', or None for what the files are fit for.

    Raises:
        DataError: a file that is not JSON or not COCO's, or masks asked for where there are none.
    """
    contents = {split: _load(path) for split, path in parts.items()}
    if task is None:
        task = "instances" if any(_has_masks(content) for content in contents.values()) else "detect"
    elif task == "instances" and not any(_has_masks(content) for content in contents.values()):
        raise DataError(f"{next(iter(parts.values()))}: boxes without masks; they are for the task 'detect'.")
    findings: list[Finding] = []
    classes: dict[str, int] = {}
    splits: dict[str, Split] = {}
    notes: list[str] = []
    for split, content in contents.items():
        path = parts[split]
        label_of = {}
        for key, name in _categories(path, content):
            label_of[key] = classes.setdefault(name, len(classes))
        if len(set(label_of.values())) < len(label_of):
            notes.append(f"{path}: categories of one name are taken for one class")
        splits[split] = _split(path, root, content, label_of, masks=task == "instances", findings=findings)
    return AnnotatedData(
        name=as_name(root.resolve()),
        classes=tuple(classes),
        splits=splits,
        notes=tuple(notes),
        task=task,
        findings=tuple(findings),
    )


def _split(
    path: Path, root: Path, content: dict[str, Any], label_of: dict[Any, int], *, masks: bool, findings: list[Finding]
) -> ObjectSplit:
    def find(kind: str, what: str, done: str) -> None:
        findings.append(Finding(kind=kind, source=str(path), what=what, done=done))

    folders = _image_folders(path, root)
    images: dict[Any, tuple[str, Gatherer]] = {}
    left_out: set[Any] = set()
    for number, entry in enumerate(content["images"]):
        key, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(key, (int, str)) or not isinstance(name, str) or not name:
            find("image without id or file name", f"images[{number}]: {str(entry)[:60]}", "left out")
            continue
        if key in images or key in left_out:
            find("two images of one id", f"image {key}, {name}", "left out")
            continue
        if (source := _locate(name, folders)) is None:
            find("missing image", f"image {key}: no file {name} in {folders[0]}", "left out")
            left_out.add(key)
            continue
        width, height = entry.get("width"), entry.get("height")
        if not (type(width) is type(height) is int and width > 0 and height > 0):
            try:
                width, height = image_size(source)
            except ImageError as error:
                find("unreadable image", str(error), "left out")
                left_out.add(key)
                continue
        images[key] = (source, Gatherer(str(path), height, width, masks=masks, findings=findings))
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict):
            find("broken annotation", f"annotations[{number}]: {str(entry)[:60]}", "dropped")
            continue
        key, category = entry.get("image_id"), entry.get("category_id")
        where = f"annotation {entry.get('id', f'[{number}]')}"
        if not isinstance(key, (int, str)) or key not in images:
            if key not in left_out:
                find("annotation for an image that is not there", f"{where}: image_id {str(key)[:40]}", "dropped")
            continue
        if not isinstance(category, (int, str)) or category not in label_of:
            find("unknown category", f"{where}: category_id {str(category)[:40]}", "dropped")
            continue
        box = entry.get("bbox")
        if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)):
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        images[key][1].add(
            f"{where} of {Path(images[key][0]).name}",
            box if isinstance(box, list) else [box],
            label_of[category],
            crowd=bool(entry.get("iscrowd")),
            area=entry.get("area"),
            outline=entry.get("segmentation"),
        )
    objects: list[Objects] = [gatherer.objects(key) for key, (_, gatherer) in images.items()]
    categories = {label: key for key, label in reversed(label_of.items())}  # of several ids of one class the first
    return ObjectSplit([source for source, _ in images.values()], objects, categories)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: broken JSON in line {error.lineno}, column {error.colno} ({error.msg}); export it again."
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON in UTF-8; {_EXPECTED}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}; {_EXPECTED}.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(f"{path}: no list '{key}'; {_EXPECTED}.")
    return content


def _categories(path: Path, content: dict[str, Any]) -> Iterator[tuple[int | str, str]]:
    """(id, name), in the order of the ids."""
    seen: dict[int | str, str] = {}
    for number, entry in enumerate(content["categories"]):
        key, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(key, (int, str)) or not isinstance(name, (int, str)) or not str(name).strip():
            raise DataError(f"{path}: categories[{number}] is {str(entry)[:60]}; expected an id and a name.")
        if key in seen:
            raise DataError(f"{path}: the categories '{seen[key]}' and '{name}' share the id {key}; give each its own.")
        seen[key] = str(name).strip()
    yield from sorted(seen.items(), key=lambda item: (isinstance(item[0], str), item[0]))


def _has_masks(content: dict[str, Any]) -> bool:
    return any(isinstance(entry, dict) and entry.get("segmentation") for entry in content["annotations"])


def _is_coco(path: Path) -> bool:
    """Whether a JSON file names COCO's lists; it is not parsed."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b'"images"') >= 0 and content.find(b'"annotations"') >= 0
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return False


def file_has_masks(path: Path) -> bool:
    """Whether a COCO file has an annotation with a mask; it is not parsed, and false where it cannot be read."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return re.search(_MASK, content) is not None
    except (OSError, ValueError):
        return False


def split_of(path: Path) -> str:
    """The split that a file's name or folder tells, else train."""
    words = [*re.findall("[a-z]+", path.stem.lower()), path.parent.name.lower()]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def _image_folders(path: Path, root: Path) -> list[Path]:
    """Where the images of a file may lie, likeliest first."""
    words = re.findall(r"[a-z]+\d*", path.stem.lower())
    names = [word for word in words if word.rstrip("0123456789") in SPLIT_NAMES]
    names += [name for name, split in SPLIT_NAMES.items() if split == split_of(path)]
    inner = [f"images/{name}" for name in names] + names + [f"{name}/images" for name in names] + ["images", "."]
    found = [base / name for base in dict.fromkeys((path.parent, root, path.parent.parent)) for name in inner]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _locate(name: str, folders: list[Path]) -> str | None:
    """The image's path; the folder it lies in moves to the front, so that the next is found at once."""
    for number, folder in enumerate(folders):
        if (path := folder / name).is_file():
            folders.insert(0, folders.pop(number))
            return str(path)
    return None
