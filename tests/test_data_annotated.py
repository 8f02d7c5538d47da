"""Boxes, masks and class maps as data: every format gives the same description, and every defect is named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.config import DataConfig
from chiasm.data import open_data
from chiasm.data.annotated import IGNORE, AnnotatedData
from chiasm.data.formats import task_of
from chiasm.errors import ChiasmError, DataError
from chiasm.results.masks import decode_mask, encode_mask
from chiasm.verbs import data as verb

WIDTH, HEIGHT = 40, 30
# left, top, width, height
CAT, DOG = (4, 6, 10, 12), (20, 2, 15, 20)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def rectangle(box: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
    return mask


def corners(box: tuple[int, ...]) -> list[float]:
    left, top, width, height = box
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, counted one by one."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def coco(root: Path, change: Callable[[dict[str, Any]], object] = lambda content: None, count: int = 4) -> Path:
    """Images with a cat (category 7) and a dog (category 90) each but the last, which is empty."""
    for split in ("train", "val"):
        content: dict[str, Any] = {
            "images": [
                {"id": 10 + i, "file_name": f"{split}{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(count)
            ],
            "annotations": [
                {"id": 2 * i + n, "image_id": 10 + i, "category_id": (7, 90)[n], "bbox": list(box)}
                | {"iscrowd": 0, "area": 50 + n, "segmentation": [corners(box)]}
                for i in range(count - 1)
                for n, box in enumerate((CAT, DOG))
            ],
            "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        }
        for i in range(count):
            picture(root / "images" / split / f"{split}{i}.png", seed=100 * len(split) + i)
        if split == "train":
            change(content)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def voc(root: Path, change: Callable[[str], str] = lambda text: text, count: int = 4) -> Path:
    """The same in VOC's XML; `change` is for the first file."""
    for i in range(count):
        picture(root / "JPEGImages" / f"{i}.png", seed=i)
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for name, (x, y, w, h) in (("cat", CAT), ("dog", DOG))
            if i < count - 1
        )
        text = (
            f"<annotation><filename>{i}.png</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
            f"{objects}</annotation>"
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{i}.xml").write_text(change(text) if i == 0 else text)
    return root


def yolo(root: Path, first: str | None = None, count: int = 4) -> Path:
    """The same in YOLO's txt; `first` replaces the first file's lines."""
    for split in ("train", "val"):
        for i in range(count):
            picture(root / "images" / split / f"{i}.png", seed=100 * len(split) + i)
            rows = [
                f"{n} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}"
                for n, (x, y, w, h) in enumerate((CAT, DOG))
            ]
            label = root / "labels" / split / f"{i}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            if i < count - 1:
                label.write_text(first if first is not None and (split, i) == ("train", 0) else "\n".join(rows))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    return root


def masks(root: Path, names: str = "sky\nroad\nvoid\n", values: Callable[[np.ndarray], Any] = lambda m: m) -> Path:
    """Maps with sky above, road below and two void rows; `values` turns indices into what is saved."""
    indices = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    indices[12:], indices[20:22] = 1, 2
    for split in ("train", "val"):
        for i in range(3):
            picture(root / split / "images" / f"{i}.jpg", seed=10 * len(split) + i)
            path = root / split / "masks" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            saved = values(indices)
            (saved if isinstance(saved, Image.Image) else Image.fromarray(saved)).save(path)
    if names:
        (root / "classes.txt").write_text(names)
    return root


def opened(root: Path, **options: Any) -> AnnotatedData:
    data = open_data(str(root), **options)
    assert isinstance(data, AnnotatedData)
    return data


def found(data: AnnotatedData) -> Counter[tuple[str, str]]:
    return Counter((finding.kind, finding.done) for finding in data.findings)


# -------------------------------------------------------------------------------------------------- the same from all


@pytest.mark.parametrize("make", [coco, voc, yolo])
def test_every_format_gives_the_same_boxes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = opened(make(tmp_path), task="detect")
    assert data.task == "detect"
    assert data.findings == () == data.problems
    assert data.classes == ("cat", "dog")
    split = data.objects("train")
    first = next(split.objects(i) for i in range(len(split)) if len(split.objects(i)))
    assert first.boxes.tolist() == [[4, 6, 14, 18], [20, 2, 35, 22]]
    assert first.labels.tolist() == [0, 1]
    assert not first.crowd.any()
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    assert split.read(0).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match="objects without class maps"):
        data.maps("train")
    nothing = [o for s in data.splits for o in map(data.objects(s).objects, range(len(data.splits[s]))) if not len(o)]
    assert nothing
    assert nothing[0].boxes.shape == (0, 4)


