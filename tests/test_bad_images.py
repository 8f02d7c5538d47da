"""Every awkward kind of image file is either read as the table on top of data/images.py says, or named in one line."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.folder import FileSplit
from chiasm.data.images import MAX_PIXELS, find_images, read_image
from chiasm.data.loader import eval_loader, train_loader
from chiasm.data.samples import LabelledSamples
from chiasm.data.transforms import eval_transform, train_transform
from chiasm.errors import DataError, ImageError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def plain(mode: str = "RGB", colour: object = RED) -> Image.Image:
    """6 wide, 4 high."""
    return Image.new(mode, (6, 4), colour)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def turned() -> bytes:
    """Stored 6 x 4 with its left half red; EXIF 6 says to show it turned by 90 degrees clockwise: 4 x 6, top red."""
    image = plain(colour=BLUE)
    image.paste(RED, (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "PNG", exif=exif)


def palette_with_hole() -> bytes:
    image = plain("P", 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 0)
    return encode(image, "PNG", transparency=0)


def animated() -> bytes:
    return encode(plain(), "GIF", save_all=True, append_images=[plain(colour=BLUE)])


def sixteen_bits() -> bytes:
    return encode(Image.fromarray(np.full((4, 6), 32896, dtype=np.uint16)), "PNG")


def floats(value: float) -> bytes:
    return encode(Image.fromarray(np.full((4, 6), value, dtype=np.float32)), "TIFF")


def broken_exif() -> bytes:
    data = encode(plain(), "JPEG", quality=100, subsampling=0)
    junk = b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + b"\x13" * 20
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk + data[2:]


def bomb(width: int, height: int) -> bytes:
    """A sound PNG header of that size and next to no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


