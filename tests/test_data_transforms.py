"""Training and evaluation transforms: shapes, values, what is off is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.transforms import eval_transform, train_transform
from chiasm.errors import ChiasmError

OFF = {"crop_scale": 1.0, "flip": 0.0, "rand_augment": 0, "random_erasing": 0.0}


def config(**flags: Any) -> TrainConfig:
    return TrainConfig.from_flags(data="x", **flags)


def picture(height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(
    image=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(4, 48), st.integers(4, 48)),
    crop=st.sampled_from([1.0, 0.95, 0.875, 0.5]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_any_image_to_any_size(image: tuple, size: tuple, crop: float, interpolation: Any) -> None:
    preprocess = Preprocess(size=size, crop=crop, interpolation=interpolation)
    for transform in (eval_transform(preprocess), train_transform(config(), preprocess)):
        result = transform(picture(*image))
        assert result.shape == (3, *size)
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_normalisation_is_exact_where_nothing_is_resized() -> None:
    image, preprocess = picture(32, 48), Preprocess(size=(32, 48))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    expected = (image / 255 - mean) / std
    assert torch.allclose(eval_transform(preprocess)(image), expected, atol=1e-6)
    assert torch.allclose(train_transform(config(**OFF), preprocess)(image), expected, atol=1e-6)


def test_eval_covers_the_box_and_takes_its_middle() -> None:
    # 80 x 40 to a crop of 20 out of a box of 25: resized to 50 x 25, rows 15..35 and columns 2..22 stay.
    image = torch.zeros(3, 80, 40, dtype=torch.uint8)
    image[:, 24:56] = 255  # of the 50 rows, 15..35
    plain = Preprocess(size=(20, 20), crop=0.8, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")
    result = eval_transform(plain)(image)
    assert result[:, 1:-1].min() > 0.99
    image[:, 24:28] = 0
    assert eval_transform(plain)(image)[:, :1].max() < 0.05


def test_grey_by_one_mean() -> None:
    preprocess = Preprocess(size=(16, 16), mean=(0.5,), std=(0.25,))
    image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    for transform in (
        eval_transform(preprocess),
        train_transform(config(random_erasing=0.0, rand_augment=9), preprocess),
    ):
        assert transform(image).shape == (1, 16, 16)
    assert torch.allclose(
        eval_transform(preprocess)(image), torch.full((1, 16, 16), 2.0), atol=0.02
    )  # 254 where the grey weights round down


@pytest.mark.parametrize("what", ["crop_scale", "flip", "rand_augment", "random_erasing"])
def test_each_augmentation_does_something_alone(what: str) -> None:
    value = {"crop_scale": 0.2, "flip": 1.0, "rand_augment": 9, "random_erasing": 1.0}[what]
    image, preprocess = picture(48, 48), Preprocess(size=(48, 48))
    off, on = (train_transform(config(**(OFF | flags)), preprocess) for flags in ({}, {what: value}))
    torch.manual_seed(0)
    assert any(not torch.equal(on(image), off(image)) for _ in range(3))
    if what == "flip":
        assert torch.equal(on(image), off(image).flip(-1))


def test_the_same_seed_gives_the_same_image() -> None:
    transform, image = train_transform(config(), Preprocess(size=(32, 32))), picture()
    torch.manual_seed(4)
    first = transform(image)
    torch.manual_seed(4)
    assert torch.equal(transform(image), first)
    assert not torch.equal(transform(image), first)


def test_training_images_are_kept_at_twice_the_size_at_most() -> None:
    transform = train_transform(config(), Preprocess(size=(32, 32)))
    assert transform.prepare(picture(200, 300)).shape == (3, 64, 96)
    small = picture(50, 90)
    assert torch.equal(transform.prepare(small), small)


def test_the_image_that_is_given_stays_as_it_is() -> None:
    image, preprocess = picture(32, 32), Preprocess(size=(32, 32))
    before = image.clone()
    for _ in range(20):
        train_transform(config(random_erasing=1.0, rand_augment=30), preprocess)(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("flags", [{"flip": 1.5}, {"crop_scale": -0.1}, {"random_erasing": 2.0}, {"rand_augment": 31}])
def test_out_of_range(flags: dict[str, Any]) -> None:
    with pytest.raises(ChiasmError, match=next(iter(flags))):
        train_transform(config(**flags), Preprocess(size=(8, 8)))


def test_channels_that_images_lack() -> None:
    with pytest.raises(ChiasmError, match=r"expected 3 of each \(RGB\) or 1"):
        eval_transform(Preprocess(size=(8, 8), mean=(0.5,) * 4, std=(0.5,) * 4))