@pytest.mark.parametrize("outline", ["polygon", "runs", "text"])
def test_masks_of_every_kind_are_the_same(outline: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            mask = rectangle(tuple(entry["bbox"]))
            if outline != "polygon":
                entry["segmentation"] = runs(mask) if outline == "runs" else encode_mask(mask)

    data = opened(coco(tmp_path, change))
    assert data.task == "instances"
    objects = data.objects("train").objects(0)
    assert np.array_equal(objects.masks().numpy(), np.stack([rectangle(CAT), rectangle(DOG)]))
    assert objects.areas.tolist() == [50, 51]
    assert objects.image_id == 10
    assert data.objects("train").objects(3).masks().shape == (0, HEIGHT, WIDTH)


def test_run_lengths_there_and_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = rng.random(rng.integers(1, 30, 2)) < rng.random()
        assert np.array_equal(decode_mask(encode_mask(mask), *mask.shape), mask)


KINDS: dict[str, Callable[[Path], Path]] = {
    "COCO with masks": coco,
    "COCO, one file": lambda root: coco(root) / "annotations" / "instances_train2017.json",
    "COCO with run lengths": lambda root: coco(root, annotation(segmentation=runs(rectangle(CAT)))),
    "COCO with boxes": lambda root: coco(root, strip_masks) / "annotations" / "instances_train2017.json",
    "COCO, one split with masks": lambda root: coco(root, strip_masks),
    "VOC": voc,
    "YOLO": yolo,
    "YOLO, data.yaml": lambda root: yolo(root) / "data.yaml",
    "YOLO with a polygon": lambda root: yolo(root, "0 0.1 0.1 0.5 0.1 0.5 0.5"),
    "YOLO with a broken line": lambda root: yolo(root, "0 0.1 0.1 0.5 0.1 0.5 0.5 0.5 0.5 0.5"),
    "masks": masks,
    "classes": lambda root: picture(picture(root / "cat" / "0.png").parents[1] / "dog" / "0.png", seed=1).parents[1],
    "nothing": lambda root: root / "nowhere",
}


def strip_masks(content: dict[str, Any]) -> None:
    for number, entry in enumerate(content["annotations"]):
        entry["segmentation"] = [[], None, {}][number % 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_is_told_by_the_format(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path / "set")
    expected = open_data(str(path), strict=False).task if path.exists() else "classify"
    assert task_of(str(path)) == expected


def test_data_by_name_has_classes() -> None:
    assert {task_of(spec) for spec in ("scenes", "hf:uoft-cs/cifar10", "torchvision:CIFAR10", "x.csv")} == {"classify"}


def test_crowds_and_difficult_objects_are_marked(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0] |= {"iscrowd": 1, "segmentation": runs(rectangle(CAT))}

    assert opened(coco(tmp_path / "coco", change)).objects("train").objects(0).crowd.tolist() == [True, False]
    hard = voc(tmp_path / "voc", lambda text: text.replace("<difficult>0", "<difficult>1", 1))
    data = opened(hard)
    crowds = [o for s in data.splits for o in map(data.objects(s).objects, range(len(data.splits[s]))) if o.crowd.any()]
    assert [o.crowd.tolist() for o in crowds] == [[True, False]]


def test_a_split_is_held_out_by_the_rarest_class_and_seeded(tmp_path: Path) -> None:
    root = voc(tmp_path, count=12)
    data, again, other = opened(root), opened(root), opened(root, seed=3)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 10, "val": 2}
    assert data.splits["val"].sources == again.splits["val"].sources != other.splits["val"].sources
    assert data.fingerprint() == again.fingerprint() != other.fingerprint()
    assert any("20% of the images" in note for note in data.notes)


def test_lists_of_images_divide_voc(tmp_path: Path) -> None:
    lists = voc(tmp_path) / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n")
    data = opened(tmp_path)
    assert [Path(source).stem for source in data.splits["val"].sources] == ["3"]


def test_yolo_polygons_and_folders_without_yaml(tmp_path: Path) -> None:
    x, y, w, h = CAT
    polygon = [v / (WIDTH, HEIGHT)[i % 2] for i, v in enumerate(corners(CAT))]
    root = yolo(tmp_path, first="0 " + " ".join(map(str, polygon)))
    data = opened(root)
    assert data.task == "instances"
    assert np.array_equal(data.objects("train").objects(0).masks()[0].numpy(), rectangle(CAT))
    assert found(data) == {("no mask", "dropped"): 10}
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("Katze\nHund\n")
    data = opened(root, task="detect")
    assert data.classes == ("Katze", "Hund")
    assert data.findings == ()
    assert data.objects("train").objects(0).boxes[0].tolist() == pytest.approx([x, y, x + w, y + h], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- maps

PALETTE = {0: (70, 130, 180), 1: (128, 64, 128), 2: (0, 0, 0)}


def coloured(indices: np.ndarray) -> np.ndarray:
    return np.array([PALETTE[i] for i in range(3)], dtype=np.uint8)[indices]


def with_palette(indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices, mode="P")
    image.putpalette([value for colour in PALETTE.values() for value in colour])
    return image


COLOURS = [
    ("sky 70 130 180\nroad 128 64 128\nvoid 0 0 0\n", coloured),
    ("70 130 180 sky\n128 64 128 road\n0 0 0 void", coloured),
    ("name,r,g,b\nsky,70,130,180\nroad,128,64,128\nvoid,0,0,0\n", coloured),
    ("# label:color_rgb:parts:actions\nsky:70,130,180::\nroad:128,64,128::\nvoid:0,0,0::", coloured),
    ("sky\nroad\nvoid", lambda indices: indices),
    ("sky\nroad\nvoid", with_palette),
    ("sky\nroad\nvoid", lambda indices: np.repeat(indices[..., None], 3, axis=2)),
    ("sky\nroad\nvoid", lambda indices: indices.astype(np.uint16)),
    ("sky\nroad", lambda indices: np.where(indices == 2, 255, indices).astype(np.uint8)),
]


@pytest.mark.parametrize(("names", "values"), COLOURS)
def test_masks_of_every_kind_give_the_same_map(names: str, values: Callable[[np.ndarray], Any], tmp_path: Path) -> None:
    data = opened(masks(tmp_path, names, values))
    assert (data.task, data.classes, data.findings) == ("segment", ("sky", "road"), ())
    image, classes = data.maps("val").sample(0)
    assert image.shape == (3, HEIGHT, WIDTH)
    assert classes[:, 0].tolist() == [0] * 12 + [1] * 8 + [IGNORE] * 2 + [1] * 8


def test_black_and_white_masks(tmp_path: Path) -> None:
    data = opened(masks(tmp_path, "", lambda indices: (indices > 0).astype(np.uint8) * 255))
    assert data.classes == ("background", "object")
    assert data.maps("train").sample(0)[1].unique().tolist() == [0, 1]


def test_masks_without_names_and_another_ignored_value(tmp_path: Path) -> None:
    data = opened(masks(tmp_path, ""), ignore_index=0)
    assert data.classes == ("class 1", "class 2")
    assert data.maps("train").sample(0)[1][:, 0].tolist() == [IGNORE] * 12 + [0] * 8 + [1] * 2 + [0] * 8


# ------------------------------------------------------------------------------------------- every defect has a name


def annotation(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(changes)


def image(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"][0].update(changes)


# what is wrong -> (the data, what is found and done, objects that are left in train and val)
DEFECTS: dict[str, tuple[Callable[[Path], Path], dict[tuple[str, str], int], int]] = {
    "COCO box partly outside": (
        lambda root: coco(root, annotation(bbox=[-5, 6, 20, 12])),
        {("box partly outside the image", "clipped"): 1},
        12,
    ),
    "COCO box outside": (
        lambda root: coco(root, annotation(bbox=[50, 6, 10, 12])),
        {("box outside the image", "dropped"): 1},
        11,
    ),
    "COCO box empty": (
        lambda root: coco(root, annotation(bbox=[4, 6, 0, 12])),
        {("empty or inverted box", "dropped"): 1},
        11,
    ),
    "COCO box inverted": (
        lambda root: coco(root, annotation(bbox=[14, 6, -10, 12])),
        {("empty or inverted box", "dropped"): 1},
        11,
    ),
    "COCO box of words": (
        lambda root: coco(root, annotation(bbox=["a", 6, 10, float("nan")])),
        {("box that is not four numbers", "dropped"): 1},
        11,
    ),
    "COCO box missing": (
        lambda root: coco(root, annotation(bbox=None)),
        {("box that is not four numbers", "dropped"): 1},
        11,
    ),
    "COCO unknown category": (
        lambda root: coco(root, annotation(category_id=8)),
        {("unknown category", "dropped"): 1},
        11,
    ),
    "COCO annotation of no image": (
        lambda root: coco(root, annotation(image_id=999)),
        {("annotation for an image that is not there", "dropped"): 1},
        11,
    ),
    "COCO annotation that is none": (
        lambda root: coco(root, lambda content: content["annotations"].append("x")),
        {("broken annotation", "dropped"): 1},
        12,
    ),
    "COCO image missing": (
        lambda root: coco(root, image(file_name="gone.png")),
        {("missing image", "left out"): 1},
        10,
    ),
    "COCO image without a name": (
        lambda root: coco(root, lambda content: content["images"].append({"id": 77})),
        {("image without id or file name", "left out"): 1},
        12,
    ),
    "COCO images of one id": (
        lambda root: coco(root, lambda content: content["images"].append(dict(content["images"][0]))),
        {("two images of one id", "left out"): 1},
        12,
    ),
    "COCO mask of another size": (
        lambda root: coco(root, annotation(segmentation={"size": [3, 3], "counts": [9]})),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO run lengths too long": (
        lambda root: coco(root, annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 10**12]})),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO run lengths of garbage": (
        lambda root: coco(root, annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "zzzz\u00e9"})),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO run lengths cut off": (
        lambda root: coco(root, annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "`"})),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO polygon of a line": (
        lambda root: coco(root, annotation(segmentation=[[1, 2, 3, 4]])),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO polygon of words": (
        lambda root: coco(root, annotation(segmentation=[["a"] * 6])),
        {("broken mask", "dropped"): 1},
        11,
    ),
    "COCO mask missing": (lambda root: coco(root, annotation(segmentation=[])), {("no mask", "dropped"): 1}, 11),
    "VOC broken XML": (lambda root: voc(root, lambda text: text[:-20]), {("broken XML", "left out"): 1}, 4),
    "VOC entities": (
        lambda root: voc(root, lambda text: '<!DOCTYPE a [<!ENTITY b "bbbb">]>' + text),
        {("broken XML", "left out"): 1},
        4,
    ),
    "VOC other XML": (lambda root: voc(root, lambda text: "<svg/>"), {("broken XML", "left out"): 1}, 4),
    "VOC image missing": (
        lambda root: (voc(root) / "JPEGImages" / "0.png").unlink() or root,  # type: ignore[func-returns-value]
        {("annotation for an image that is not there", "left out"): 1},
        4,
    ),
    "VOC box inverted": (
        lambda root: voc(root, lambda text: text.replace("<xmax>14<", "<xmax>2<")),
        {("empty or inverted box", "dropped"): 1},
        5,
    ),
    "VOC box of words": (
        lambda root: voc(root, lambda text: text.replace("<xmax>14<", "<xmax>wide<")),
        {("box that is not four numbers", "dropped"): 1},
        5,
    ),
    "VOC box outside": (
        lambda root: voc(root, lambda text: text.replace("<xmax>14<", "<xmax>400<")),
        {("box partly outside the image", "clipped"): 1},
        6,
    ),
    "VOC unknown class": (
        lambda root: (voc(root) / "classes.txt").write_text("dog") and root,  # type: ignore[return-value]
        {("unknown category", "dropped"): 3},
        3,
    ),
    "YOLO line of words": (lambda root: yolo(root, "cat 1 2 3 4"), {("broken line", "dropped"): 1}, 10),
    "YOLO line too short": (lambda root: yolo(root, "0 0.5 0.5 0.1"), {("broken line", "dropped"): 1}, 10),
    "YOLO box empty": (lambda root: yolo(root, "0 0.5 0.5 0 0.1"), {("empty or inverted box", "dropped"): 1}, 10),
    "YOLO box of nan": (
        lambda root: yolo(root, "0 0.5 nan 0.2 0.1"),
        {("box that is not four numbers", "dropped"): 1},
        10,
    ),
    "YOLO box outside": (
        lambda root: yolo(root, "0 0.9 0.5 0.6 0.1"),
        {("box partly outside the image", "clipped"): 1},
        11,
    ),
    "YOLO unknown class": (lambda root: yolo(root, "2 0.5 0.5 0.1 0.1"), {("unknown category", "dropped"): 1}, 10),
    "YOLO label without image": (
        lambda root: (yolo(root) / "images" / "train" / "0.png").unlink() or root,  # type: ignore[func-returns-value]
        {("annotation for an image that is not there", "left out"): 1},
        10,
    ),
    "YOLO broken image": (
        lambda root: (yolo(root) / "images" / "train" / "0.png").write_bytes(b"x") and root,  # type: ignore[return-value]
        {("unreadable image", "left out"): 1},
        10,
    ),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_a_defect_is_named_and_the_rest_is_kept(case: str, tmp_path: Path) -> None:
    make, expected, left = DEFECTS[case]
    data = opened(make(tmp_path), strict=False)
    assert found(data) == expected
    assert sum(len(data.objects(name).objects(i)) for name, s in data.splits.items() for i in range(len(s))) == left
    assert all(str(tmp_path) in finding.source and finding.what for finding in data.findings)
    for name, split in data.splits.items():
        for i in range(len(split)):
            boxes = data.objects(name).objects(i).boxes
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= WIDTH).all()


