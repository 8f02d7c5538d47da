"""YOLO txt: boxes, or polygons, one file per image; an image without a file, or with an empty one, has no objects.

    root/data.yaml       train, val, test: folders of images or lists of them; names: of the classes
    root/images/train, root/labels/train and the other layouts of layout.py, with classes.txt or without names

A line is `class x y width height`, the box's middle and size, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon; all but the
class are shares of the image's width and height.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from chiasm.data.annotated import AnnotatedData, Finding, Gatherer, Objects, ObjectSplit
from chiasm.data.images import image_size
from chiasm.data.layout import by_stem, files, find_parts, is_image
from chiasm.data.names import FILES, read_names
from chiasm.data.source import Split, as_name
from chiasm.errors import DataError, ImageError

FOLDERS = ("labels", "annotations", "txt")
_EXPECTED = "expected train, val and names"

# images of a split: (path of the image, path of its label file, which need not exist)
_Pairs = list[tuple[str, Path]]


def find_yolo(root: Path, findings: list[Finding]) -> tuple[dict[str, _Pairs], list[str]] | None:
    """Images with their label files by split, and the class names; None when a folder is not YOLO's.

    Raises:
        DataError: for a data.yaml that cannot be understood.
    """
    for name in files(root):
        if name.lower().endswith((".yaml", ".yml")) and (content := _yolo_yaml(root / name)) is not None:
            return read_yaml(root / name, content, findings)
    parts = find_parts(root, FOLDERS, _is_label, beside=True)
    if not parts:
        return None
    pairs = {}
    for split, part in parts.items():
        images = by_stem(part.images, is_image, findings)
        pairs[split] = [(path, part.annotations / f"{stem}.txt") for stem, path in images.items()]
        _orphans(part.annotations, set(images), findings)
    return pairs, read_names(root, *(part.annotations for part in parts.values()))


def read_yaml(
    path: Path, content: dict[str, Any] | None, findings: list[Finding]
) -> tuple[dict[str, _Pairs], list[str]]:
    """What a data.yaml names; `content` is what `yaml_content` gave for it, None to read it here.

    Raises:
        DataError: not YAML, no class names, or no images where it says.
    """
    content = yaml_content(path) if content is None else content
    names = content.get("names")
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int, float)) for name in names):
        raise DataError(f"{path}: no class names; {_EXPECTED}, names being a list, or numbers from 0 with names.")
    base = path.parent
    if isinstance(content.get("path"), str) and (base / content["path"]).is_dir():
        base = base / content["path"]
    pairs: dict[str, _Pairs] = {}
    for split in ("train", "val", "test"):
        told = content.get(split, content.get("valid") if split == "val" else None)
        places = told if isinstance(told, list) else [told] if told else []
        if places:
            pairs[split] = [pair for place in places for pair in _images_at(path, base, str(place), findings)]
    if not any(pairs.values()):
        raise DataError(f"{path}: no images where it says; {_EXPECTED}, train and val being folders of images.")
    return pairs, [str(name) for name in names]


def open_yolo(
    pairs: dict[str, _Pairs], names: list[str], root: Path, task: str | None, findings: list[Finding]
) -> AnnotatedData:
    """YOLO's label files as data; broken lines are findings.

    Raises:
        DataError: when masks are asked for and there are none.
    """
    lines = {
        split: [(image, label, _lines(label, findings)) for image, label in found] for split, found in pairs.items()
    }
    rows = [row for found in lines.values() for _, _, read in found for _, row in read]
    polygons = any(len(row) >= 7 for row in rows)
    if task == "instances" and not polygons:
        raise DataError(f"{root}: boxes without masks; they are for the task 'detect'.")
    task = task or ("instances" if polygons else "detect")
    count = max((int(row[0]) for row in rows), default=-1) + 1
    classes = names or [f"class {i}" for i in range(min(count, 1000))]
    notes = () if names else (f"{root}: no class names; expected data.yaml or classes.txt",)
    splits: dict[str, Split] = {}
    for split, found in lines.items():
        sources: list[str] = []
        objects: list[Objects] = []
        for image, label, read in found:
            try:
                width, height = image_size(image)
            except ImageError as error:
                findings.append(Finding(kind="unreadable image", source=image, what=error.reason, done="left out"))
                continue
            gatherer = Gatherer(str(label), height, width, masks=task == "instances", findings=findings)
            for number, row in read:
                if row[0] < len(classes):
                    _add(gatherer, f"line {number}", row, width, height)
                else:
                    gatherer.find(
                        "unknown category", f"line {number}: class {int(row[0])} of {len(classes)}", "dropped"
                    )
            sources.append(image)
            objects.append(gatherer.objects(len(sources)))
        splits[split] = ObjectSplit(sources, objects)
    return AnnotatedData(
        name=as_name(root.resolve()),
        classes=tuple(classes),
        splits=splits,
        notes=notes,
        task=task,
        findings=tuple(findings),
    )


def has_polygons(pairs: dict[str, _Pairs]) -> bool:
    """Whether a label file has a polygon; they are read up to the first."""
    labels = (label for found in pairs.values() for _, label in found)
    return any(len(row) >= 7 for label in labels for _, row in _lines(label, []))


def _add(gatherer: Gatherer, where: str, row: list[float], width: int, height: int) -> None:
    if len(row) == 5:
        x, y, w, h = row[1] * width, row[2] * height, row[3] * width, row[4] * height
        gatherer.add(where, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], int(row[0]))
    else:
        xs, ys = [x * width for x in row[1::2]], [y * height for y in row[2::2]]
        polygon = [value for corner in zip(xs, ys, strict=True) for value in corner]
        gatherer.add(where, [min(xs), min(ys), max(xs), max(ys)], int(row[0]), outline=[polygon])


def _lines(path: Path, findings: list[Finding]) -> list[tuple[int, list[float]]]:
    """(number of the line, its values) of the lines that can be understood."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        findings.append(Finding(kind="broken label file", source=str(path), what="not a text", done="ignored"))
        return []
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = []
        if (len(row) == 5 or (len(row) >= 7 and len(row) % 2)) and row[0] >= 0 and row[0] == row[0] // 1:
            rows.append((number, row))
        else:
            what = f"line {number}: '{line.strip()[:40]}', expected class x y width height"
            findings.append(Finding(kind="broken line", source=str(path), what=what, done="dropped"))
    return rows


