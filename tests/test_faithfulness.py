"""Deletion, insertion and localisation against slow twins and maps whose worth is known; then on real models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap
from torch import Tensor

from chiasm.config import Preprocess
from chiasm.data import ImageData, open_data
from chiasm.data.annotated import Objects
from chiasm.data.scenes import SceneSplit
from chiasm.errors import ChiasmError, DataError
from chiasm.explaining import ground_truth
from chiasm.explaining.explainer import Explainer
from chiasm.explaining.faithfulness import (
    FEWEST,
    Faithfulness,
    area,
    estimate,
    evaluate_explanations,
    localisation,
    perturbation_curves,
)
from chiasm.explaining.ground_truth import object_pixels, open_truth
from chiasm.model_file import ModelInfo
from chiasm.models import create_model
from chiasm.models.heads import with_head
from chiasm.report.explanation_measures import faithfulness_sections
from chiasm.results import Explanation
from chiasm.results.masks import encode_mask

# ----------------------------------------------------------------------------------------------- deletion and insertion


def reader_of(where: np.ndarray) -> torch.nn.Module:
    """A linear classifier of two classes that reads some pixels of an image of 16 x 16 and nothing else."""
    linear = torch.nn.Linear(3 * 16 * 16, 2)
    with torch.no_grad():
        linear.bias.zero_()
        linear.weight.copy_(torch.from_numpy(np.stack([where, -where])[:, None].repeat(3, 1)).flatten(1))
    return torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Softmax(1)).requires_grad_(False)


@pytest.fixture
def seen() -> tuple[torch.nn.Module, Tensor, np.ndarray]:
    """Such a classifier, a canvas that is bright where it reads, and the map of what it reads."""
    where = np.zeros((16, 16), np.float32)
    where[3:7, 9:13] = 0.1
    canvas = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    canvas[..., 3:7, 9:13] += 1
    return reader_of(where), canvas, where


def test_the_map_of_what_is_read_is_the_best(seen: tuple[torch.nn.Module, Tensor, np.ndarray]) -> None:
    network, canvas, where = seen
    rng = np.random.default_rng(0)
    maps = [where, *rng.random((50, 16, 16), dtype=np.float32), *rng.random((50, 4, 4), dtype=np.float32), -where]
    deletion, insertion = (
        area(curves[:, 0]) for curves in perturbation_curves(network, canvas, maps, rng=np.random.default_rng(1))
    )
    assert deletion[0] < deletion[1:].min()
    assert insertion[0] > insertion[1:].max()
    assert deletion[-1] == deletion.max()
    assert insertion[-1] == insertion.min()


def test_curves_equal_a_slow_twin(seen: tuple[torch.nn.Module, Tensor, np.ndarray]) -> None:
    """Canvas by canvas, pixel by pixel, for a map at its own resolution."""
    network, canvas, _ = seen
    values = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    steps = 5
    deletion, insertion = perturbation_curves(network, canvas, [values], steps=steps, rng=np.random.default_rng(0))
    assert deletion.shape == insertion.shape == (1, 2, steps + 1)
    order = sorted(((r, c) for r in range(16) for c in range(16)), key=lambda place: -values[place])
    gone = canvas.clone()
    mean = canvas.mean((2, 3))[0]
    for k in range(steps + 1):
        for row, column in order[: int(np.ceil(k / steps * 256))]:
            gone[0, :, row, column] = mean
        assert deletion[0, :, k] == pytest.approx(network(gone)[0].numpy(), abs=1e-6)
    assert insertion[0, :, -1] == pytest.approx(network(canvas)[0].numpy(), abs=1e-6)
    assert insertion[0, 0, 0] < insertion[0, 0, -1]  # blurred, what is read is darker


def test_equal_pixels_go_in_random_order(seen: tuple[torch.nn.Module, Tensor, np.ndarray]) -> None:
    """A map of nothing is a random one, not one that reads from the top left."""
    network, canvas, _ = seen
    flat = [np.zeros((16, 16), np.float32)] * 40
    deletion, _ = perturbation_curves(network, canvas, flat, steps=4, rng=np.random.default_rng(0))
    middle = deletion[:, 0, 2]  # half of the pixels are gone
    assert middle.std() > 0
    expected = float(network(0.5 * canvas + 0.5 * canvas.mean((2, 3), keepdim=True))[0, 0])
    assert middle.mean() == pytest.approx(expected, abs=0.05)


def test_areas() -> None:
    assert area(np.array([1.0, 0.5, 0.0])) == pytest.approx(0.5)
    assert area(np.array([[0.3, 0.3, 0.3, 0.3], [0, 0, 0, 1]])) == pytest.approx([0.3, 1 / 6])


# ------------------------------------------------------------------------------------------------------------ estimates


def test_an_interval_is_that_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2, size=60)
    found = estimate(values.tolist())
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert found.images == 60
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.06 * width)
    assert estimate(values.tolist()) == found  # the same again
    few = estimate([1.0] * (FEWEST - 1))
    assert few.mean == 1
    assert few.low is None
    assert few.high is None
    with pytest.raises(ValueError, match="nothing"):
        estimate([])


# --------------------------------------------------------------------------------------------------------- localisation


def explanation(values: np.ndarray, **changes: object) -> Explanation:
    given = {
        "source": "a.jpg",
        "size": (40, 80),
        "subject": "cat",
        "label": 0,
        "scores": {"model": 0.5},
        "maps": {"model/gradcam": values},
        "region": (0, 0, 80, 40),
    }
    return Explanation(**(given | changes))  # type: ignore[arg-type]


def test_localisation_is_the_share_on_the_object() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 80)) < 0.3
    for shape in ((1, 1), (4, 8), (40, 80)):
        uniform = np.ones(shape, np.float32)
        assert localisation(explanation(uniform), uniform, mask) == pytest.approx(mask.mean(), rel=1e-6)
        assert localisation(explanation(uniform), 0 * uniform, mask) == pytest.approx(mask.mean(), rel=1e-6)
    exact = mask.astype(np.float32)
    assert localisation(explanation(exact), exact, mask) == pytest.approx(1)
    assert localisation(explanation(exact), 1 - exact, mask) == pytest.approx(0)
    values = rng.random((40, 80), dtype=np.float32)
    assert localisation(explanation(values), values, mask) == pytest.approx(values[mask].sum() / values.sum(), rel=1e-5)


def test_localisation_counts_what_the_network_saw() -> None:
    """Of an image that is cut to its middle, chance is the object's share of the middle."""
    uniform, mask = np.ones((4, 4), np.float32), np.zeros((40, 80), bool)
    mask[:, :40] = True
    cut = explanation(uniform, region=(30, 0, 70, 40))
    assert localisation(cut, uniform, mask) == pytest.approx(0.25)
    beside = np.zeros((4, 8), np.float32)
    beside[0] = 1
    wide = explanation(uniform, region=(0, -40, 80, 80))  # on a larger canvas, and looking at what is not the image
    assert localisation(wide, beside, mask) == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------- where objects are


