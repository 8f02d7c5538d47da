"""Samples of every kind of annotation: targets move with their image, and batches come out the same however read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.annotated import IGNORE, MapSplit, Objects, ObjectSplit
from chiasm.data.loader import TrainLoader, eval_loader, train_loader
from chiasm.data.maps import MaskReader
from chiasm.data.samples import Samples, eval_samples, train_samples
from chiasm.data.source import Split, open_data
from chiasm.data.views import ObjectTarget
from chiasm.engine.shards import own_padded_share, own_share
from chiasm.errors import DataError

PREPROCESS = Preprocess(size=(32, 40), mean=(0.5,) * 3, std=(0.25,) * 3)
HEIGHT, WIDTH, BROKEN = 30, 50, 2
TASKS = ("detect", "instances", "segment")


def scene(number: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A bright rectangle on black, and its left, top, right, bottom."""
    left, top = 4 + 3 * number, 3 + number
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[top : top + 14, left : left + 16] = 255
    return pixels, (left, top, left + 16, top + 14)


def make(root: Path, task: str, count: int = 7, broken: tuple[int, ...] = ()) -> Split:
    """Images with that rectangle as an object or as a class; of the broken ones the annotation does not fit."""
    images, objects, masks = [], [], []
    for number in range(count):
        pixels, (left, top, right, bottom) = scene(number)
        path = root / f"{number}.png"
        Image.fromarray(pixels).save(path)
        images.append(str(path))
        objects.append(
            Objects(
                image_id=number,
                height=HEIGHT + (number in broken),
                width=WIDTH,
                boxes=torch.tensor([[left, top, right, bottom]], dtype=torch.float32),
                labels=torch.tensor([number % 2]),
                crowd=torch.tensor([number == 0]),
                areas=torch.tensor([16.0 * 14]),
                outlines=([[left, top, right, top, right, bottom, left, bottom]],),
            )
        )
        mask = root / f"{number}_mask.png"
        Image.fromarray((pixels[:, :, 0] > 0).astype(np.uint8)).save(mask)
        if number in broken:
            mask.write_bytes(mask.read_bytes()[:30])
        masks.append(str(mask))
    return MapSplit(images, masks, MaskReader([0, 1])) if task == "segment" else ObjectSplit(images, objects)


def settings(task: str, **options: Any) -> TrainConfig:
    return TrainConfig.from_flags(data="x", task=task, **options)