def _images_at(path: Path, base: Path, place: str, findings: list[Finding]) -> _Pairs:
    """The images of a folder, or of a list of paths, with their label files."""
    # Roboflow writes ../train/images for train/images.
    candidates = [base / place, base / place.removeprefix("../"), path.parent / place.removeprefix("../")]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        findings.append(Finding(kind="missing folder", source=str(path), what=f"no {place}", done="left out"))
        return []
    if found.is_dir():
        images = by_stem(found, is_image, findings)
        if not images and (found / "images").is_dir():
            return _images_at(path, found, "images", findings)
        pairs = [(image, _label_of(image)) for image in images.values()]
        if pairs:
            _orphans(pairs[0][1].parent, set(images), findings)
        return pairs
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = []
    for line in filter(None, map(str.strip, lines)):
        image = next((p for p in (found.parent / line, base / line) if p.is_file()), None)
        if image is None:
            findings.append(Finding(kind="missing image", source=str(found), what=f"no {line[:80]}", done="left out"))
        else:
            pairs.append((str(image), _label_of(str(image))))
    return pairs


def _label_of(image: str) -> Path:
    """YOLO's own rule: the last folder called images becomes labels, and the suffix txt."""
    parts = list(Path(image).with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _orphans(folder: Path, images: set[str], findings: list[Finding]) -> None:
    kind = "annotation for an image that is not there"
    for name in files(folder):
        if _is_label(name) and Path(name).stem not in images:
            what = f"no image {Path(name).stem}"
            findings.append(Finding(kind=kind, source=str(folder / name), what=what, done="left out"))


def yaml_content(path: Path) -> dict[str, Any]:
    """A YAML file's keys.

    Raises:
        DataError: when it is not such a file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())[:100]}); {_EXPECTED}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: YAML without keys; {_EXPECTED}.")
    return content


def _yolo_yaml(path: Path) -> dict[str, Any] | None:
    """The content of a data.yaml; None for any other YAML file that happens to lie there."""
    if path.name.lower() in ("data.yaml", "data.yml", "dataset.yaml"):
        return yaml_content(path)
    try:
        content = yaml_content(path)
    except DataError:
        return None
    return content if "names" in content and "train" in content else None


def _is_label(name: str) -> bool:
    return name.lower().endswith(".txt") and name.lower() not in (*FILES, "train.txt", "val.txt", "test.txt")