def no_objects(root: Path) -> Path:
    return coco(root, lambda content: content["annotations"].clear())


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# what is wrong -> (the data, the options, what the one line says)
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[str]]] = {
    "no objects at all": (no_objects, {"task": "detect"}, ["no training image has an object"]),
    "broken JSON": (lambda root: written(root / "a.json", '{"images": [1,'), {}, ["a.json", "broken JSON in line 1"]),
    "JSON of another kind": (lambda root: written(root / "a.json", "[1]"), {}, ["a.json", "a JSON list", "categories"]),
    "JSON nested without end": (lambda root: written(root / "a.json", "[" * 200000), {}, ["a.json", "not JSON"]),
    "JSON without annotations": (
        lambda root: written(root / "a.json", '{"images": []}'),
        {},
        ["no list 'annotations'"],
    ),
    "broken category": (
        lambda root: coco(root, lambda content: content["categories"].append({"id": [1]})),
        {},
        ["categories[2]", "an id and a name"],
    ),
    "categories of one id": (
        lambda root: coco(root, lambda content: content["categories"].append({"id": 7, "name": "emu"})),
        {},
        ["'cat' and 'emu' share the id 7"],
    ),
    "two files of one split": (
        lambda root: written(coco(root) / "annotations" / "instances_valid.json", "{}").parents[1],
        {},
        ["means val", "give one of the files itself"],
    ),
    "masks where there are boxes": (voc, {"task": "instances"}, ["boxes without masks", "for the task 'detect'"]),
    "maps where there are boxes": (voc, {"task": "segment"}, ["not annotated for --task segment", "images and masks"]),
    "boxes where there are maps": (masks, {"task": "detect"}, ["not annotated for --task detect", "COCO JSON"]),
    "unknown task": (masks, {"task": "segmentation"}, ["unknown task", "segment"]),
    "data.yaml without names": (
        lambda root: written(yolo(root) / "data.yaml", "train: x").parent,
        {},
        ["no class names"],
    ),
    "data.yaml broken": (lambda root: written(yolo(root) / "data.yaml", "a: [").parent, {}, ["data.yaml: not YAML"]),
    "data.yaml that runs code": (
        lambda root: written(yolo(root) / "data.yaml", "names: !!python/object/apply:os.getcwd []").parent,
        {},
        ["data.yaml: not YAML"],
    ),
    "data.yaml of no images": (
        lambda root: written(yolo(root) / "data.yaml", "train: gone\nnames: [a]").parent,
        {},
        ["no images where it says"],
    ),
    "a class named twice": (lambda root: masks(root, "sky\nsky\n"), {}, ["classes.txt", "'sky' stands there twice"]),
    "a colour beyond 255": (lambda root: masks(root, "sky 1 2 300\n"), {}, ["classes.txt", "from 0 to 255"]),
    "ignored value beyond 255": (masks, {"ignore_index": 300}, ["ignore_index is 300"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, options, words = REFUSED[case]
    with pytest.raises(ChiasmError) as caught:
        open_data(str(make(tmp_path)), **options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["evaluate", "conformer_nano_patch4_32"], ["compare", "--models", "test_vit", "test_convnext", "--data"]],
    ids=["evaluate", "compare"],
)
def test_a_classifier_on_boxes_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, str(coco(tmp_path / "cells"))]) == 2
    assert "cells: annotated for 'instances', here 'classify' is needed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ `chiasm data`


