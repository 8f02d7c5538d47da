"""Folders, tables and public sets as data: what is understood, and what is said of the rest."""

from __future__ import annotations

import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data import ImageData, open_data
from chiasm.errors import ChiasmError, DataError, UnknownNameError


def put(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, 40, 90)).save(path)
    return path


def fill(root: Path, **counts: int) -> Path:
    """`count` images for each class (or split__class)."""
    for name, count in counts.items():
        for i in range(count):
            put(root / name.replace("__", "/") / f"{i}.png", i)
    return root


def sizes(data: ImageData) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


# ------------------------------------------------------------------------------------------------------------- folders


def test_one_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    fill(tmp_path / "pets", cat=20, dog=10, emu=2, fox=1)
    data = open_data(str(tmp_path / "pets"), val_fraction=0.2, seed=1)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog", "emu", "fox")
    assert Counter(data.splits["val"].labels) == {0: 4, 1: 2, 2: 1}
    assert Counter(data.splits["train"].labels) == {0: 16, 1: 8, 2: 1, 3: 1}
    train, val = (set(data.splits[name].sources) for name in ("train", "val"))
    assert not train & val
    assert len(train | val) == 33
    again, other = (open_data(str(tmp_path / "pets"), seed=seed) for seed in (1, 2))
    assert again.splits["val"].sources == data.splits["val"].sources
    assert other.splits["val"].sources != data.splits["val"].sources
    assert any("split off" in note for note in data.notes)
    for split in data.splits.values():
        assert all(Path(s).parent.name == data.classes[i] for s, i in zip(split.sources, split.labels, strict=True))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(val: str, tmp_path: Path) -> None:
    fill(tmp_path, train__a=3, train__b=2, test__a=1, test__b=1, **{f"{val}__a": 1, f"{val}__b": 2})
    data = open_data(str(tmp_path))
    assert sizes(data) == {"train": 5, "val": 3, "test": 2}
    assert data.notes == ()
    assert data.splits["train"].read(1).shape == (3, 6, 8)


def test_a_test_folder_is_never_validation(tmp_path: Path) -> None:
    fill(tmp_path, train__a=10, train__b=10, test__a=2, test__b=2)
    assert sizes(open_data(str(tmp_path))) == {"train": 16, "val": 4, "test": 4}


def test_only_validation_is_enough_to_evaluate(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path, val__a=2, val__b=2)))
    assert sizes(data) == {"val": 4}
    with pytest.raises(DataError, match="no split 'train'; it has val"):
        data.split("train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert open_data(str(fill(tmp_path, train=5, plane=5))).classes == ("plane", "train")


def test_names_hidden_files_deeper_folders_and_strays(tmp_path: Path) -> None:
    root = tmp_path / "Моя папка 1"
    for name in ("Übung 1/bild ä.png", "Übung 1/deep/er/2.PNG", "猫 と 犬/写真 1.png", "猫 と 犬/2.png"):
        put(root / name)
    for name in (".git/x.png", "Übung 1/.hidden.png", "Übung 1/._2.png", "stray.png"):
        put(root / name)
    (root / "Übung 1" / "Thumbs.db").write_bytes(b"x")
    data = open_data(str(root))
    assert data.classes == ("Übung 1", "猫 と 犬")
    assert sum(sizes(data).values()) == 4
    assert data.name == "Моя-папка-1"
    assert any("stray.png" in note for note in data.notes)
    assert all(data.splits["train"].read(i).shape == (3, 6, 8) for i in range(sizes(data)["train"]))


def empty_class(root: Path) -> None:
    fill(root, cat=2, dog=2)
    (root / "emu").mkdir()


def stranger_in_val(root: Path) -> None:
    fill(root, train__a=2, train__b=2, val__a=1, val__c=1)


def class_folder_without_images(root: Path) -> None:
    fill(root, cat=2)
    (root / "dog").mkdir()
    (root / "dog" / "readme.txt").write_text("none")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["saw nothing", "one sub-folder of images per class"]),
        (lambda root: put(root / "1.png"), ["1 files and no sub-folder"]),
        (lambda root: (root / "cat").mkdir(), ["no image files in its sub-folders"]),
        (lambda root: fill(root, cat=3), ["one class only ('cat')", "two or more"]),
        (empty_class, ["emu: no images of this class", "remove the folder"]),
        (class_folder_without_images, ["dog: no images of this class"]),
        (stranger_in_val, ["val has classes that train has not: c"]),
        (lambda root: fill(root, val__a=1, valid__a=1, train__a=1), ["'val' and 'valid' both mean val"]),
    ],
)
def test_folders_that_will_not_do(make, words: list[str], tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        open_data(str(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(tmp_path) in str(caught.value) or tmp_path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("photoz", ["photoz: no such folder or file", "did you mean photos?"]),
        ("scene", ["did you mean scenes?"]),
        ("torchvison:CIFAR10", ["did you mean torchvision:?"]),
        ("torchvision:CIFAR", ["did you mean CIFAR10 or CIFAR100?"]),
        ("nowhere/at/all", ["no such folder or file"]),
        ("model.bin", ["expected a folder of images or a CSV"]),
        ("scenes:sise=64", ["unknown option of scenes 'sise'", "did you mean size?"]),
        ("scenes:size", ["'size' has no value"]),
        ("scenes:size=big", ["expected int"]),
        ("scenes:size=8", ["expected 32 to 4096"]),
        ("scenes:count=5", ["expected one of each"]),
        ("scenes:[", ["expected key=value"]),
        ("torchvision:FakeData:sizes=3", ["sizes", "see torchvision.datasets.FakeData"]),
    ],
)
def test_names_that_do_not_exist(spec: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ChiasmError) as caught:
        open_data(spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0])
