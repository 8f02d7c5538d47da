"""`chiasm data`: what is wrong with a data set is found, named, and decides the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import chiasm
from chiasm.config import DataConfig
from chiasm.errors import DataError
from chiasm.verbs import data as verb


def put(path: Path, seed: int, size: tuple[int, int] = (12, 10), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    root = tmp_path / "Häuser und Boote"
    for split, count in (("train", 12), ("val", 3)):
        for label, name in enumerate(("haus", "boot")):
            for i in range(count):
                put(root / split / name / f"{i}.png", seed=1000 * len(split) + 100 * label + i, size=(10 + i, 20))
    return root


def check(root: Path, **flags: object) -> verb.DataReport:
    return chiasm.check_data(data=str(root), sheet="none", **flags)


def test_sound_data(sound: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "new folder" / "sheet.png"
    report = chiasm.check_data(data=str(sound), sheet=str(sheet))
    assert report.ok
    assert report.problems == report.notes == []
    assert report.counts == {"train": {"boot": 12, "haus": 12}, "val": {"boot": 3, "haus": 3}}
    assert (report.sizes.smallest, report.sizes.largest) == ((10, 20), (21, 20))
    assert report.kinds == {"PNG RGB": 30}
    assert report.sheet == str(sheet)
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # pictures, not blank paper
    assert verb.show(report, DataConfig(data=str(sound))) == 0


def test_broken_files_are_named(sound: Path) -> None:
    broken = sound / "train" / "haus" / "broken ü.jpg"
    broken.write_bytes(b"<html>404</html>")
    report = check(sound)
    assert report.broken == {str(broken): next(iter(report.broken.values()))}
    assert "web page" in report.broken[str(broken)]
    assert not report.ok
    assert any("1 file cannot be read" in problem for problem in report.problems)


def test_duplicates_across_splits_in_another_format_and_name(sound: Path) -> None:
    first = sound / "train" / "haus" / "3.png"
    with Image.open(first) as image:
        image.save(sound / "val" / "haus" / "copy.bmp")
    report = check(sound)
    assert report.across == [[str(first), str(sound / "val" / "haus" / "copy.bmp")]]
    assert report.conflicts == report.within == []
    assert any("more than one split" in problem for problem in report.problems)


def test_duplicates_within_a_class_are_a_note(sound: Path) -> None:
    put(sound / "train" / "haus" / "again.png", seed=5)
    put(sound / "train" / "haus" / "again too.png", seed=5)
    report = check(sound)
    assert len(report.within) == 1
    assert report.ok
    assert any("weigh double" in note for note in report.notes)


def test_one_image_with_two_labels(sound: Path) -> None:
    put(sound / "train" / "haus" / "x.png", seed=5)
    put(sound / "train" / "boot" / "y.png", seed=5)
    report = check(sound)
    assert len(report.conflicts) == 1
    assert any("different labels" in problem for problem in report.problems)


def test_same_pixels_in_another_shape_are_no_duplicate(sound: Path) -> None:
    for name, size in (("a", (4, 9)), ("b", (9, 4))):
        Image.new("RGB", size, "red").save(sound / "train" / "haus" / f"{name}.png")
    assert check(sound).within == []


def test_all_problems_are_told_at_once(sound: Path) -> None:
    (sound / "train" / "leer").mkdir()
    put(sound / "val" / "fremd" / "1.png", seed=9)
    for i in range(3):
        put(sound / "train" / "rar" / f"{i}.png", seed=100 + i)
    report = check(sound)
    text = "\n".join(report.problems)
    assert "leer: no images of this class" in text
    assert "val has classes that train has not: fremd" in text
    notes = "\n".join(report.notes)
    assert "fewer than 10 training images: rar" in notes
    assert "rar" in next(line for line in report.notes if line.startswith("val has no image of"))


def test_imbalance(tmp_path: Path) -> None:
    for name, count in (("many", 60), ("few", 5)):
        for i in range(count):
            put(tmp_path / name / f"{i}.png", seed=100 * len(name) + i)
    report = check(tmp_path)
    assert any("--class-weights balanced" in note for note in report.notes)
    assert any("split off" in note for note in report.notes)


def test_json_and_exit_code(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sound / "val" / "boot" / "empty.jpg").touch()
    report = check(sound)
    assert verb.show(report, DataConfig(data=str(sound), format="json")) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["counts"]["val"] == {"boot": 4, "haus": 3}
    assert list(told["broken"]) == [str(sound / "val" / "boot" / "empty.jpg")]


def test_table_names_everything(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = sound / "val" / "boot" / "[bold]empty.jpg"  # not taken for markup
    bad.touch()
    assert verb.show(check(sound), DataConfig(data=str(sound))) == 1
    told = capsys.readouterr().out
    for words in ("haus", "boot", "2 classes", str(bad), "to mend", "replace or remove it", "not ready"):
        assert words in told


def test_generated_data(tmp_path: Path) -> None:
    report = chiasm.check_data(data="scenes:count=18,val=9,size=32", sheet=str(tmp_path / "s.png"))
    assert report.kinds == {"RGB": 27}
    assert report.ok


def test_nothing_readable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").touch()
    report = chiasm.check_data(data=str(tmp_path / "set"), sheet=str(tmp_path / "s.png"))
    assert report.sizes is None
    assert not report.ok


def test_a_sheet_that_cannot_be_written(sound: Path) -> None:
    with pytest.raises(DataError, match="contact sheet cannot be written"):
        chiasm.check_data(data=str(sound), sheet=str(sound / "train" / "haus" / "0.png" / "sheet.png"))