def test_report_of_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco(tmp_path / "set", annotation(bbox=[4, 6, 0, 12]))
    picture(root / "images" / "train" / "train1.png", size=(30, 40))
    (root / "images" / "val" / "val0.png").write_bytes(b"")
    report = chiasm.check_data(data=str(root), sheet=str(tmp_path / "sheet.png"))
    assert report.task == "instances"
    assert report.images == {"train": 4, "val": 4}
    assert report.amounts == {"train": {"cat": 1, "dog": 2}, "val": {"cat": 3, "dog": 3}}
    assert report.boxes["val"] == {"small": 6, "medium": 0, "large": 0}
    assert report.empty == {"train": 1, "val": 1}
    assert {(f.kind, f.done) for f in report.findings} == {
        ("empty or inverted box", "dropped"),
        ("image and annotation differ in size", "left out"),
    }
    assert list(report.broken) == [str(root / "images" / "val" / "val0.png")]
    assert not report.ok
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500
    assert verb.show(report, DataConfig(data=str(root))) == 1
    told = capsys.readouterr().out
    for words in ("cat", "train objects", "empty or inverted box: dropped (1)", "annotation 0", "6 small"):
        assert words in told
    assert verb.show(report, DataConfig(data=str(root), format="json")) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["done"] == "dropped"


