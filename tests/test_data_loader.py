"""Batches are a function of (seed, epoch, index): not of workers, memory or where a run stopped."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from chiasm.config import Preprocess, TrainConfig
from chiasm.data import Split, open_data
from chiasm.data.cache import ImageCache, fill_cache
from chiasm.data.loader import TrainLoader, eval_loader, train_loader
from chiasm.data.samples import LabelledSamples
from chiasm.data.transforms import eval_transform, train_transform
from chiasm.errors import DataError

PREPROCESS = Preprocess(size=(24, 24))


@pytest.fixture(scope="module")
def split() -> Split:
    return open_data("scenes:size=64,count=50,val=10,seed=3").splits["train"]


def make(split: Split, *, seed: int = 5, workers: int = 0, cache: bool = False, batch_size: int = 8) -> TrainLoader:
    samples = LabelledSamples(split, train_transform(TrainConfig(data="x"), PREPROCESS))
    return train_loader(samples, batch_size=batch_size, seed=seed, workers=workers, cache=cache)


def epoch(loader: TrainLoader, number: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(number, start=start)
    return list(loader)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize(("workers", "cache"), [(0, True), (2, False), (2, True)])
def test_the_same_batches_however_they_are_read(split: Split, workers: int, cache: bool) -> None:
    expected = epoch(make(split), 1)
    assert same(epoch(make(split, workers=workers, cache=cache), 1), expected)
    images, labels = expected[0]
    assert images.shape == (8, 3, 24, 24)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_epochs_and_seeds_differ(split: Split) -> None:
    loader = make(split)
    first = epoch(loader, 0)
    assert not same(first, epoch(loader, 1))
    assert not same(first, epoch(make(split, seed=6), 0))
    assert same(first, epoch(loader, 0))


def test_an_image_is_augmented_anew_in_every_epoch(split: Split) -> None:
    loader = make(split.subset([7]), batch_size=1)
    assert not torch.equal(epoch(loader, 0)[0][0], epoch(loader, 1)[0][0])


def test_the_augmentation_does_not_depend_on_the_place_in_the_batch(split: Split) -> None:
    wide, narrow = make(split, batch_size=16), make(split, batch_size=4)
    a = torch.cat([images for images, _ in epoch(wide, 2)])
    b = torch.cat([images for images, _ in epoch(narrow, 2)])
    assert torch.equal(a, b[: len(a)])


@pytest.mark.parametrize(("workers", "stop"), [(0, 0), (0, 1), (0, 4), (0, 6), (2, 4)])
def test_resume_in_the_middle_is_exact(split: Split, workers: int, stop: int) -> None:
    whole = epoch(make(split), 3)
    interrupted = make(split, workers=workers)
    interrupted.set_epoch(3)
    before = list(islice(interrupted, stop))
    state = interrupted.state_dict()
    assert state == {"epoch": 3, "batch": stop}

    resumed = make(split, workers=workers)
    resumed.load_state_dict(state)
    after = list(resumed)
    assert same(before + after, whole)
    assert same(epoch(resumed, 4), epoch(make(split), 4))


def test_torchs_generator_is_left_alone(split: Split) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    for workers in (0, 2):
        torch.manual_seed(11)
        epoch(make(split, workers=workers), 0)
        assert torch.equal(torch.rand(3), expected)


def test_every_image_once_per_epoch(split: Split) -> None:
    loader = make(split)
    assert sorted(loader.order(0)) == list(range(50))
    assert loader.order(0) != loader.order(1)


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, True, [4, 4]),
        (10, 4, False, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (3, 4, True, [3]),
        (1, 4, False, [1]),
    ],
)
def test_lengths(split: Split, count: int, batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    samples = LabelledSamples(split.subset(range(count)), train_transform(TrainConfig(data="x"), PREPROCESS))
    loader = train_loader(samples, batch_size=batch_size, workers=0, cache=False, drop_last=drop_last)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_eval_gives_every_image_in_order(split: Split, workers: int, cache: bool) -> None:
    transform = eval_transform(PREPROCESS)
    loader = eval_loader(LabelledSamples(split, transform), batch_size=16, workers=workers, cache=cache)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert torch.cat([indices for *_, indices in batches]).tolist() == list(range(50))
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == split.labels
    assert torch.equal(batches[1][0][2], transform(split.read(18)))
    assert loader.failures == []


def test_misuse(split: Split) -> None:
    with pytest.raises(DataError, match="batch_size is 0"):
        make(split, batch_size=0)
    with pytest.raises(DataError, match="no images"):
        make(split.subset([]))
    with pytest.raises(DataError, match="the data has changed"):
        make(split).load_state_dict({"epoch": 0, "batch": 99})


def test_the_cache_keeps_what_fits(split: Split) -> None:
    size = 3 * 64 * 64
    cache = fill_cache(len(split), split.read, limit=7 * size + 10)
    assert len(cache) == 7
    assert cache.bytes == 7 * size
    assert torch.equal(cache.get(6), split.read(6))
    assert cache.get(7) is None


def test_images_of_any_size_stay_apart_in_the_cache() -> None:
    cache = ImageCache()
    images = {i: torch.full((3, 5 + i, 900 * i + 1), i, dtype=torch.uint8) for i in range(20)}
    images[20] = torch.full((3, 5000, 5000), 7, dtype=torch.uint8)  # larger than a block
    for i, image in images.items():
        cache.put(i, image)
    assert all(torch.equal(cache.get(i), image) for i, image in images.items())
