"""Pascal VOC XML: boxes, one file per image.

    root/JPEGImages, root/Annotations, root/ImageSets/Main/{train,val,test}.txt
    root/train/*.jpg with *.xml beside them, and the other layouts of layout.py

Classes are the names that occur, in alphabetical order, or those of a classes.txt. VOC counts pixels from 1 and
includes the last, so a box is (xmin - 1, ymin - 1, xmax, ymax); objects marked difficult are taken for crowds. A file
that declares a document type or entities is refused: neither has a place here, and both can be made to fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.data.annotated import AnnotatedData, Finding, Gatherer, Objects, ObjectSplit
from chiasm.data.images import image_size
from chiasm.data.layout import Part, by_stem, find_parts, is_image
from chiasm.data.names import read_names
from chiasm.data.source import Split, as_name
from chiasm.errors import DataError, ImageError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

FOLDERS = ("annotations", "annotation", "labels", "xml", "xmls")


@dataclass(frozen=True)
class _File:
    """One XML file, read: its image, the size it states, and (name, box, difficult) of each object."""

    path: str
    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, list[float | str], bool]]


def find_voc(root: Path) -> dict[str, Part]:
    """The folders of VOC data by split; empty when there are none."""
    return find_parts(root, FOLDERS, _is_xml, beside=True)


def open_voc(parts: dict[str, Part], root: Path) -> AnnotatedData:
    """VOC files as data; broken ones are findings.

    Raises:
        DataError: when no object has a class.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    read: dict[str, list[_File]] = {}
    for split, part in parts.items():
        images = by_stem(part.images, is_image, findings)
        found = by_stem(part.annotations, _is_xml, findings)
        read[split] = [file for path in found.values() if (file := _read(path, part.images, images, findings))]
        bare = len(set(images) - {Path(file.image).stem for file in read[split]} - set(found))
        if bare:
            notes.append(f"{part.images}: {bare} images without an XML file are left out")
    if list(parts) == ["train"] and (listed := _image_sets(root)):
        files = {Path(file.path).stem: file for file in read["train"]}
        read = {split: [files[stem] for stem in stems if stem in files] for split, stems in listed.items()}
    names = read_names(root)
    classes = names or sorted({name for files in read.values() for file in files for name, _, _ in file.objects})
    if not classes:
        raise DataError(f"{root}: no XML file with an object in it; expected VOC's <object> with <name> and <bndbox>.")
    label_of = {name: label for label, name in enumerate(classes)}
    splits: dict[str, Split] = {split: _split(files, label_of, findings) for split, files in read.items()}
    return AnnotatedData(
        name=as_name(root.resolve()),
        classes=tuple(classes),
        splits=splits,
        notes=tuple(notes),
        task="detect",
        findings=tuple(findings),
    )


def _split(files: list[_File], label_of: dict[str, int], findings: list[Finding]) -> ObjectSplit:
    sources: list[str] = []
    objects: list[Objects] = []
    for file in files:
        try:
            width, height = file.size or image_size(file.image)
        except ImageError as error:
            findings.append(Finding(kind="unreadable image", source=file.path, what=str(error), done="left out"))
            continue
        gatherer = Gatherer(file.path, height, width, masks=False, findings=findings)
        for number, (name, box, difficult) in enumerate(file.objects, start=1):
            if name in label_of:
                gatherer.add(f"object {number} ({name})", box, label_of[name], crowd=difficult)
            else:
                gatherer.find("unknown category", f"object {number}: '{name[:40]}'", "dropped")
        sources.append(file.image)
        objects.append(gatherer.objects(len(sources)))
    return ObjectSplit(sources, objects)


def _read(path: str, folder: Path, images: dict[str, str], findings: list[Finding]) -> _File | None:
    import defusedxml.ElementTree as xml
    from defusedxml.common import DefusedXmlException

    def left_out(kind: str, what: str) -> None:
        findings.append(Finding(kind=kind, source=path, what=what, done="left out"))

    try:
        tree = xml.fromstring(Path(path).read_bytes(), forbid_dtd=True)
    except (OSError, xml.ParseError, ValueError) as error:
        if isinstance(error, DefusedXmlException):
            left_out("broken XML", "it declares a document type or entities, which are not read")
        else:
            left_out("broken XML", " ".join(str(error).split())[:100])
        return None
    if tree.tag != "annotation":
        left_out("broken XML", f"<{tree.tag[:40]}>, expected VOC's <annotation>")
        return None
    named = Path(_text(tree, "filename")).name
    image = images.get(Path(path).stem) or (str(folder / named) if named and (folder / named).is_file() else None)
    if image is None:
        left_out("annotation for an image that is not there", f"no image {named or Path(path).stem} in {folder}")
        return None
    width, height = _number(_text(tree, "size/width")), _number(_text(tree, "size/height"))
    size = None
    if isinstance(width, float) and isinstance(height, float) and width >= 1 and height >= 1:
        size = (int(width), int(height))
    return _File(path, image, size, list(_objects(tree)))


def _objects(tree: Element) -> Iterator[tuple[str, list[float | str], bool]]:
    for element in tree.iter("object"):
        corners = [_number(_text(element, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        shifts = (1, 1, 0, 0)
        box = [c - shift if isinstance(c, float) else c for c, shift in zip(corners, shifts, strict=True)]
        yield _text(element, "name"), box, _text(element, "difficult") == "1"


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text[:20]


def _image_sets(root: Path) -> dict[str, list[str]]:
    """The names of the images by split, from VOC's lists."""
    found = {}
    for split in ("train", "val", "test"):
        for folder in ("Main", "Segmentation", "."):
            path = root / "ImageSets" / folder / f"{split}.txt"
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                found[split] = [line.split()[0] for line in lines if line.strip()]
                break
    return found


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")