def flat(targets: Any) -> list[Tensor]:
    """All tensors of a batch's targets."""
    if isinstance(targets, Tensor):
        return [targets]
    found = [(t.boxes, t.labels, t.crowd, *(() if t.masks is None else (t.masks,))) for t in targets]
    return [tensor for tensors in found for tensor in tensors]


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    pairs = [(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(flat(x[1]), flat(y[1]), strict=True)]
    return all(torch.equal(p, q) for p, q in pairs + [(x[0], y[0]) for x, y in zip(a, b, strict=True)])


def assert_on_the_rectangle(image: Tensor, target: Any) -> None:
    """What is bright in the picture is what the target says, but for pixels that interpolation mixed."""
    bright = image.mean(0) > 0.5  # 0 where there is no image, 2 within the rectangle, -2 around it
    if isinstance(target, Tensor):
        known = target != IGNORE
        assert (bright == (target == 1))[known].float().mean() > 0.93
        assert not bright[~known].any()
        return
    assert isinstance(target, ObjectTarget)
    rows, columns = bright.nonzero(as_tuple=True)
    if not len(target.boxes):
        assert len(rows) < 60  # it has left the canvas, or nearly
        return
    edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (edges - target.boxes[0]).abs().max() <= 1.6
    if target.masks is not None:
        assert (target.masks[0] == bright).float().mean() > 0.93


@pytest.mark.parametrize("task", TASKS)
def test_targets_move_with_their_image(task: str, tmp_path: Path) -> None:
    split = make(tmp_path, task)
    loader = train_loader(train_samples(split, settings(task, color_jitter=0.0), PREPROCESS), batch_size=7, workers=0)
    places = set()
    for epoch in range(8):
        loader.set_epoch(epoch)
        ((images, targets),) = list(loader)
        assert images.shape == (7, 3, 32, 40)
        assert images.dtype == torch.float32
        if task == "segment":
            assert targets.shape == (7, 32, 40)
            assert targets.dtype == torch.int64
        else:
            places |= {target.placement for target in targets}
            assert all((target.masks is not None) == (task == "instances") for target in targets)
        for image, target in zip(images, targets, strict=True):
            assert_on_the_rectangle(image, target)
    if places:
        assert {place.mirrored for place in places} == {True, False}
        assert len(places) > 50
        widths = [place.resized[1] / 40 for place in places]
        assert min(widths) < 0.7
        assert max(widths) > 1.7


@pytest.mark.parametrize("task", TASKS)
def test_the_same_batches_however_they_are_read(task: str, tmp_path: Path) -> None:
    samples = train_samples(make(tmp_path, task), settings(task), PREPROCESS)

    def epoch(**how: Any) -> list[tuple[Any, ...]]:
        loader: TrainLoader = train_loader(samples, batch_size=3, seed=4, **how)
        loader.set_epoch(2)
        return list(loader)

    expected = epoch(workers=0, cache=False)
    assert len(expected) == 2
    assert same(epoch(workers=2, cache=True), expected)
    assert same(epoch(workers=0, cache=True), expected)
    loader = train_loader(samples, batch_size=3, seed=4, workers=1, cache=False)
    loader.load_state_dict({"epoch": 2, "batch": 1})
    assert same(list(loader), expected[1:])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_shows_the_whole_image_in_order(task: str, cache: bool, tmp_path: Path) -> None:
    loader = eval_loader(eval_samples(make(tmp_path, task), task, PREPROCESS), batch_size=4, workers=0, cache=cache)
    batches = list(loader)
    assert torch.cat([indices for *_, indices in batches]).tolist() == list(range(7))
    for images, targets, indices in batches:
        for image, target, index in zip(images, targets, indices.tolist(), strict=True):
            assert_on_the_rectangle(image, target)
            if not isinstance(target, Tensor):
                told = target.placement.to_original(target.boxes)[0]
                assert (told - torch.tensor(scene(index)[1])).abs().max() < 1e-3
                assert (target.labels.tolist(), target.crowd.tolist()) == ([index % 2], [index == 0])


@pytest.mark.parametrize(("workers", "cache"), [(0, True), (0, False), (1, False)])
@pytest.mark.parametrize("task", TASKS)
def test_an_annotation_that_cannot_be_read_is_left_out(task: str, workers: int, cache: bool, tmp_path: Path) -> None:
    split = make(tmp_path, task, broken=(BROKEN,))
    named = str(tmp_path / (f"{BROKEN}_mask.png" if task == "segment" else f"{BROKEN}.png"))
    valid = eval_loader(eval_samples(split, task, PREPROCESS), batch_size=3, workers=workers, cache=cache)
    batches = list(valid)
    assert torch.cat([indices for *_, indices in batches]).tolist() == [0, 1, 3, 4, 5, 6]
    assert [len(targets) for _, targets, _ in batches] == [2, 3, 1]
    assert [error.path for error in valid.failures] == [named]
    train = train_loader(
        train_samples(split, settings(task), PREPROCESS), batch_size=7, workers=workers, cache=cache, drop_last=False
    )
    ((images, targets),) = list(train)
    assert len(images) == len(targets) == 7  # the next readable one takes its place
    assert [error.path for error in train.failures] == [named]


@pytest.mark.parametrize("task", TASKS)
def test_when_none_can_be_read_it_is_said_in_one_line(task: str, tmp_path: Path) -> None:
    split = make(tmp_path, task, count=3, broken=(0, 1, 2))
    loader = train_loader(train_samples(split, settings(task), PREPROCESS), batch_size=2, workers=0)
    with pytest.raises(DataError, match=r"^none of the 3 training images can be read; the first: .*png: ") as told:
        list(loader)
    assert "\n" not in str(told.value)
    assert list(eval_loader(eval_samples(split, task, PREPROCESS), batch_size=2, workers=0)) == []


@pytest.mark.parametrize("data", ["files", "scenes"])
@pytest.mark.parametrize("task", TASKS)
def test_processes_share_a_split(task: str, data: str, tmp_path: Path) -> None:
    """Three processes with ten images: three each to train on, four to validate of which some repeat one."""
    if data == "files":
        split = make(tmp_path, task, count=10)
    else:
        split = open_data("scenes:size=32,count=10,val=2", task=task).split("train")
    seen = []
    for rank in range(3):
        mine = eval_samples(own_share(split, rank, 3), task, PREPROCESS)
        assert len(next(iter(eval_loader(mine, batch_size=9, workers=0)))[0]) == 3
        part, real = own_padded_share(split, rank, 3)
        (images, targets, indices), *_ = eval_loader(eval_samples(part, task, PREPROCESS), batch_size=9, workers=0)
        assert len(images) == len(targets) == 4
        seen += [part.sources[i] for i in indices.tolist() if i < real]
    assert sorted(seen) == sorted(split.sources)


def test_a_split_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ObjectSplit are not annotated for 'segment'"):
        train_samples(make(tmp_path, "detect"), settings("segment"), PREPROCESS)
    with pytest.raises(DataError, match="MapSplit are not annotated for 'instances'"):
        eval_samples(make(tmp_path, "segment"), "instances", PREPROCESS)


@pytest.mark.parametrize(("task", "name"), [("instances", "coco_mini"), ("detect", "bccd_coco"), ("segment", "camvid")])
def test_real_annotations(task: str, name: str, shared_data: Path) -> None:
    data = open_data(str(shared_data / name), task=task)
    preprocess = Preprocess(size=(128, 128))
    split = data.splits["train"].subset(range(4))
    samples: Samples = train_samples(split, settings(task), preprocess)
    ((images, targets),) = list(train_loader(samples, batch_size=4, workers=0, cache=False))
    assert images.shape == (4, 3, 128, 128)
    if task == "segment":
        assert set(targets.unique().tolist()) <= {*range(len(data.classes)), IGNORE}
        assert len(targets.unique()) > 4
    else:
        assert sum(len(target.boxes) for target in targets) > 4
        assert all((target.masks is not None) == (task == "instances") for target in targets)
