"""The built-in images: pure functions of seed and index, consistent, and solvable only by texture and arrangement."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from chiasm.data import open_data
from chiasm.data.scenes import ARRANGEMENTS, TEXTURES, SceneSplit


def make(count: int = 60, size: int = 64, seed: int = 0, textures: int = 4, arrangements: int = 4) -> SceneSplit:
    split = open_data(f"scenes:size={size},count={count},seed={seed},textures={textures},arrangements={arrangements}")
    assert isinstance(split.splits["train"], SceneSplit)
    return split.splits["train"]


def test_options_and_names() -> None:
    data = open_data("scenes:size=48,count=20,val=7,seed=3")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 20, "val": 7}
    assert data.classes[0] == "striped-row"
    assert len(set(data.classes)) == 9
    assert data.splits["val"].read(6).shape == (3, 48, 48)
    assert data.problems == data.notes == ()


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    data, longer = open_data("scenes:count=20"), open_data("scenes:count=4000,val=20")
    train = data.splits["train"]
    image = train.read(13)
    train.read(2)
    assert torch.equal(train.read(13), image)
    assert torch.equal(longer.splits["train"].read(13), image)
    assert not torch.equal(data.splits["val"].read(13), image)
    assert not torch.equal(open_data("scenes:seed=1").splits["train"].read(13), image)


@pytest.mark.parametrize("size", [32, 64, 75, 160])
def test_boxes_masks_and_map_agree(size: int) -> None:
    split = make(count=48, size=size)
    for index in range(48):
        scene = split.scene(index)
        count = len(scene.boxes)
        assert count in (4, 5)
        assert scene.image.shape == (3, size, size)
        assert scene.image.dtype == torch.uint8
        assert scene.masks.shape == (count, size, size)
        assert scene.masks.sum(0).max() == 1  # they do not overlap
        assert (scene.label, scene.label) == (split.labels[index], scene.texture * 4 + scene.arrangement)
        assert torch.equal(scene.semantic, scene.masks.any(0) * torch.tensor(1 + scene.texture, dtype=torch.uint8))
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = torch.where(mask)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [int(value) for value in extent]


def test_the_objects_are_where_the_masks_say() -> None:
    """Inside the masks the image varies from pixel to pixel (texture), outside it is smooth but for clutter."""
    split = make(count=32, size=96)
    for index in range(32):
        scene = split.scene(index)
        grey = scene.image.float().mean(0)
        steps = (grey[1:] - grey[:-1]).abs()[:, :-1] + (grey[:, 1:] - grey[:, :-1]).abs()[:-1]
        inside = scene.masks.any(0)[:-1, :-1]
        assert steps[inside].mean() > 1.5 * steps[~inside].mean()


def nearest_centre(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class of the nearest class mean, on features scaled to unit deviation."""
    scale = train.std(0) + 1e-6
    centres = np.stack([train[labels == label].mean(0) / scale for label in np.unique(labels)])
    return np.unique(labels)[((test[:, None] / scale - centres) ** 2).sum(-1).argmin(1)]


def places(split: SceneSplit) -> np.ndarray:
    """What the arrangement says: the spread of the objects' centres, no pixel looked at."""
    features = []
    for index in range(len(split)):
        boxes = split.scene(index).boxes.numpy()
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        (xx, xy), (_, yy) = np.cov(centres.T) / split.size**2
        features.append([xx, yy, abs(xy)])
    return np.array(features)


def surfaces(split: SceneSplit) -> np.ndarray:
    """What the texture says: how alike pixels at small distances are within one object, no place looked at."""
    features = []
    for index in range(len(split)):
        scene = split.scene(index)
        grey = scene.image.float().mean(0).numpy()
        rows = []
        for mask in scene.masks.numpy():
            values = np.where(mask, (grey - grey[mask].mean()) / (grey[mask].std() + 1e-6), 0)
            spectrum = np.abs(np.fft.fft2(values))
            ordered = np.sort(spectrum.ravel())[::-1]
            cubes = (values[mask] ** 3).mean()
            rows.append([*(ordered[[0, 2, 4, 6, 12, 24, 48]] / np.sqrt((ordered**2).sum())), abs(cubes)])
        features.append(np.mean(rows, axis=0))
    return np.array(features)


def test_neither_texture_nor_arrangement_is_enough() -> None:
    """Objects' places tell the arrangement and nothing of the texture; their surfaces the reverse: so either one alone
    is right about the class as often as guessing the other factor allows, and both together nearly always are."""
    train, test = (
        make(count=360, seed=1, textures=3, arrangements=3),
        make(count=360, seed=2, textures=3, arrangements=3),
    )
    truth = {}
    for name, split in (("train", train), ("test", test)):
        labels = np.array(split.labels)
        assert (np.bincount(labels) == 40).all()  # each pair equally often: the factors are independent
        truth[name] = {"texture": labels // 3, "arrangement": labels % 3}
    features = {"places": (places(train), places(test)), "surfaces": (surfaces(train), surfaces(test))}
    right = {
        (seen, factor): (nearest_centre(known, truth["train"][factor], new) == truth["test"][factor]).mean()
        for seen, (known, new) in features.items()
        for factor in ("texture", "arrangement")
    }
    # 360 draws at chance 1/3: three deviations are 0.075.
    assert right["places", "arrangement"] > 0.95
    assert abs(right["places", "texture"] - 1 / 3) < 0.1
    assert right["surfaces", "texture"] > 0.75
    assert abs(right["surfaces", "arrangement"] - 1 / 3) < 0.1


def test_every_texture_and_arrangement_is_drawn_and_differs() -> None:
    split = make(count=16)
    seen = {(scene.texture, scene.arrangement) for scene in map(split.scene, range(16))}
    assert seen == {(t, a) for t in range(len(TEXTURES)) for a in range(len(ARRANGEMENTS))}


def test_textures_are_equally_bright_and_colourful() -> None:
    """The mean colour of the objects says nothing of the texture: its share of the variance is small."""
    split = make(count=400, arrangements=2)
    means = np.array([[scene.image[:, scene.masks.any(0)].float().mean()] for scene in map(split.scene, range(400))])
    labels = np.array(split.labels) // 2
    between = np.var([means[labels == t].mean() for t in range(3)])
    assert between < 0.05 * means.var()


def test_fast_enough_to_make_while_training() -> None:
    split = make(count=100, size=64)
    split.read(0)
    start = time.process_time()
    for index in range(100):
        split.read(index)
    assert 100 / (time.process_time() - start) > 250  # images per second of CPU; about 1,500 on an idle core