def test_shares_that_leave_nothing(fraction: float) -> None:
    with pytest.raises(DataError, match="val_fraction"):
        open_data("scenes", val_fraction=fraction)


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table(delimiter: str, encoding: str, tmp_path: Path) -> None:
    rows = [("Split", "Path", "note", "Label"), ("train", "bilder/a 1.png", "x", "Öl"), ("", "b.png", "", "wasser")]
    rows += [("validation", "c.png", "", "Öl"), ("TEST", str(put(tmp_path / "abs" / "d.png")), "", "wasser")]
    for name in ("bilder/a 1.png", "b.png", "c.png"):
        put(tmp_path / "set" / name)
    table = tmp_path / "set" / "my table.csv"
    table.write_text("\r\n".join(delimiter.join(row) for row in rows), encoding=encoding)
    data = open_data(str(table))
    assert data.name == "my-table"
    assert data.classes == ("wasser", "Öl")
    assert {name: split.labels for name, split in data.splits.items()} == {"train": [1, 0], "val": [1], "test": [0]}
    assert data.splits["train"].read(0).shape == (3, 6, 8)
    assert data.splits["test"].sources == [str(tmp_path / "abs" / "d.png")]


def test_a_table_without_split_is_divided(tmp_path: Path) -> None:
    lines = [f"{put(tmp_path / f'{i}.png').name},{'ab'[i % 2]}" for i in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    assert sizes(open_data(str(tmp_path / "t.csv"))) == {"train": 16, "val": 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty", "path,label"]),
        (b"path,label\n", ["a header and no rows"]),
        (b"file,label\na.png,cat\n", ["no column 'path'", "saw file, label"]),
        (b"path,labels\na.png,cat\n", ["no column 'label'", "rename 'labels'"]),
        (b"path,label\na.png,\n", ["line 2", "no label"]),
        (b"path,label\n,cat\n", ["line 2", "no path"]),
        (b"path,label,split\na.png,cat,trian\n", ["line 2", "'trian'", "did you mean train"]),
        (b"path,label\na.png,cat\nmissing.png,dog\n", ["1 of 2 files do not exist", "missing.png", "relative to"]),
        (b'path,label\n"a.png,cat\n', ["not a CSV"]),
        ("path,label\nä.png,cat\n".encode("utf-16"), ["UTF-8"]),
    ],
)
def test_tables_that_will_not_do(content: bytes, words: list[str], tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises((DataError, UnknownNameError)) as caught:
        open_data(str(tmp_path / "t.csv"))
    assert all(word in str(caught.value) for word in [*words, "t.csv"]), str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- public sets


def test_torchvision_fake_data() -> None:
    data = open_data("torchvision:FakeData:size=40,num_classes=3,image_size=[3,20,24]")
    assert data.classes == ("class 0", "class 1", "class 2")
    assert sum(sizes(data).values()) == 40
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    image = data.splits["train"].read(2)
    assert torch.equal(torch.rand(2), expected)
    assert image.shape == (3, 20, 24)
    assert torch.equal(data.splits["train"].read(2), image)


def test_torchvision_from_files_that_are_there(tmp_path: Path) -> None:
    """MNIST's own files, small ones: torchvision reads them without a network."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 30, 28, 28) + pixels.tobytes())
        labels = bytes(i % 10 for i in range(30))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 30) + labels)
    data = open_data(f"torchvision:MNIST:root={tmp_path}")
    assert len(data.classes) == 10
    assert data.classes[3] == "3 - three"
    assert sizes(data) == {"train": 20, "val": 10, "test": 30}
    assert torch.equal(data.splits["test"].read(4), torch.from_numpy(pixels[4]).expand(3, -1, -1))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"torchvision:SVHN cannot be had .* is there a network\?.*datasets"):
        open_data("torchvision:SVHN")
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hf:nobody/nothing cannot be had"):
        open_data("hf:nobody/nothing")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The `datasets` library, with its caches in a folder of their own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def rows(datasets, labels: list, feature=None):
    images = [Image.new("RGB", (10, 12), (i, 0, 0)) for i in range(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "label": feature or datasets.Value("string")})
    return datasets.Dataset.from_dict({"picture": images, "label": labels}, features=features)


def test_hf_saved_to_disk(hub, tmp_path: Path) -> None:
    names = hub.ClassLabel(names=["cat", "dog"])
    train, test = rows(hub, [0, 1] * 10, names), rows(hub, [-1] * 4, names)
    parts = {"train": train, "validation": rows(hub, [1, 0], names), "test": test, "extra": test}
    hub.DatasetDict(parts).save_to_disk(tmp_path / "pets")
    data = open_data(f"hf:{tmp_path / 'pets'}")
    assert data.classes == ("cat", "dog")
    assert sizes(data) == {"train": 20, "val": 2}
    assert data.splits["train"].labels[:3] == [0, 1, 0]
    assert [note.split("'")[1] for note in data.notes] == ["test", "extra"]
    image = data.splits["train"].read(5)
    assert image.shape == (3, 12, 10)
    assert image[0].unique().tolist() == [5]
    assert torch.equal(pickle.loads(pickle.dumps(data.splits["train"])).read(5), image)


def test_hf_parquet_with_text_labels(hub, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows(hub, ["b", "a"] * 5).to_parquet(tmp_path / "set" / "data" / "train-0.parquet")
    data = open_data(f"hf:{tmp_path / 'set'}")
    assert data.classes == ("a", "b")
    assert sizes(data) == {"train": 8, "val": 2}
    with pytest.raises(UnknownNameError, match=r"'lable'.*did you mean label"):
        open_data(f"hf:{tmp_path / 'set'}:label=lable")
    with pytest.raises(UnknownNameError, match="did you mean image"):
        open_data(f"hf:{tmp_path / 'set'}:images=picture")


def test_hf_without_images_or_labels(hub, tmp_path: Path) -> None:
    hub.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(DataError, match="no column of images; it has text, label"):
        open_data(f"hf:{tmp_path / 'texts'}")
    rows(hub, ["a"]).rename_column("label", "kind").save_to_disk(tmp_path / "kinds")
    with pytest.raises(DataError, match="no column of labels"):
        open_data(f"hf:{tmp_path / 'kinds'}")
    assert open_data(f"hf:{tmp_path / 'kinds'}:label=kind", strict=False).classes == ("a",)


def test_real_folder(shared_data: Path) -> None:
    data = open_data(str(shared_data / "imagenette128"))
    assert sizes(data) == {"train": 9103, "val": 3791}
    assert len(data.classes) == 10
    assert data.splits["train"].read(0).shape == (3, 128, 128)