def some_objects(*, masks: bool) -> Objects:
    boxes = torch.tensor([[2.0, 3, 6, 9], [10, 10, 20, 18]])
    whole = np.zeros((2, 20, 30), bool)
    whole[0, 4:8, 3:5] = True
    whole[1, 10:18, 10:20] = True
    return Objects(
        image_id=1,
        height=20,
        width=30,
        boxes=boxes,
        labels=torch.tensor([0, 1]),
        crowd=torch.tensor([False, True]),
        areas=torch.tensor([8.0, 80.0]),
        outlines=tuple(map(encode_mask, whole)) if masks else (),
    )


def test_pixels_of_objects() -> None:
    both = object_pixels(some_objects(masks=True))
    assert both is not None
    assert both.sum() == 88
    assert both[4, 3]
    assert both[17, 19]
    assert not both[3, 2]
    boxes = object_pixels(some_objects(masks=False))
    assert boxes is not None
    assert boxes.sum() == 24 + 80
    assert boxes[3, 2]
    assert not boxes[9, 2]


def test_a_found_box_is_of_the_object_it_overlaps_most() -> None:
    objects = some_objects(masks=True)
    first, second = object_pixels(objects, (2, 3, 7, 9)), object_pixels(objects, (10, 10, 21, 17))
    assert first is not None
    assert first.sum() == 8
    assert second is not None
    assert second.sum() == 80
    assert object_pixels(objects, (0, 0, 30, 20)) is None  # most of it is neither
    nothing = replace(
        objects, boxes=torch.zeros(0, 4), labels=objects.labels[:0], crowd=objects.crowd[:0], areas=objects.areas[:0],
        outlines=(),
    )  # fmt: skip
    assert object_pixels(nothing) is None
    assert object_pixels(nothing, (0, 0, 5, 5)) is None