def test_report_of_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = masks(tmp_path / "set")
    Image.new("L", (7, 5)).save(root / "train" / "masks" / "0.png")
    Image.new("L", (WIDTH, HEIGHT), 9).save(root / "train" / "masks" / "1.png")
    (root / "val" / "masks" / "2.png").unlink()
    Image.new("L", (WIDTH, HEIGHT)).save(root / "val" / "masks" / "3.png")
    report = chiasm.check_data(data=str(root), sheet=str(tmp_path / "sheet.png"))
    assert Counter((f.kind, f.done) for f in report.findings) == {
        ("image without a mask", "left out"): 1,
        ("annotation for an image that is not there", "left out"): 1,
        ("image and annotation differ in size", "left out"): 1,
        ("value that is no class", "ignored"): 1,
    }
    assert any("9 in 1200 pixels" in f.what for f in report.findings)
    assert report.amounts["train"] == {"sky": 480, "road": 640}
    assert report.ignored["train"] == 80 + 1200
    assert report.empty["train"] == 1
    assert verb.show(report, DataConfig(data=str(root))) == 1
    assert "42.9%" in capsys.readouterr().out


def test_a_coloured_mask_without_colours_is_named(tmp_path: Path) -> None:
    report = chiasm.check_data(data=str(masks(tmp_path, "sky\nroad\nvoid", coloured)), sheet="none")
    assert all("lines 'name red green blue'" in reason for reason in report.broken.values())
    assert len(report.broken) == 6