READ: dict[str, tuple[str, Callable[[], bytes], tuple[int, int], tuple[int, int, int], int]] = {
    # what: (file's name, content, height and width, colour of the first pixel, tolerance)
    "JPEG": ("a.jpg", lambda: encode(plain(), "JPEG", quality=100, subsampling=0), (4, 6), RED, 3),
    "PNG": ("a.png", lambda: encode(plain(), "PNG"), (4, 6), RED, 0),
    "PNG named .jpg": ("a.jpg", lambda: encode(plain(), "PNG"), (4, 6), RED, 0),
    "JPEG named .png": ("a.png", lambda: encode(plain(), "JPEG", quality=100, subsampling=0), (4, 6), RED, 3),
    "WebP": ("a.webp", lambda: encode(plain(), "WEBP", lossless=True), (4, 6), RED, 0),
    "BMP": ("a.bmp", lambda: encode(plain(), "BMP"), (4, 6), RED, 0),
    "TIFF": ("a.tif", lambda: encode(plain(), "TIFF"), (4, 6), RED, 0),
    "1 bit": ("a.png", lambda: encode(plain("1", 1), "PNG"), (4, 6), WHITE, 0),
    "grey": ("a.png", lambda: encode(plain("L", 77), "PNG"), (4, 6), (77, 77, 77), 0),
    "grey with alpha": ("a.png", lambda: encode(plain("LA", (0, 0)), "PNG"), (4, 6), WHITE, 0),
    "palette": ("a.png", lambda: encode(plain().convert("P"), "PNG"), (4, 6), RED, 0),
    "palette with transparency": ("a.png", palette_with_hole, (4, 6), WHITE, 0),
    "RGBA, see-through": ("a.png", lambda: encode(plain("RGBA", (0, 0, 0, 0)), "PNG"), (4, 6), WHITE, 0),
    "RGBA, half": ("a.png", lambda: encode(plain("RGBA", (255, 0, 0, 128)), "PNG"), (4, 6), (255, 127, 127), 1),
    "RGB with a transparent colour": ("a.png", lambda: encode(plain(), "PNG", transparency=RED), (4, 6), WHITE, 0),
    "CMYK": ("a.jpg", lambda: encode(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (4, 6), RED, 4),
    "16 bits": ("a.png", sixteen_bits, (4, 6), (128, 128, 128), 0),
    "floats 0..1": ("a.tif", lambda: floats(0.5), (4, 6), (128, 128, 128), 0),
    "animated": ("a.gif", animated, (4, 6), RED, 0),
    "EXIF-rotated": ("a.png", turned, (6, 4), RED, 0),
    "damaged EXIF": ("a.jpg", broken_exif, (4, 6), RED, 3),
    "1 x 1": ("a.png", lambda: encode(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED, 0),
    "unicode and spaces": ("dir ünï/図 面 1.png", lambda: encode(plain(), "PNG"), (4, 6), RED, 0),
}

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    # what: (file's name, content, part of the reason)
    "zero bytes": ("a.jpg", lambda: b"", "empty"),
    "JPEG cut off": ("a.jpg", lambda: encode(noise(), "JPEG")[:-900], "cut off"),
    "PNG cut off": ("a.png", lambda: encode(noise(), "PNG")[:-900], "cut off"),
    "GIF cut off": ("a.gif", lambda: encode(noise(), "GIF")[:-900], "cut off"),
    "header only": ("a.jpg", lambda: encode(noise(), "JPEG")[:20], "image"),
    "damaged PNG": ("a.png", lambda: encode(noise(), "PNG").replace(b"IDAT", b"IDXT"), "PNG"),
    "text": ("a.jpg", lambda: b"hello, not an image", "text starting with 'hello"),
    "web page": ("a.jpg", lambda: b"<!DOCTYPE html><html>404</html>", "web page"),
    "Git LFS pointer": ("a.png", lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "SVG": ("a.png", lambda: b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "export it as PNG"),
    "HEIC": ("a.heic", lambda: b"\0\0\0\x18ftypheic" + b"\0" * 32, "HEIC"),
    "PostScript": ("a.eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "zeros": ("a.jpg", lambda: b"\0" * 4096, "zero bytes"),
    "floats beyond 1": ("a.tif", lambda: floats(7.5), "expected 0..1"),
    "floats not numbers": ("a.tif", lambda: floats(float("nan")), "expected 0..1"),
    "over the limit": ("a.png", lambda: bomb(15_000, MAX_PIXELS // 15_000 + 1), "15000 x 10001 pixels"),
    "bomb": ("a.png", lambda: bomb(200_000, 200_000), "pixels"),
}


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", READ)
def test_read(what: str, tmp_path: Path) -> None:
    name, content, size, colour, tolerance = READ[what]
    image = read_image(write(tmp_path, name, content()))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert image.shape == (3, *size)
    assert (image[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= tolerance
    assert torch.equal(read_image(content()), image)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    name, content, reason = REFUSED[what]
    path = write(tmp_path, name, content())
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert caught.value.path == path
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_such_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b.jpg")


def test_any_damage_is_an_image_error() -> None:
    """Whatever byte is changed, and wherever a file ends, reading gives an image or an ImageError."""
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        sound = encode(noise().resize((24, 24)), format)
        for _ in range(40):
            data = bytearray(sound[: rng.integers(1, len(sound) + 1)])
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert read_image(bytes(data)).shape[0] == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_inside_a_loader(workers: int, cache: bool, tmp_path: Path) -> None:
    paths = []
    for what, (name, content, *_) in [*READ.items(), *REFUSED.items()]:
        paths.append(write(tmp_path / what, name, content()))
    broken = set(paths[len(READ) :])
    split = FileSplit(paths, [0] * len(READ) + [1] * len(REFUSED))
    preprocess = Preprocess(size=(16, 24))

    samples = LabelledSamples(split, train_transform(TrainConfig(data="x"), preprocess))
    train = train_loader(samples, batch_size=len(split), workers=workers, cache=cache)
    ((images, labels),) = list(train)
    assert images.shape == (len(split), 3, 16, 24)
    assert images.isfinite().all()
    assert not labels.any()  # every broken one is replaced, by a readable one with its own label
    assert {error.path for error in train.failures} == broken

    samples = LabelledSamples(split, eval_transform(preprocess))
    valid = eval_loader(samples, batch_size=7, workers=workers, cache=cache)
    for _ in range(2):
        batches = list(valid)
        assert torch.cat([indices for _, _, indices in batches]).tolist() == list(range(len(READ)))
        assert all(len(images) == len(labels) == len(indices) for images, labels, indices in batches)
        assert len(valid.failures) == len(broken)
        assert {error.path for error in valid.failures} == broken


@pytest.mark.parametrize("workers", [0, 1])
def test_none_readable(tmp_path: Path, workers: int) -> None:
    split = FileSplit([write(tmp_path, f"{i}.jpg", b"") for i in range(3)], [0, 1, 0])
    preprocess = Preprocess(size=(8, 8))
    samples = LabelledSamples(split, train_transform(TrainConfig(data="x"), preprocess))
    with pytest.raises(
        DataError, match=r"^none of the 3 training images can be read; the first: .*jpg.*0 bytes"
    ) as told:
        list(train_loader(samples, batch_size=2, workers=workers))
    assert "\n" not in str(told.value)
    samples = LabelledSamples(split, eval_transform(preprocess))
    assert list(eval_loader(samples, batch_size=2, workers=workers)) == []


def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "b/2.png",
        "b/1.JPG",
        "b/deep/3.webp",
        "b/.hidden.png",
        "b/.git/4.png",
        "b/notes.txt",
        "x[1].jpg",
        "y.dat",
    ):
        write(tmp_path, name, b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "up").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert list(find_images(["b"])) == ["b/1.JPG", "b/2.png", "b/deep/3.webp"]
    assert list(find_images(["b/*.png", "x[1].jpg"])) == ["b/2.png", "x[1].jpg"]
    assert sorted(find_images(["b/deep/**/*.webp"])) == ["b/deep/3.webp"]
    assert list(find_images(["y.dat", "missing.jpg"])) == ["y.dat", "missing.jpg"]
    for nothing in ("empty", "b/*.gif"):
        with pytest.raises(DataError, match="no image files"):
            list(find_images([nothing]))
    lazy = find_images(["b", "empty"])
    assert next(lazy) == "b/1.JPG"


def test_sixteen_bits_take_little_memory() -> None:
    """Every value is scaled as by floats of 64 bits, and no such floats of the whole image are made."""
    values = np.arange(1 << 21, dtype=np.uint32).astype(np.uint16).reshape(1024, 2048)
    data = encode(Image.fromarray(values), "PNG")
    tracemalloc.start()
    try:
        image = read_image(data)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10 * values.size
    assert np.array_equal(image[0].numpy(), np.rint(values.astype(np.float64) * (255 / 65535)))
