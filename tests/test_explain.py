"""`chiasm explain`: pictures, arrays and a page of any model's answers; bad images are named, none is written over."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchvision.ops import box_iou

import chiasm
from chiasm.cli import main
from chiasm.config import Preprocess
from chiasm.data import open_data
from chiasm.errors import ChiasmError, DataError, ImageError, UnknownNameError
from chiasm.explaining.explainer import Explainer
from chiasm.explaining.faithfulness import Estimate, Faithfulness, MapScores, Score
from chiasm.model_file import ModelInfo, preprocess_of, save_model
from chiasm.models.heads import with_head
from chiasm.report.explained import Look, Stage
from chiasm.report.explanation_measures import measures_sections
from chiasm.report.heat_panels import close_up, panels, shrunk, strength
from chiasm.report.heat_sheet import Row, sheet
from chiasm.results import Explanation
from chiasm.verbs.explain import _evaluation_table

NANO = "conformer_nano_patch4_32"
LABELS = ("apple", "pear", "plum, dried", "quince")
COUPLED_MAPS = {"conv/gradcam", "tokens/gradcam", "tokens/rollout", "tokens/gradient_rollout", "fused"}


def _save(path: Path, architecture: str = NANO, size: int = 32, **model_args: object) -> str:
    torch.manual_seed(0)
    model = chiasm.create_model(architecture, num_classes=len(LABELS), **model_args)
    info = ModelInfo(
        architecture=architecture, model_args=model_args, labels=LABELS, preprocess=preprocess_of(model, size)
    )
    save_model(path, model, info)
    return str(path)


def _dense(path: Path, task: str, head: str) -> str:
    torch.manual_seed(0)
    options: dict[str, Any] = {"name": head, "channels": 64} | ({"threshold": 0.0} if task == "detect" else {})
    model = with_head(chiasm.create_model(NANO, num_classes=0), 3, task=task, architecture=NANO, **options)
    info = ModelInfo(
        architecture=NANO, task=task, head=options, labels=LABELS[:3], preprocess=Preprocess(size=(64, 64))
    )
    save_model(path, model, info)
    return str(path)


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("model") / "fruit.safetensors")


def _photo(path: Path, seed: int = 0, size: tuple[int, int] = (44, 36)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    return [_photo(tmp_path / "photos" / name, seed) for seed, name in enumerate(("a.png", "b ü.png"))]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:  # refuses pickles
        return dict(file)


# --------------------------------------------------------------------------------------------------------- the command


def test_everything_of_a_coupled_model(
    coupled: str,
    photos: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "photos" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not much of a JPEG")
    out = tmp_path / "out"
    command = ["explain", coupled, str(tmp_path / "photos"), "--out", str(out), "--device", "cpu", "--no-measures"]
    assert main(command) == 1  # one image cannot be read
    printed = capsys.readouterr()
    assert "1 of 3 images could not be read" in printed.err
    assert str(broken) in caplog.text
    assert f"page {out / 'index.html'}" in printed.out
    names = {"a.png", "a.npz", "b ü.png", "b ü.npz", "figure.png", "features.png", "index.html"}
    assert {path.name for path in out.iterdir()} == names  # and no half-written file

    arrays = _arrays(out / "a.npz")
    for prefix in ("", "uncoupled/"):
        of_maps = {name for name in arrays if name.startswith(prefix) and "features/" not in name}
        assert {f"{prefix}{name}" for name in COUPLED_MAPS} <= of_maps
        assert arrays[f"{prefix}conv/gradcam"].dtype == np.float32
        over = arrays[f"{prefix}conv/gradcam@image"]
        assert over.shape == (44, 36)
        assert over.dtype == np.float16
        assert 0 <= over.min() < over.max() == 1
        features = [name for name in arrays if name.startswith(f"{prefix}features/")]
        assert {name.split("features/")[1].split("/")[0] for name in features} == {"conv", "tokens"}
        assert all(arrays[name].ndim == 3 for name in features)
    about = json.loads(str(arrays["about"]))
    assert [one["prefix"] for one in about] == ["", "uncoupled/"]
    assert about[0]["size"] == [44, 36]
    assert 0 < about[0]["overlap"] < 1
    assert about[0]["subject"] in LABELS
    assert about[0]["label"] == about[1]["label"] == LABELS.index(about[0]["subject"])

    page = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:)|url\(", page)  # nothing is fetched
    assert "<script" not in page
    for words in ("the same weights with the coupling off", "where they disagree", "Stage by stage", "broken header"):
        assert words.lower() in page.lower()
    assert page.count('class="gallery row"') == 2 * 3  # of two images: coupled, coupling off, every map


def test_in_python_as_in_the_files(coupled: str, photos: list[str], tmp_path: Path) -> None:
    result = chiasm.explain(model=coupled, images=photos, out=tmp_path / "out", measures=False, device="cpu")
    assert [one.source for one in result.explanations] == photos
    assert result.branches == ("conv", "tokens")
    image = result.images[0]
    assert image.picture == tmp_path / "out" / "a.png"
    arrays = _arrays(image.arrays)
    for name, values in image.answers[0].explanation.maps.items():
        np.testing.assert_array_equal(arrays[name], values)
    np.testing.assert_allclose(
        arrays["fused@image"], result.explanations[0].over_image(result.explanations[0].maps["fused"]), atol=1e-3
    )
    # The features of a branch with the coupling off are others from the first exchange on.
    last = [name for name in arrays if name.startswith("features/tokens/")][-1]
    assert np.abs(arrays[last] - arrays[f"uncoupled/{last}"]).max() > 0.01
    assert result.page.is_file()
    assert not result.failures


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("resnet10t", 64), ("swin_nano_window4_128", 64), ("mobilevit_xxs_256", 64), ("vit_tiny_patch16_224", 224)],
)
def test_a_model_of_one_branch_has_one_row(architecture: str, size: int, photos: list[str], tmp_path: Path) -> None:
    options = {"depth": 2} if architecture.startswith("vit") else {}
    model = _save(tmp_path / "one.safetensors", architecture, size, **options)
    result = chiasm.explain(model=model, images=photos[:1], out=tmp_path / "out", measures=False, device="cpu")
    (image,) = result.images
    assert result.branches == ("model",)
    assert image.answers[0].uncoupled is None
    assert not any("uncoupled" in name for name in _arrays(image.arrays))
    assert "coupling off" not in result.page.read_text(encoding="utf-8").lower()
    assert any(name.startswith("features/model/") for name in _arrays(image.arrays))


def test_a_detector_and_a_segmenter(photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))
    detector = _dense(tmp_path / "detector.safetensors", "detect", "fcos")
    found = chiasm.explain(
        model=detector, images=photos[:1], out=tmp_path / "boxes", top=2, measures=False, device="cpu"
    )
    assert len(found.explanations) == 2
    # With the coupling off what is found at the same place is explained and no other: a pass for each branch.
    for answer in found.images[0].answers:
        if (off := answer.uncoupled) is not None:
            assert off.label == answer.explanation.label
            assert box_iou(*(torch.tensor([one.box]) for one in (off, answer.explanation))).item() >= 0.5
    uncoupled = sum(answer.uncoupled is not None for answer in found.images[0].answers)
    assert len(passes) == 2 * (2 + uncoupled)
    assert all(one.box is not None for one in found.explanations)
    arrays = _arrays(found.images[0].arrays)
    maps = COUPLED_MAPS - {"tokens/rollout"}  # which says nothing of one object
    assert maps | {f"2/{name}" for name in maps} <= set(arrays)
    segmenter = _dense(tmp_path / "segmenter.safetensors", "segment", "fpn")
    areas = chiasm.explain(
        model=segmenter, images=photos[:1], out=tmp_path / "areas", top=1, measures=False, device="cpu"
    )
    (area,) = areas.explanations
    assert area.subject.startswith(LABELS[area.label])
    other = chiasm.explain(
        model=segmenter, images=photos[:1], out=tmp_path / "other", label=LABELS[2], measures=False, device="cpu"
    )
    assert all(one.label == 2 for one in other.explanations)  # none where no pixel is given it
    assert other.images[0].picture.is_file()


def test_models_side_by_side(coupled: str, photos: list[str], tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = _save(tmp_path / "alone" / "model.safetensors", "resnet10t", 64)
    result = chiasm.explain(
        model=coupled, images=photos[:1], out=tmp_path / "out", beside=[alone, coupled], measures=False, device="cpu"
    )
    page = result.page.read_text(encoding="utf-8")
    # The folder's name stands for a file called model, and a model that comes twice is numbered.
    for heading in ("alone<br>the model", "fruit (2)<br>convolution branch", "fruit<br>Transformer branch"):
        assert heading in page
    assert page.index("alone<br>the model") < page.index("fruit<br>convolution branch")
    with Image.open(tmp_path / "out" / "figure.png") as wide:
        assert wide.width > 6 * 150  # the image and five branches


def test_random_weights_are_said(photos: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = chiasm.explain(model=NANO, images=photos[:1], out=tmp_path / "out", measures=False, device="cpu")
    assert "random weights" in caplog.text
    assert "random weights" in result.page.read_text(encoding="utf-8")
    assert not result.trained


# ------------------------------------------------------------------------------------------------------ what is written


def test_no_image_is_written_over_and_names_that_repeat_are_numbered(coupled: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    paths = [
        _photo(here / "a.png"), _photo(here / "figure.png", 1), _photo(tmp_path / "there" / "a.png", 2),
    ]  # fmt: skip
    before = [Path(path).read_bytes() for path in paths]
    result = chiasm.explain(model=coupled, images=paths, out=here, measures=False, device="cpu")
    assert [Path(path).read_bytes() for path in paths] == before
    written = [image.picture.name for image in result.images]
    assert written == ["a-2.png", "figure-3.png", "a-3.png"]
    assert all(image.picture.is_file() and image.arrays.is_file() for image in result.images)
    assert (here / "figure-2.png").is_file()  # the figure of them all


def test_its_own_pictures_are_not_explained_again(
    coupled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _photo(tmp_path / "a.png")
    for _ in range(2):
        result = chiasm.explain(model=coupled, images=["."], measures=False, device="cpu")
        assert [image.source for image in result.images] == ["./a.png"]
    with pytest.raises(DataError, match="no image here but pictures of an earlier run"):
        chiasm.explain(model=coupled, images=["explained"], out="explained", measures=False, device="cpu")
    written = {path.name for path in Path("explained").iterdir()}
    assert written == {"a.png", "a.npz", "figure.png", "features.png", "index.html"}


def test_what_a_person_has_in_the_folder_stays_and_what_an_earlier_run_left_does_not(
    coupled: str, tmp_path: Path
) -> None:
    cats = tmp_path / "photos" / "cats"
    photos = [_photo(tmp_path / "photos" / "a.png"), _photo(cats / "a.png", 1), _photo(cats / "b.png", 2)]
    np.savez(cats / "b-2.npz", mine=np.arange(3))
    (cats / "evaluation.json").write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "photos").rglob("*.*")}

    def explain() -> list[str]:
        result = chiasm.explain(model=coupled, images=[tmp_path / "photos"], out=cats, measures=False, device="cpu")
        assert [image.source for image in result.images] == photos
        return [path.name for image in result.images for path in (image.picture, image.arrays)]

    names = ["a-2.png", "a-2.npz", "a-3.png", "a-3.npz", "b-3.png", "b-3.npz"]
    assert explain() == names
    first = sorted(cats.iterdir())
    assert explain() == names  # its own files alone are written over
    assert sorted(cats.iterdir()) == first
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["index.html", "measures.json"])
def test_a_page_of_somebody_else_is_not_written_over(
    coupled: str, photos: list[str], tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / "photos" / name
    theirs.write_text('{"mine": 1}')
    with pytest.raises(ChiasmError, match=f"{name}: not of an earlier run of explain.*--out"):
        chiasm.explain(model=coupled, images=photos, out=theirs.parent, device="cpu")
    assert theirs.read_text() == '{"mine": 1}'
    assert {path.name for path in theirs.parent.iterdir()} == {"a.png", "b ü.png", name}


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_no_half_written_file_stays(
    coupled: str, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: BaseException
) -> None:
    def stopped(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"PK half")
        raise what

    monkeypatch.setattr(np, "savez_compressed", stopped)
    with pytest.raises((KeyboardInterrupt, ChiasmError)):
        chiasm.explain(model=coupled, images=photos, out=tmp_path / "out", measures=False, device="cpu")
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_run_leaves_what_is_finished(
    coupled: str, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Explainer.explain

    def stopped(self: Explainer, pixels: torch.Tensor, source: str, **options: object) -> list[Explanation]:
        if source == photos[1]:
            raise KeyboardInterrupt
        return whole(self, pixels, source, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Explainer, "explain", stopped)
    out = tmp_path / "out"
    assert main(["explain", coupled, *photos, "--out", str(out), "--no-measures", "--device", "cpu"]) == 130
    assert "1 of 2 images" in caplog.text
    assert "a.png" in (out / "index.html").read_text(encoding="utf-8")
    assert (out / "a.npz").is_file()
    assert not list(out.glob("b*"))


# --------------------------------------------------------------------------------------------------------- bad settings


def test_what_cannot_be_is_said_in_one_line(coupled: str, photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def explain(**flags: object) -> None:
        chiasm.explain(**{"model": coupled, "images": photos, "out": out, "measures": False, "device": "cpu"} | flags)

    with pytest.raises(ChiasmError, match="which images"):
        explain(images=[])
    for flag, value in {"beside": [coupled], "label": LABELS[0], "top": 2, "measures": False}.items():
        with pytest.raises(ChiasmError, match=f"--(no-)?{flag} is for images"):
            explain(**{"images": [], "evaluate": "scenes", "measures": True, flag: value})
    with pytest.raises(ChiasmError, match="top is 0"):
        explain(top=0)
    with pytest.raises(ChiasmError, match="--top is for detectors"):
        explain(top=4)
    with pytest.raises(ChiasmError, match="--split is for --evaluate"):
        explain(split="train")
    with pytest.raises(UnknownNameError, match="did you mean quince"):
        explain(label="quinze")
    with pytest.raises(ChiasmError, match="level is -99"):
        explain(level=-99)
    with pytest.raises(DataError, match="no image files"):
        explain(images=[str(tmp_path / "nothing*.png")])
    with pytest.raises(ChiasmError, match="a file; --out takes a folder"):
        explain(out=photos[0])
    small = _save(tmp_path / "one.safetensors", "resnet10t", 64)
    with pytest.raises(ChiasmError, match="level is -6"):
        explain(level=-6, beside=[small])  # which the first model has
    assert not out.exists()


def test_no_readable_image_is_said_and_written(coupled: str, tmp_path: Path) -> None:
    result = chiasm.explain(model=coupled, images=[tmp_path / "none.png"], out=tmp_path / "out", device="cpu")
    assert isinstance(result.failures[0], ImageError)
    assert "none.png" in result.page.read_text(encoding="utf-8")
    assert result.measures is None


# ------------------------------------------------------------------------------------------------------------- pictures


def _explanation(**changes: object) -> Explanation:
    left, right = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    left[:, :3] = 1 / 24
    right[:, 5:] = 1 / 24
    given = {
        "source": "a.png",
        "size": (80, 160),
        "subject": "cat",
        "label": 0,
        "scores": {"conv": 0.75, "tokens": 0.5, "model": 0.6},
        "maps": {"conv/gradcam": left, "tokens/gradcam": right, "fused": (left + right) / 2},
        "region": (0, 0, 160, 80),
    }
    return Explanation(**(given | changes))  # type: ignore[arg-type]


def test_panels_show_each_branch_and_where_they_disagree() -> None:
    image = Image.new("RGB", (160, 80), (90, 90, 90))
    found = panels(image, _explanation(), side=320)
    assert [panel.heading for panel in found] == [
        "the image", "convolution branch", "Transformer branch", "both, fused", "where they disagree",
    ]  # fmt: skip
    assert all(panel.image.size == (320, 160) for panel in found)
    conv, tokens = np.asarray(found[1].image, int), np.asarray(found[2].image, int)
    assert conv[80, 20].sum() > tokens[80, 20].sum() + 100
    assert tokens[80, 300].sum() > conv[80, 300].sum() + 100
    disagree = np.asarray(found[4].image, int)
    assert disagree[80, 20, 0] > disagree[80, 20, 2] + 50  # orange: the first branch looks here
    assert disagree[80, 300, 2] > disagree[80, 300, 0] + 50  # blue: the second does
    assert found[0].lines == ("cat", "the model gives it 60%")
    assert found[1].lines[0] == "gives it 75%"
    assert found[4].lines == ("0% of where they look is shared",)
    nothing = replace(_explanation(), maps={"model/gradcam": np.zeros((4, 4), np.float32)}, scores={"model": 0.5})
    assert panels(image, nothing)[1].lines == ("nothing here speaks for it",)


def test_half_of_a_map_on_so_much_of_the_image() -> None:
    even = np.full((8, 8), 1 / 64, np.float32)
    one = _explanation(maps={"model/gradcam": even}, scores={"model": 1.0})
    assert panels(Image.new("RGB", (160, 80)), one)[1].lines == ("half of it on 50%",)


def test_a_small_object_is_shown_close_up() -> None:
    image = Image.new("RGB", (160, 80), "white")
    image.paste((255, 0, 0), (100, 40, 108, 48))
    hot = np.zeros((10, 20), np.float32)
    hot[5, 13] = 1  # the centre of this cell is at 108, 44
    one = _explanation(box=(100, 40, 108, 48), maps={"conv/gradcam": hot, "tokens/gradcam": hot, "fused": hot})
    picture, near = close_up(image, one, 320)
    assert picture.size == (320, 160)
    left, top, right, bottom = (round(side) for side in near.box or ())
    red = np.asarray(picture, int)[top + 2 : bottom - 2, left + 2 : right - 2]
    assert (red[..., 0] > 200).all()
    assert (red[..., 1] < 60).all()  # the box still lies on what it was about
    heat = near.over_image(hot)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(x - right) < 8
    assert abs(y - (top + bottom) / 2) < 8
    large = _explanation(box=(10, 10, 150, 70))
    assert close_up(image, large, 320)[1].box == pytest.approx((20, 20, 300, 140))
    corner = close_up(image, _explanation(box=(0, 0, 6, 3)), 320)[1]
    assert (corner.box or ())[:2] == (0, 0)  # cut at the image's edge


def test_a_sheet_holds_rows_of_any_width() -> None:
    found = panels(Image.new("RGB", (160, 80)), _explanation())
    rows = [Row(panels=found, caption="one"), Row(panels=found[:1])]
    picture = sheet(rows, title="犬 " * 200, branches=("conv", "tokens"))
    assert picture.width == 5 * 320 + 4 * 12 + 2 * 24
    small = sheet([Row(panels=[found[0]])], groups=[("model", 1)])
    assert small.width < picture.width
    assert small.height < picture.height


def test_strength_is_the_distance_from_the_average_place() -> None:
    features = np.zeros((2, 2, 2))
    features[:, 0, 0] = 3, 4  # the average place is 0.75, 1: this one is 3.75 away from it, the others 1.25
    np.testing.assert_allclose(strength(features), [[1, 0], [0, 0]])
    assert not strength(np.ones((3, 2, 2))).any()


def test_the_deepest_map_that_still_tells_places_apart() -> None:
    sizes = {"a": 32, "b": 14, "c": 7}
    stages = tuple(Stage(branch="conv", name=name, strength=np.zeros((n, n), np.float32)) for name, n in sizes.items())
    ground = _explanation(maps={})
    look = Look(ground=ground, canvas=(224, 224), answers=(), stages=stages)
    assert look.fine_stage("conv").name == "b"  # type: ignore[union-attr]
    assert replace(look, canvas=(1024, 1024)).fine_stage("conv").name == "c"  # type: ignore[union-attr]
    assert look.fine_stage("tokens") is None


def test_large_and_tiny_images(coupled: str, tmp_path: Path) -> None:
    paths = [_photo(tmp_path / "tiny.png", size=(2, 3)), _photo(tmp_path / "long.png", size=(20, 2400))]
    result = chiasm.explain(model=coupled, images=paths, out=tmp_path / "out", measures=False, device="cpu")
    over = [_arrays(image.arrays)["fused@image"].shape for image in result.images]
    assert over == [(2, 3), (13, 1600)]
    with Image.open(result.images[1].picture) as picture:
        assert picture.width < 2000


def test_small_pictures_are_enlarged_and_large_ones_made_smaller() -> None:
    assert shrunk(Image.new("RGB", (10, 5)), 320).size == (320, 160)
    assert shrunk(Image.new("L", (3000, 10)), 320).size == (320, 1)


# ------------------------------------------------------------------------------------------------------------- measured


def test_the_table_of_an_evaluation_is_whole_in_80_columns() -> None:
    def percent(mean: float) -> Estimate:
        return Estimate(mean=mean, low=mean - 0.01, high=min(mean + 0.01, 1.0), images=200)

    score = Score(value=percent(1.0), chance=percent(0.4321), gain=percent(0.5))
    names = ("conv/gradcam", "tokens/gradient_rollout")
    measured = Faithfulness(
        data="photos", split="val", images=200, unplaced=0, differences=(), notes=(), failures=(),
        maps=tuple(
            MapScores(name=name, coupled=coupled, localisation=score, deletion=score, insertion=score, curves={})
            for coupled in (True, False) for name in names
        ),
    )  # fmt: skip
    console = Console(width=80, record=True, file=StringIO())
    console.print(_evaluation_table(measured))
    told = console.export_text()
    assert "…" not in told
    for words in ("on objects", "even", "deletion", "insertion", "tokens/gradient_rollout", "exchanges off"):
        assert words in told
    assert told.count("99.0–100.0") == 4 * 3


def test_what_is_measured_stands_in_the_page_and_beside_it(photos: list[str], tmp_path: Path) -> None:
    data = "scenes:size=32,count=9,val=9"
    model, name = chiasm.create_model(NANO, num_classes=9), tmp_path / "scenes.safetensors"
    classes = open_data(data).classes
    save_model(
        name, model, ModelInfo(architecture=NANO, labels=classes, preprocess=preprocess_of(model, 32), data=data)
    )
    result = chiasm.explain(model=name, images=photos[:1], out=tmp_path / "out", device="cpu")
    assert result.measures is not None
    assert result.measures.images == 1
    measured = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert measured == {"generator": "chiasm explain"} | json.loads(json.dumps(result.measures.to_dict()))
    page = result.page.read_text(encoding="utf-8")
    assert "How far attention looks" in page
    assert "How alike the branches are" in page
    assert "at fewer places than there are channels" in page  # one image of 8 x 8 tokens
    many = tuple(replace(one, places=one.channels) for one in result.measures.similarities)
    assert "fewer places" not in str(measures_sections(replace(result.measures, similarities=many)))

    out = tmp_path / "evaluated"
    alone = chiasm.explain(model=name, evaluate=data, limit=1, out=out, device="cpu")
    assert not alone.explanations
    assert alone.evaluation is not None
    assert alone.evaluation.images == 1
    assert json.loads((out / "evaluation.json").read_text())["split"] == "val"
    assert "believed" in alone.page.read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"index.html", "evaluation.json"}
    assert "what the model says" not in alone.page.read_text(encoding="utf-8")  # no image was explained

    # What this run did not measure does not stay beside its page; what is not chiasm's does.
    (out / "measures.json").write_text("[]")
    chiasm.explain(model=name, images=photos[:1], measures=False, out=out, device="cpu")
    assert {path.name for path in out.glob("*.json")} == {"measures.json"}