def test_sound_annotations_are_ready_to_train(tmp_path: Path) -> None:
    assert chiasm.check_data(data=str(yolo(tmp_path / "a")), sheet="none").ok
    assert chiasm.check_data(data=str(masks(tmp_path / "b")), sheet="none").ok


def test_folders_of_classes_stay_classes(tmp_path: Path) -> None:
    for name in ("images", "cats"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", seed=i)
    (tmp_path / "notes.json").write_text('{"images": 3}')
    (tmp_path / "notes.txt").write_text("x")
    assert open_data(str(tmp_path)).task == "classify"


@pytest.mark.parametrize("task", ["detect", "instances", "segment"])
def test_the_built_in_images_have_objects(task: str, tmp_path: Path) -> None:
    data = open_data("scenes:size=32,count=9,val=4", task=task)
    assert isinstance(data, AnnotatedData)
    if task == "segment":
        image, classes = data.maps("val").sample(3)
        assert classes.shape == image.shape[1:] == (32, 32)
        assert data.maps("val").subset([3]).sample(0)[1].equal(classes)
    else:
        objects = data.objects("val").objects(3)
        assert len(objects) >= 4
        assert data.objects("val").subset([3]).objects(0).boxes.equal(objects.boxes)
        if task == "instances":
            edges = [mask.nonzero().amin(0).flip(0) for mask in objects.masks()]
            assert objects.boxes[:, :2].int().tolist() == [edge.tolist() for edge in edges]
    report = chiasm.check_data(data="scenes:size=32,count=9,val=4", task=task, sheet=str(tmp_path / "s.png"))
    assert report.ok
    assert report.images == {"train": 9, "val": 4}
    assert report.kinds == {"RGB": 13}


# ----------------------------------------------------------------------------------------------------------- real data


def test_real_boxes(shared_data: Path) -> None:
    data = opened(shared_data / "bccd_coco")
    assert (data.task, data.classes) == ("detect", ("RBC", "WBC", "Platelets"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 205, "val": 87, "test": 72}
    split = data.objects("train")
    assert sum(len(split.objects(i)) for i in range(len(split))) == 2805


def test_real_instances(shared_data: Path) -> None:
    data = opened(shared_data / "coco_mini")
    assert (data.task, len(data.classes), data.findings) == ("instances", 80, ())
    objects = data.objects("val").objects(0)
    assert objects.image_id == 139
    assert data.splits["val"].read(0).shape == (3, objects.height, objects.width)
    # COCO's own areas are of the polygons: about the masks' pixels.
    pixels = objects.masks().flatten(1).sum(1)
    assert ((pixels - objects.areas).abs() <= 0.05 * objects.areas + 4).all()


def test_real_maps(shared_data: Path) -> None:
    data = opened(shared_data / "camvid")
    assert (data.task, len(data.classes)) == ("segment", 11)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 367, "val": 101}
    image, classes = data.maps("val").sample(0)
    assert image.shape[1:] == classes.shape == (360, 480)
    assert classes.unique().tolist() == [*range(11), IGNORE]