def info_of(task: str, *labels: str) -> ModelInfo:
    return ModelInfo(
        architecture="conformer_nano_patch8_64", task=task, labels=labels, preprocess=Preprocess(size=(64, 64))
    )


def test_scenes_tell_a_classifier_where_their_objects_are() -> None:
    truth = open_truth("scenes:val=4,count=9", "val", info_of("classify", "striped-row", "other"))
    split = open_data("scenes:val=4,count=9").split("val")
    assert isinstance(split, SceneSplit)
    assert truth.located
    assert truth.split.sources == split.sources
    pixels, where = truth.read(2)
    scene = split.scene(2)
    assert torch.equal(pixels, scene.image)
    found = where(explanation(np.ones((1, 1), np.float32), size=(64, 64)))
    assert found is not None
    assert np.array_equal(found, scene.semantic.numpy() > 0)
    assert not any("other classes" in note for note in truth.notes)  # one is known


def test_class_maps_are_pixels_of_a_class_or_not_background(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    values = np.zeros((8, 10), np.uint8)
    values[:3], values[3:5] = 1, 2
    for i in range(5):
        Image.new("RGB", (10, 8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(values).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "classes.txt").write_text("background\nroad\nsky\n")
    of_class = explanation(np.ones((1, 1), np.float32), size=(8, 10), region=(0, 0, 10, 8), label=1)

    segmenter = open_truth(str(tmp_path), "val", info_of("segment", "background", "sky", "tree"))
    found = segmenter.read(0)[1](of_class)
    assert segmenter.located
    assert found is not None
    assert np.array_equal(found, values == 2)
    assert segmenter.read(0)[1](replace(of_class, label=2)) is None
    classifier = open_truth(str(tmp_path), "val", info_of("classify", "cat", "dog"))
    found = classifier.read(0)[1](of_class)
    assert found is not None
    assert np.array_equal(found, values > 0)
    assert any("other classes than the model" in note for note in classifier.notes)

    with pytest.raises(DataError, match=r"none of its classes \(background, road, sky\)"):
        open_truth(str(tmp_path), "val", info_of("segment", "tree"))
    with pytest.raises(DataError, match="without objects, and the model is for 'detect'"):
        open_truth(str(tmp_path), "val", info_of("detect", "cat"))
    with pytest.raises(DataError, match="no split 'test'"):
        open_truth(str(tmp_path), "test", info_of("classify", "cat"))
    (tmp_path / "classes.txt").write_text("field\nroad\nsky\n")
    no_ground = open_truth(str(tmp_path), "val", info_of("classify", "cat", "dog"))
    assert not no_ground.located
    assert no_ground.read(0)[1](of_class) is None


def test_boxes_stand_for_objects_without_masks(shared_data: Path) -> None:
    truth = open_truth(str(shared_data / "bccd_coco"), "val", info_of("detect", "RBC"))
    assert truth.located
    assert any("boxes without masks" in note for note in truth.notes)


# ---------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    torch.manual_seed(0)
    model = create_model("conformer_nano_patch8_64", num_classes=9)
    data = open_data("scenes:count=9")
    return Explainer(model, replace(info_of("classify", *data.classes), trained=False), device="cpu")


@pytest.fixture(scope="module")
def measured(explainer: Explainer) -> Faithfulness:
    return evaluate_explanations(explainer, "scenes:val=40,count=9", limit=3, steps=4)


def test_a_classifiers_maps_are_measured(explainer: Explainer, measured: Faithfulness) -> None:
    assert measured.images == 3
    assert measured.unplaced == 0
    assert measured.split == "val"
    names = list(explainer.explain(torch.zeros(3, 64, 64, dtype=torch.uint8), "black")[0].maps)
    assert [(scores.name, scores.coupled) for scores in measured.maps] == [
        (n, on) for on in (True, False) for n in names
    ]
    split = open_data("scenes:val=40,count=9").split("val")
    assert isinstance(split, SceneSplit)
    share = np.mean([split.scene(i).masks.any(0).double().mean() for i in (0, 20, 39)])  # evenly spaced
    for scores in measured.maps:
        assert scores.localisation is not None
        assert scores.deletion is not None
        assert scores.insertion is not None
        assert scores.localisation.chance.mean == pytest.approx(share, rel=1e-6)
        for score, sign in ((scores.localisation, 1), (scores.deletion, -1), (scores.insertion, 1)):
            assert score.gain.mean == pytest.approx(sign * (score.value.mean - score.chance.mean), abs=1e-12)
            assert score.value.images == 3
        for kind, score in (("deletion", scores.deletion), ("insertion", scores.insertion)):
            assert len(scores.curves[kind]) == 5
            assert area(np.array(scores.curves[kind])) == pytest.approx(score.value.mean)
            assert area(np.array(scores.curves[f"random {kind}"])) == pytest.approx(score.chance.mean)
        assert scores.curves["deletion"][0] == pytest.approx(scores.curves["insertion"][-1])  # the image as it is
    assert "random" in " ".join(measured.notes)  # the weights


def test_a_branchs_map_is_held_against_its_own_head(explainer: Explainer, measured: Faithfulness) -> None:
    split = open_data("scenes:val=40,count=9").split("val")
    start: dict[str, list[float]] = {"conv": [], "tokens": [], "model": []}
    for i in (0, 20, 39):
        (found,) = explainer.explain(split.read(i), "scene")
        for name, values in start.items():
            values.append(found.scores[name])
    for scores in measured.maps:
        if scores.coupled:
            expected = np.mean(start.get(scores.name.partition("/")[0], start["model"]))
            assert scores.curves["deletion"][0] == pytest.approx(expected, abs=1e-4)


def test_differences_are_paired(measured: Faithfulness) -> None:
    by_key = {(scores.name, scores.coupled): scores for scores in measured.maps}
    assert [difference.name for difference in measured.differences] == [s.name for s in measured.maps if s.coupled]
    for difference in measured.differences:
        on, off = (by_key[difference.name, coupled] for coupled in (True, False))
        for kind in ("localisation", "deletion", "insertion"):
            expected = getattr(on, kind).gain.mean - getattr(off, kind).gain.mean
            assert getattr(difference, kind).mean == pytest.approx(expected, abs=1e-12)


def test_the_numbers_are_plain_and_the_same_again(explainer: Explainer, measured: Faithfulness) -> None:
    told = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert told["maps"][0]["localisation"]["value"]["mean"] == measured.maps[0].localisation.value.mean  # type: ignore[union-attr]
    spec = "scenes:val=40,count=9"
    named, opened = (evaluate_explanations(explainer, data, limit=1, steps=2) for data in (spec, open_data(spec)))
    for one, other in zip(named.maps, opened.maps, strict=True):
        for kind in ("localisation", "deletion", "insertion"):  # up to the rounding of the network's own sums
            assert getattr(one, kind).value.mean == pytest.approx(getattr(other, kind).value.mean, abs=1e-6)
            assert getattr(one, kind).chance.mean == pytest.approx(getattr(other, kind).chance.mean, abs=1e-6)
    page = "".join(piece for _, pieces in faithfulness_sections(measured) for piece in pieces)
    assert page.count("<svg") == 2
    assert "conv/gradcam" in page
    assert "exchanges off" in page


def test_images_that_cannot_be_read_are_named(explainer: Explainer, tmp_path: Path) -> None:
    """Classes alone tell no places: the curves are what is left."""
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "white").save(tmp_path / "val" / name / "sound.png")
    (tmp_path / "val" / "dog" / "broken.png").write_bytes(b"no image")
    ticks: list[tuple[int, int]] = []
    found = evaluate_explanations(
        explainer, str(tmp_path), steps=2, tick=lambda done, total: ticks.append((done, total))
    )
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    assert found.images == 2
    assert [Path(error.path).name for error in found.failures] == ["broken.png"]
    assert found.unplaced is None
    assert all(scores.localisation is None for scores in found.maps)
    assert any("does not say where its objects are" in note for note in found.notes)
    page = "".join(piece for _, pieces in faithfulness_sections(found) for piece in pieces)
    assert page.count("<svg") == 1
    assert "broken.png" in page
    for sound in tmp_path.rglob("sound.png"):
        sound.write_bytes(b"no image either")
    with pytest.raises(DataError, match="none of the 3 images can be read; the first: "):
        evaluate_explanations(explainer, str(tmp_path))


@pytest.mark.parametrize("setting", ["limit", "steps"])
def test_settings_out_of_range_are_refused(explainer: Explainer, setting: str) -> None:
    with pytest.raises(ChiasmError, match=f"{setting} is 0: expected 1 or more"):
        evaluate_explanations(explainer, "scenes", **{setting: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(("task", "head"), [("segment", "fpn"), ("detect", "fcos")])
def test_detectors_and_segmenters_have_places_alone(task: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "MATCH", 0.0)  # random weights find nothing by chance
    torch.manual_seed(0)
    labels = (
        ("background", "striped", "checked", "speckled") if task == "segment" else ("striped", "checked", "speckled")
    )
    name = "conformer_nano_patch8_64"
    model = with_head(create_model(name, num_classes=0), len(labels), task=task, architecture=name, name=head)
    found = evaluate_explanations(Explainer(model, info_of(task, *labels), device="cpu"), "scenes:val=2,count=9")
    assert found.images == 2
    assert found.unplaced is not None
    for scores in found.maps:
        assert scores.deletion is None
        assert scores.insertion is None
        assert not scores.curves
        assert scores.localisation is not None
        assert 0 <= scores.localisation.value.mean <= 1
    json.dumps(found.to_dict(), allow_nan=False)
    assert faithfulness_sections(found)


def test_data_without_images_is_refused(explainer: Explainer) -> None:
    data = open_data("scenes:count=9")
    empty = ImageData(name="none", classes=data.classes, splits={"val": data.split("val").subset([])})
    with pytest.raises(DataError, match="none: no images in its split 'val'"):
        evaluate_explanations(explainer, empty)


def test_a_page_says_that_there_is_nothing(measured: Faithfulness) -> None:
    """As of a detector that finds nothing."""
    nothing = replace(measured, maps=(), differences=(), unplaced=2)
    page = "".join(piece for _, pieces in faithfulness_sections(nothing) for piece in pieces)
    assert "Nothing could be measured" in page
    assert "2 explanations had no object to lie on" in page
    assert "<svg" not in page
